"""A classifier learns what tells two kinds of text apart, says how well, and finds the least loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gemel.config.data.rules import ClassifyConfig
from gemel.config.errors import CheckpointError, ConfigError
from gemel.data.steps.classify import Classifier, Classify, Labelled, train
from gemel.data.steps.minimise import minimise
from tests.data.steps.prose import chinese, english, kept, reason, run
from tests.tolerance import assert_close

# Both kinds have the same words; only their order, that is their pairs, differs.
GOOD = [f"{english(3, seed)} more or less {english(2, seed + 500)}" for seed in range(150)]
BAD = [f"{english(3, seed)} less or more {english(2, seed + 500)}" for seed in range(150, 300)]
LABELLED = [*(Labelled(text, True) for text in GOOD), *(Labelled(text, False) for text in BAD)]


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return train(LABELLED, bits=16)


def test_pairs_of_words_tell_texts_apart(classifier):
    middle = next(row for row in classifier.report if row.threshold == 0.5)
    assert middle.num_texts > 40
    assert middle.precision > 0.95 and middle.recall > 0.95


def test_the_report_is_of_texts_that_were_not_trained_on():
    # Labels that mean nothing cannot be learnt, however well they are remembered.
    lots = [Labelled(english(3, seed), seed % 2 == 0) for seed in range(400)]
    middle = next(row for row in train(lots, bits=16, l2=1e-3).report if row.threshold == 0.5)
    assert middle.accuracy < 0.7


def test_precision_and_recall_by_hand(classifier):
    held = [one for one in LABELLED if classifier.report]  # all texts, judged again here
    scores = classifier.scores([one.text for one in held])
    assert ((scores > 0) & (scores < 1)).all()
    assert np.mean([score for score, one in zip(scores, held, strict=True) if one.good]) > 0.8
    thresholds = [row.threshold for row in classifier.report]
    recalls = [row.recall for row in classifier.report]
    assert thresholds == sorted(thresholds) and recalls == sorted(recalls, reverse=True)


def test_chinese():
    labelled = [
        Labelled(chinese(6, seed) + ("春眠" if seed % 2 else "眠春") + chinese(6, seed + 900), bool(seed % 2)) for seed in range(300)
    ]
    assert next(row for row in train(labelled, bits=16).report if row.threshold == 0.5).accuracy > 0.95


def test_scores_do_not_depend_on_company(classifier):
    together = classifier.scores([*GOOD[:5], "", "\n", *BAD[:5]])
    alone = [float(classifier.scores([text])[0]) for text in (*GOOD[:5], "", "\n", *BAD[:5])]
    assert together.tolist() == alone


def test_the_step_notes_and_drops(classifier, tmp_path):
    classifier.save(tmp_path / "c.safetensors")
    step = Classify(ClassifyConfig(model=str(tmp_path / "c.safetensors"), name="prose", min_score=0.5))
    assert kept(step, GOOD[0]).metadata["prose"] == round(float(classifier.scores(GOOD[:1])[0]), 4)
    assert reason(step, BAD[0]) == "classify.low"
    noted = Classify(ClassifyConfig(model=str(tmp_path / "c.safetensors"), min_score=0.0))
    assert ["quality_score" in answer.metadata for answer in run(noted, GOOD[0], BAD[0])] == [True, True]  # type: ignore[union-attr]
    assert Classifier.load(tmp_path / "c.safetensors").report == classifier.report


def test_one_kind_alone_is_refused():
    with pytest.raises(ConfigError, match="0 bad texts to train on"):
        train([one for one in LABELLED if one.good])
    with pytest.raises(ConfigError, match="held out"):
        train(LABELLED, held_out=0.0)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "x").write_text("no model")
    with pytest.raises(CheckpointError, match="cannot read"):
        Classify(ClassifyConfig(model=str(tmp_path / "x")))


def test_least_value_of_a_quadratic_and_of_a_valley():
    draw = np.random.default_rng(0)
    a = draw.normal(size=(20, 20))
    a, b = a @ a.T + np.eye(20), draw.normal(size=20)
    got = minimise(lambda x: (float(x @ a @ x / 2 - b @ x), a @ x - b), np.zeros(20))
    assert_close(torch.tensor(a @ got), torch.tensor(b), "int8_activations")

    def valley(x: np.ndarray) -> tuple[float, np.ndarray]:  # Rosenbrock 1960: the least value is at (1, 1)
        u, v = 1 - x[0], x[1] - x[0] ** 2
        return float(u * u + 100 * v * v), np.array([-2 * u - 400 * x[0] * v, 200 * v])

    assert_close(torch.tensor(minimise(valley, np.array([-1.2, 1.0]))), torch.ones(2, dtype=torch.float64), "fp32_reference")

"""Perplexities by hand from a small ARPA file, what the step keeps and drops, and what damaged files say."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import pytest
import torch

from gemel.config.data.rules import PerplexityConfig
from gemel.config.errors import CheckpointError, ConfigError
from gemel.data.steps.arpa import load_arpa
from gemel.data.steps.ngram import train
from gemel.data.steps.perplexity import Perplexity
from tests.data.steps.prose import chinese, english, kept, reason
from tests.tolerance import assert_close

ARPA = """
\\data\\
ngram 1=6
ngram 2=4
ngram 3=1

\\1-grams:
-99\t<s>\t-0.5
-1.0\t</s>
-0.7\tthe\t-0.3
-0.9\tcat\t-0.2
-1.1\t很好
-2.0\t<unk>

\\2-grams:
-0.4\t<s> the\t-0.1
-0.2\tthe cat\t-0.6
-0.3\tcat </s>
-0.8\t很好 </s>

\\3-grams:
-0.05\t<s> the cat

\\end\\
"""
# What each token costs: the longest n-gram that is there, after the weights of backing off from those that are not.
SCORES = {
    "the cat": (-0.4) + (-0.05) + (-0.6 - 0.3),
    "cat the": (-0.5 - 0.9) + (-0.2 - 0.7) + (-0.3 - 1.0),
    "cat dog": (-0.5 - 0.9) + (-0.2 - 2.0) + (-1.0),
    "the the cat": (-0.4) + (-0.1 - 0.3 - 0.7) + (-0.2) + (-0.6 - 0.3),
    "很好": (-0.5 - 1.1) + (-0.8),
    "the cat\n\n cat  the ": (-0.4 - 0.05 - 0.9) + (-1.4 - 0.9 - 1.3),
}


@pytest.fixture
def arpa(tmp_path: Path) -> Path:
    file = tmp_path / "small.arpa"
    file.write_text(ARPA)
    return file


def test_scores_by_hand(arpa):
    got, num_tokens = load_arpa(arpa, "spaces", fold=False).score(list(SCORES))
    assert_close(torch.tensor(got), torch.tensor(list(SCORES.values()), dtype=torch.float64), "fp32_reorder")
    assert num_tokens.tolist() == [3, 3, 3, 4, 2, 6]


def test_gzipped_files_read_alike(arpa):
    packed = arpa.with_suffix(".arpa.gz")
    packed.write_bytes(gzip.compress(arpa.read_bytes()))
    texts = list(SCORES)
    assert (load_arpa(packed, "spaces", False).score(texts)[0] == load_arpa(arpa, "spaces", False).score(texts)[0]).all()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("-0.2\tthe cat\t-0.6\n", "", "3 2-grams, 4 announced"),
        ("-0.2\tthe cat", "-0.2\tthe dog", "'dog'"),
        ("-0.2\tthe cat\t-0.6", "much\tthe cat", "not a 2-gram"),
        ("\\1-grams:", "", "no ARPA file"),
    ],
)
def test_damaged_files_say_what_is_wrong(arpa, old, new, message):
    arpa.write_text(ARPA.replace(old, new))
    with pytest.raises(CheckpointError, match=message):
        load_arpa(arpa, "spaces", False)


def test_the_step_notes_and_drops(arpa):
    step = Perplexity(PerplexityConfig(model=str(arpa), max_perplexity=9.0, min_perplexity=3.0, buckets=(5.0, 8.0)))
    expected = 10 ** (-SCORES["很好"] / 2)
    assert math.isclose(expected, 15.848931924611133)
    assert reason(step, "很好") == "perplexity.high"
    assert reason(step, "the cat") == "perplexity.low"
    document = kept(step, "the the cat")
    assert document.metadata == {"perplexity": round(10 ** (-SCORES["the the cat"] / 4), 2), "perplexity_bucket": 0}
    assert reason(step, "") == "perplexity.high"


def test_only_documents_of_its_language_are_asked(arpa):
    step = Perplexity(PerplexityConfig(model=str(arpa), language="en", max_perplexity=1.5))
    assert reason(step, "the cat", language="en") == "perplexity.high"
    assert reason(step, "the cat", language="de") == reason(step, "the cat") == ""


def test_text_like_the_models_surprises_it_less(tmp_path):
    for write, name in ((english, "en"), (chinese, "zh")):
        text = write(200)
        lines = text.split("\n")
        train([lines[:40]], order=3).save(tmp_path / f"{name}.safetensors")
        step = Perplexity(PerplexityConfig(model=str(tmp_path / f"{name}.safetensors")))
        like = kept(step, "\n".join(lines[40:])).metadata["perplexity"]
        backwards = kept(step, "\n".join(line[::-1] for line in lines[40:])).metadata["perplexity"]
        assert like < 0.8 * backwards


def test_a_missing_model_names_the_way_to_make_one(tmp_path):
    with pytest.raises(ConfigError, match="gemel data ngram"):
        Perplexity(PerplexityConfig(model=str(tmp_path / "none")))
    with pytest.raises(ConfigError, match="ascend"):
        PerplexityConfig.parse({"model": "m", "buckets": [2.0, 1.0]})


def test_kenlm_agrees(arpa):
    kenlm = pytest.importorskip("kenlm", reason="KenLM's library is optional: pip install kenlm")
    model = kenlm.Model(str(arpa))
    lines = [text for text in SCORES if "\n" not in text]
    got, _ = load_arpa(arpa, "spaces", False).score(lines)
    assert_close(torch.tensor(got), torch.tensor([model.score(line) for line in lines], dtype=torch.float64), "fp32_reorder")

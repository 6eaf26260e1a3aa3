"""A share of the documents, the same ones each time."""

from __future__ import annotations

from gemel.config.data.rules import SampleConfig
from gemel.data.document import Document, Dropped
from gemel.data.steps.sample import Sample

DOCUMENTS = [Document("", str(number), "test") for number in range(4000)]


def chosen(share: float, seed: int = 0) -> set[str]:
    return {answer.id for answer in Sample(SampleConfig(share=share, seed=seed))(DOCUMENTS) if isinstance(answer, Document)}


def test_about_the_share_is_kept_and_smaller_samples_are_within_larger_ones():
    small, large = chosen(0.1), chosen(0.5)
    assert small < large
    assert abs(len(small) - 400) < 4 * (4000 * 0.1 * 0.9) ** 0.5  # four standard deviations
    assert abs(len(large) - 2000) < 4 * (4000 * 0.25) ** 0.5


def test_all_or_nothing():
    assert len(chosen(1.0)) == 4000
    assert not chosen(0.0)


def test_a_seed_draws_another_sample():
    assert chosen(0.1) == chosen(0.1, 0) != chosen(0.1, 1)


def test_the_rest_has_a_reason():
    (answer,) = Sample(SampleConfig(share=0.0))(DOCUMENTS[:1])
    assert isinstance(answer, Dropped) and answer.reason == "sample.left_out"

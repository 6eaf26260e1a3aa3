from __future__ import annotations

from typing import Any

import pytest

from gemel.config.data.dedup import MixConfig
from gemel.config.errors import ConfigError
from gemel.data.document import Document, Dropped
from gemel.data.steps.mix import Mix
from tests.data import corpus

SIZES = {"web": 600, "books": 200, "代码": 100}
DOCUMENTS = [Document(f"{source} {number:04}", f"{source}-{number}", source) for source, count in SIZES.items() for number in range(count)]


def taken(answers: list[Document | Dropped]) -> dict[str, int]:
    """Documents by source, as often as they count."""
    sums = dict.fromkeys(SIZES, 0)
    for answer in answers:
        if isinstance(answer, Document):
            sums[answer.source] += answer.metadata.get("repeat", 1)
    return sums


def mix(**values: Any) -> tuple[dict[str, int], list[Document | Dropped], dict[str, dict[str, float]]]:
    step = Mix(MixConfig.parse({"unit": "documents", **values}))
    answers, verdicts = corpus.run(step, DOCUMENTS, units=4, batch=100)
    report = step.report(verdicts)
    assert {source: row["taken_documents"] for source, row in report.items()} == taken(answers)  # the report is exact
    return taken(answers), answers, report


def close(got: dict[str, int], want: dict[str, float]) -> bool:
    """Half a slot, here a document: two can share one of 2^16 slots."""
    return all(abs(got[source] - want[source]) <= 1 for source in SIZES)


def test_all_is_taken_by_default() -> None:
    assert mix()[0] == SIZES


def test_shares_follow_the_weights() -> None:
    got, answers, report = mix(weights={"web": 2, "books": 1, "代码": 1}, budget=240)
    assert close(got, {"web": 120, "books": 60, "代码": 60})
    dropped = next(answer for answer in answers if isinstance(answer, Dropped))
    assert dropped.reason == "mix.sampled"
    assert dropped.detail == f"{got['web']} of 600 documents of 'web' are taken"
    assert list(report) == sorted(SIZES)
    assert report["web"]["target"] == 120


def test_without_a_budget_the_scarcest_source_is_used_up() -> None:
    assert close(mix(weights={"web": 2, "books": 1, "代码": 1})[0], {"web": 200, "books": 100, "代码": 100})


def test_temperature_levels_the_sources() -> None:
    roots = {source: size**0.5 for source, size in SIZES.items()}
    whole = 100 * sum(roots.values()) / roots["代码"]
    assert close(mix(temperature=2.0)[0], {source: whole * root / sum(roots.values()) for source, root in roots.items()})


def test_repeats_are_counted_and_written_down() -> None:
    got, answers, _ = mix(weights={"web": 0, "books": 0, "代码": 1}, budget=250, epochs=2.5)
    assert close(got, {"web": 0, "books": 0, "代码": 250})
    repeats = [a.metadata.get("repeat", 1) for a in answers if isinstance(a, Document)]
    assert set(repeats) == {2, 3}
    assert len(repeats) == 100


def test_units_are_characters_or_bytes() -> None:
    for unit, size in (("characters", 7), ("bytes", 11)):
        got, _, report = mix(weights={"web": 0, "books": 0, "代码": 1}, budget=40 * size, unit=unit)
        assert abs(got["代码"] - 40) <= 1
        assert report["代码"]["taken_size"] == got["代码"] * size


@pytest.mark.parametrize("cutting", corpus.CUTTINGS)
def test_the_result_does_not_depend_on_the_cutting(cutting: tuple[int, int, int]) -> None:
    step, some = Mix(MixConfig(weights={"web": 1, "books": 2, "代码": 1})), DOCUMENTS[500:850]
    assert corpus.outcome(corpus.run(step, some, *cutting)[0]) == corpus.outcome(corpus.run(step, some)[0])


def test_more_budget_keeps_what_less_has_kept_and_seeds_differ() -> None:
    weights = {"web": 1, "books": 1, "代码": 1}
    small, large, other = (set(corpus.kept(mix(weights=weights, budget=b, seed=s)[1])) for b, s in ((90, 0), (180, 0), (90, 1)))
    assert small < large
    assert len(small - other) > 30


def test_what_cannot_be_met_names_its_ways_out() -> None:
    weights = {"web": 1, "books": 1, "代码": 2}
    with pytest.raises(ConfigError, match=r"budget of at most 200 can be met: lower it, or set epochs = 2,") as error:
        mix(weights=weights, budget=400)
    assert "'代码', which has 100" in str(error.value)
    assert close(mix(weights=weights, budget=200)[0], {"web": 50, "books": 50, "代码": 100})
    assert close(mix(weights=weights, budget=400, epochs=2)[0], {"web": 100, "books": 100, "代码": 200})
    with pytest.raises(ConfigError, match="no weight for '代码'"):
        mix(weights={"web": 1, "books": 1})
    with pytest.raises(ConfigError, match="'wiki', but there is nothing"):
        mix(weights={**weights, "wiki": 1})
    with pytest.raises(ConfigError, match="give one of them"):
        mix(weights=weights, temperature=2.0)
    with pytest.raises(ConfigError, match="all weights are 0"):
        mix(weights={"web": 0})


def test_nothing_in_nothing_out() -> None:
    answers, verdicts = corpus.run(Mix(MixConfig()), [Document("", "empty", "s")])
    assert isinstance(answers[0], Dropped)
    assert verdicts["taken_size"].to_pylist() == [0]

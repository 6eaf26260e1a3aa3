"""Searches: every combination once, the same ones for the same seed, better than chance, and nothing lost when killed."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from gemel.config.errors import ConfigError, UnsupportedError
from gemel.config.search import HalvingPrune, MedianPrune, SearchConfig
from gemel.config.train import TrainRecipe
from gemel.train import search
from gemel.train.progress import Progress
from gemel.train.search import Trial, hopeless, suggest, with_values
from gemel.train.trainer import Report
from tests.train import runs
from tests.train.test_prepare import BATCH, TALKS, conversations

RATES = {"optim.lr": {"kind": "choice", "values": [1e-2, 1e-4, 3e-2]}}
LOG = {"optim.lr": {"kind": "float", "low": 1e-6, "high": 1e-1, "log": True}, "seed": {"kind": "int", "low": 0, "high": 5}}


def config(space: dict[str, Any] = RATES, **changes: Any) -> SearchConfig:
    return SearchConfig.parse({"space": space, "method": {"kind": "grid"}} | changes)


def recipe(folder: Path, **changes: Any) -> TrainRecipe:
    return runs.recipe(folder, **{"data__holdout": 0.2, "validation__every": 2, "save": {"every": 0}} | changes)


def trial(number: int, *losses: float, state: Any = "finished", values: dict[str, Any] | None = None) -> Trial:
    looks = [(2 * (i + 1), loss) for i, loss in enumerate(losses)]
    return Trial(number, values or {}, state, losses[-1], looks)


# --- what is tried -----------------------------------------------------------------------------------------------------------------------


def test_a_grid_is_every_combination() -> None:
    searched = config(RATES | {"seed": {"kind": "int", "low": 1, "high": 2}})
    tried = [suggest(searched, number, []) for number in range(6)]
    assert [(x["optim.lr"], x["seed"]) for x in tried] == [(lr, seed) for lr in (1e-2, 1e-4, 3e-2) for seed in (1, 2)]


def test_random_draws_depend_on_seed_and_number_alone() -> None:
    searched = config(LOG, method={"kind": "random", "trials": 400})
    tried = [suggest(searched, number, []) for number in range(400)]
    assert tried[7] == suggest(searched, 7, [trial(0, 1.0)]) != suggest(config(LOG, method=searched.method, seed=1), 7, [])
    logs = sorted(math.log10(x["optim.lr"]) for x in tried)
    assert -6 <= logs[0] < -5.8 and -1.2 < logs[-1] <= -1 and logs[200] == pytest.approx(-3.5, abs=0.4)
    assert {x["seed"] for x in tried} == set(range(6))


def test_bayes_comes_nearer_than_chance() -> None:
    """A loss that is least at a rate of 1e-3: the later trials lie nearer to it than drawn ones, choices and failures among them."""
    pytest.importorskip("optuna")
    space = LOG | {"optim.method": {"kind": "choice", "values": [{"kind": "sgd"}, {"kind": "adamw"}]}}
    searched = config(space, method={"kind": "bayes", "trials": 30, "startup": 6})
    trials: list[Trial] = []
    for number in range(30):
        values = suggest(searched, number, trials)
        distance = abs(math.log10(values["optim.lr"]) + 3) + (values["optim.method"]["kind"] == "sgd")
        state = "failed" if number == 3 else "pruned" if number == 4 else "finished"
        trials.append(Trial(number, values, state, None if number == 3 else distance, [(2, distance + 1)]))
        assert number < 6 or values == suggest(searched, number, trials[:-1])
    drawn = [suggest(config(space, method={"kind": "random", "trials": 30}), number, []) for number in range(300)]
    late, chance = (median(abs(math.log10(x["optim.lr"]) + 3) for x in values) for values in ([one.values for one in trials[20:]], drawn))
    assert late < 0.5 * chance


def test_values_go_where_the_recipe_has_them(tmp_path: Path) -> None:
    changed = with_values(recipe(tmp_path), {"optim.schedule": {"kind": "wsd"}, "data.train.0.packing": "best_fit", "seed": 4})
    assert (changed.optim.schedule.kind, changed.data.train[0].kind, changed.seed) == ("wsd", "shards", 4)
    with pytest.raises(ConfigError, match="did you mean 'lr'"):
        with_values(recipe(tmp_path), {"optim.lrr": 1})


# --- what is given up --------------------------------------------------------------------------------------------------------------------


def test_worse_than_the_median_is_given_up() -> None:
    rule, others = MedianPrune(kind="median", trials=3, steps=3), [trial(i, 9.0, float(i)) for i in range(3)]
    assert not hopeless(rule, 4, 1.0, others) and hopeless(rule, 4, 1.001, others)
    assert not hopeless(rule, 4, 99.0, others[:2])  # too few
    assert not hopeless(rule, 2, 99.0, others)  # too early
    assert not hopeless(rule, 6, 99.0, others)  # nobody was there


def test_halving_lets_the_best_third_go_on() -> None:
    rule = HalvingPrune(kind="halving", steps=2, factor=3)
    others = [trial(i, float(i), 5.0, 5.0) for i in range(5)]
    assert not hopeless(rule, 2, 0.5, others) and hopeless(rule, 2, 1.5, others)  # two of six
    assert not hopeless(rule, 4, 9.0, others)  # no rung: they are at 2, 6, 18
    assert hopeless(rule, 6, 9.0, others)
    assert not hopeless(rule, 2, 9.0, []) and hopeless(rule, 2, 9.0, others[:1])


# --- whole searches ----------------------------------------------------------------------------------------------------------------------


def states(outcome: search.Outcome) -> list[str]:
    return [one.state for one in outcome.trials]


def test_a_search_finds_the_best_and_keeps_it(tmp_path: Path) -> None:
    outcome = search.search(config(RATES), recipe(tmp_path), quiet=True)
    losses = [one.loss or 0.0 for one in outcome.trials]
    assert outcome.finished and states(outcome) == ["finished"] * 3 and losses[1] == max(losses)
    assert outcome.best == outcome.trials[losses.index(min(losses))]
    assert [step for step, _ in outcome.trials[0].looks] == [2, 4, 6, 8] and outcome.trials[0].looks[-1][1] == losses[0]
    kept = [(tmp_path / "out" / "trials" / f"{n:04d}" / "latest").exists() for n in range(3)]
    assert kept == [loss == min(losses) for loss in losses]
    assert all((tmp_path / "out" / "trials" / f"{n:04d}" / "metrics.jsonl").exists() for n in range(3))
    again = search.search(config(RATES), recipe(tmp_path), quiet=True)
    assert again == outcome


def test_a_killed_search_goes_on_as_if_it_had_not_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the middle of a trial, and between its end and the note of it; one that is given up among them."""
    searched = config(RATES | {"seed": {"kind": "int", "low": 0, "high": 1}}, prune={"kind": "median", "trials": 2})
    settings = {"save": {"every": 2}}
    whole = search.search(searched, recipe(tmp_path, out=str(tmp_path / "whole"), **settings), quiet=True)
    assert "pruned" in states(whole) and whole.finished

    class Killed(Exception):
        pass

    def killed(*args: Any) -> None:
        raise Killed

    made = recipe(tmp_path, out=str(tmp_path / "killed"), **settings)
    step, store = Progress.step, search._store
    for number in range(3):
        left = iter(range(5 + number))

        def stepped(self: Progress, report: Report, step_s: float, left: Iterator[int] = left) -> None:
            step(self, report, step_s)
            if next(left, None) is None:
                raise Killed

        with monkeypatch.context() as patch:
            if number % 2:
                patch.setattr(search, "_store", killed)
            else:
                patch.setattr(Progress, "step", stepped)
            with pytest.raises(Killed):
                search.search(searched, made, quiet=True)
        if number % 2:
            with monkeypatch.context() as patch:
                patch.setattr(search, "_store", lambda *args: (store(*args), killed()))
                with pytest.raises(Killed):
                    search.search(searched, made, quiet=True)
    assert search.search(searched, made, quiet=True) == whole
    assert json.loads((tmp_path / "killed" / search.FILE).read_text()) == json.loads((tmp_path / "whole" / search.FILE).read_text())


def test_a_trial_that_fails_ends_itself_alone(tmp_path: Path) -> None:
    searched = config({"batch.micro_tokens": {"kind": "choice", "values": [33, 32]}})
    outcome = search.search(searched, recipe(tmp_path), quiet=True)
    assert states(outcome) == ["failed", "finished"] and outcome.best == outcome.trials[1]
    assert "micro_tokens = 33 is not a multiple of sequence = 32; 32 is" in outcome.trials[0].reason


def test_trials_share_what_is_prepared(tmp_path: Path) -> None:
    sources = [{"kind": "conversations", "paths": [str(conversations(tmp_path / "talks.jsonl", TALKS[:2] * 8))]}]
    search.search(config(), recipe(tmp_path, data={"train": sources, "holdout": 0.2}, batch=BATCH, steps=2), quiet=True)
    assert [path.name for path in (tmp_path / "out" / "prepared" / "data").iterdir()] == ["talks"]
    assert not list((tmp_path / "out" / "trials").glob("*/data"))


def test_more_trials_make_a_search_longer_and_another_search_is_refused(tmp_path: Path) -> None:
    method = {"kind": "random", "trials": 1}
    first = search.search(config(LOG, method=method), recipe(tmp_path), quiet=True)
    longer = search.search(config(LOG, method=method | {"trials": 2}), recipe(tmp_path), quiet=True)
    assert longer.trials[0] == first.trials[0] and len(longer.trials) == 2
    with pytest.raises(ConfigError, match=r"holds another search: search\.seed was 0 and is 1.*another --output"):
        search.search(config(LOG, method=method, seed=1), recipe(tmp_path), quiet=True)


@pytest.mark.parametrize(
    ("searched", "changes", "says"),
    [
        ({}, {"data__holdout": 0.0, "validation__every": 0}, r"set data\.holdout = 0\.01"),
        ({"prune": {"kind": "median"}}, {"validation__every": 0}, r"set validation\.every"),
        ({"prune": {"kind": "halving", "steps": 3}}, {}, r"prune\.steps = 3 is no multiple of validation\.every = 2"),
        ({"space": {"optim.lrr": {"kind": "choice", "values": [1]}}}, {}, r"did you mean 'lr'"),
    ],
)
def test_mistakes_come_to_light_before_the_first_trial(
    searched: dict[str, Any], changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=says):
        search.search(config(**searched), recipe(tmp_path, **changes), quiet=True)
    assert not (tmp_path / "out" / "trials").exists()


def test_optuna_is_named_if_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'gemel\[search\]'; or take kind = 'random'"):
        search.search(config(method={"kind": "bayes", "trials": 2}), recipe(tmp_path), quiet=True)

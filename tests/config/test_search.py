"""Searches: what a grid has, what a share of the way is, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gemel.config import search
from gemel.config.errors import ConfigError
from gemel.config.search import Choice, Float, Integer, SearchConfig

LEAST: dict[str, Any] = {"space": {"optim.lr": {"kind": "choice", "values": [1e-3, 1e-2]}}, "method": {"kind": "grid"}}


def test_grids() -> None:
    assert Choice(kind="choice", values=("a", {"kind": "b"})).grid("x") == ["a", {"kind": "b"}]
    assert Float(kind="float", low=1, high=3, points=5).grid("x") == [1, 1.5, 2, 2.5, 3]
    assert Float(kind="float", low=1e-4, high=1e-2, log=True, points=3).grid("x") == pytest.approx([1e-4, 1e-3, 1e-2])
    assert Integer(kind="int", low=2, high=9, step=3).grid("x") == [2, 5, 8]
    with pytest.raises(ConfigError, match=r"optim\.lr of kind 'float' has no end of values for a grid to try; set points = 5"):
        Float(kind="float", low=1, high=3).grid("optim.lr")


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.999999])
def test_shares_of_the_way_stay_inside_and_are_even(share: float) -> None:
    assert Choice(kind="choice", values=(1, 2, 3, 4)).at(share) == 1 + int(4 * share)
    assert Float(kind="float", low=-1, high=3).at(share) == pytest.approx(-1 + 4 * share)
    assert Float(kind="float", low=1e-4, high=1, log=True).at(share) == pytest.approx(10 ** (-4 + 4 * share))
    assert Integer(kind="int", low=1, high=8).at(share) == 1 + int(8 * share)
    assert Integer(kind="int", low=1, high=16, log=True).at(share) == round(16**share)


def test_a_search_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(
        '[space]\n"optim.lr" = { kind = "float", low = 1e-4, high = 1e-2, log = true }\n[method]\nkind = "random"\ntrials = 3'
    )
    assert search.load(tmp_path / "s.toml").space["optim.lr"] == Float(kind="float", low=1e-4, high=1e-2, log=True)
    with pytest.raises(ConfigError, match="cannot read the search"):
        search.load(tmp_path / "none.toml")
    assert search.load(Path(__file__).parents[2] / "recipes" / "search.toml").method.kind == "random"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"space": {}}, "space"),
        ({"space": {"optim lr": {"kind": "choice", "values": [1]}}}, "is no key of a recipe"),
        ({"space": {"steps": {"kind": "choice", "values": [1]}}}, "'steps' cannot be searched"),
        ({"space": {"a": {"kind": "float", "low": 2, "high": 1}}}, "low = 2 is not below high = 1"),
        ({"space": {"a": {"kind": "float", "low": 0, "high": 1, "log": True}}}, "low = 0 has no logarithm"),
        ({"space": {"a": {"kind": "int", "low": 1, "high": 9, "log": True, "step": 2}}}, "log = true goes by factors, step = 2 by"),
        ({"method": {"kind": "bayesian"}}, "method.kind = 'bayesian' is not known: did you mean 'bayes'?"),
        ({"method": {"kind": "grid", "trials": 3}}, "has no key 'method.trials'"),
    ],
)
def test_mistakes_are_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        SearchConfig.parse(LEAST | change)
    assert says in str(error.value)

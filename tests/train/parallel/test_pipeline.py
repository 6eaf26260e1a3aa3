"""Pipeline parallel: where it is cut, and gradients on 2 and 4 processes."""

from __future__ import annotations

import random
from itertools import combinations, pairwise

import pytest

from gemel.train.parallel.pipeline import balance, layer_costs
from tests import tiny
from tests.train.parallel import ranks


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_gradients_are_those_of_one_process(num_ranks: int) -> None:
    ranks.start("tests.train.parallel.pipeline_ranks", num_ranks)


@pytest.mark.parametrize("seed", range(20))
def test_no_cut_has_a_cheaper_dearest_part(seed: int) -> None:
    rng = random.Random(seed)
    costs = [rng.choice([1.0, 1.0, 2.0, 5.0]) for _ in range(rng.randint(3, 9))]
    num_parts = rng.randint(1, min(len(costs), 4))
    runs = balance(costs, num_parts)
    assert [run[0] for run in runs] == [0, *(run[1] for run in runs[:-1])] and runs[-1][1] == len(costs)
    cuts = ((0, *cut, len(costs)) for cut in combinations(range(1, len(costs)), num_parts - 1))
    assert max(sum(costs[a:b]) for a, b in runs) == min(max(sum(costs[a:b]) for a, b in pairwise(cut)) for cut in cuts)


def test_a_dear_head_takes_the_place_of_layers() -> None:
    """The vocabulary's matrix costs as much as several layers, so its stage has fewer."""
    model = tiny.build("gqa", num_layers=8, vocab_size=2000).model
    costs = layer_costs(model, 128)
    assert costs[-1] - costs[0] == 2000 * 32 and len(set(costs[:-1])) == 1
    first, last = balance(costs, 2)
    assert first[1] - first[0] > last[1] - last[0]
    windowed = layer_costs(tiny.build("window").model, 128)
    assert windowed[0] < windowed[1] - 97 * 32  # 7 positions seen instead of 64

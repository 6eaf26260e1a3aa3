"""Context parallel: who meets whom, by counting, and gradients on 2 and 4 processes."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

from gemel.train.parallel.context import Layout, Meeting, encounters
from tests import tiny
from tests.train import runs
from tests.train.parallel import ranks


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_gradients_are_those_of_one_process(num_ranks: int) -> None:
    ranks.start("tests.train.parallel.context_ranks", num_ranks)


@pytest.mark.parametrize("seed", range(40))
def test_every_query_meets_every_key_that_it_sees_once(seed: int) -> None:
    rng = random.Random(seed)
    length, num_ranks, window = rng.randint(3, 50), rng.choice([2, 3, 4]), rng.choice([None, 1, 5, 20])
    starts = (0, *sorted(rng.sample(range(1, length), rng.randint(0, 2))), length)
    layout = Layout.zigzag(starts, num_ranks)
    document = [number for number, (a, b) in enumerate(pairwise(starts)) for _ in range(a, b)]
    want = sorted((q, k) for q in range(length) for k in range(q + 1) if document[q] == document[k] and (window is None or q - k < window))
    got = []
    for rank in range(num_ranks):
        for source in range(num_ranks):
            q_places, k_places = layout.places(rank).tolist(), layout.places(source).tolist()
            for one in encounters(layout, rank, source, window):
                if isinstance(one, Meeting):
                    queries, keys = q_places[one.queries], k_places[one.keys]
                    assert queries[0] - keys[0] == one.distance
                    pairs = [(q, k) for q in queries for k in keys]
                else:
                    rows = q_places[one.rows]
                    pairs = [(q, k) for a, b in pairwise(one.starts) for q in rows[a:b] for k in rows[a:b] if k <= q]
                got += [(q, k) for q, k in pairs if window is None or q - k < window]
    assert sorted(got) == want


def test_a_zigzag_gives_every_rank_the_same_work() -> None:
    """Of one long document; even pieces would give the last of 4 ranks 7 times what the first has."""
    layout = Layout.zigzag((0, 512), 4)
    work = [sum(int(place) + 1 for place in layout.places(rank)) for rank in range(4)]
    assert len(set(work)) == 1


def test_parts_of_a_batch_are_the_batch() -> None:
    batch = runs.batch(*tiny.documents(9, 4, 17))
    layout = Layout.zigzag(batch.starts, 2)
    parts = [layout.part(batch, rank) for rank in range(2)]
    order = torch.cat([layout.places(rank) for rank in range(2)])
    for name in ("tokens_T", "positions_T", "targets_T", "weights_T"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name)[order])
    # documents are 0 to 8, 8 to 11 and 11 to 27; rank 0 has 0 to 6 and 20 to 27, rank 1 6 to 13 and 13 to 20
    assert parts[0].starts == (0, 6, 13) and parts[1].starts == (0, 2, 5, 7, 14)

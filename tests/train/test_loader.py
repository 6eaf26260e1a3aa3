"""The loader: what comes out depends on the recipe and the position alone, and every token of an epoch comes once."""

from __future__ import annotations

import json
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from gemel.config.errors import CheckpointError, ConfigError
from gemel.config.sources import BatchConfig, Packing
from gemel.data.shards import TokenShards
from gemel.train.batch import TRAINED, Batch
from gemel.train.documents import ConversationDocuments, ShardDocuments, hold_out
from gemel.train.loader import Loader, Prefetch, Source, Step, passage
from tests.data.test_shards import documents, write

LENGTH = 16


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardDocuments:
    folder = tmp_path_factory.mktemp("shards")
    for number, count in enumerate((30, 20)):
        write(folder / f"{number}.tokens", documents(count, seed=number))
    return ShardDocuments(TokenShards.open(folder))


def source(found: ShardDocuments, name: str = "a", packing: Packing = "cut", weight: float = 1.0) -> Source:
    return Source(name, found, packing, LENGTH, seed=3, weight=weight)


def loader(*sources: Source, tokens: int = 4 * LENGTH, micro: int | None = None, rank: int = 0, num_ranks: int = 1) -> Loader:
    return Loader(sources, BatchConfig(tokens=tokens, sequence=LENGTH, micro_tokens=micro), rank, num_ranks)


def same(left: Step, right: Step) -> bool:
    return left.position == right.position and len(left.batches) == len(right.batches) and all(map(equal, left.batches, right.batches))


def equal(left: Batch, right: Batch) -> bool:
    names = ("tokens_T", "positions_T", "targets_T", "weights_T")
    return left.starts == right.starts and all(torch.equal(getattr(left, name), getattr(right, name)) for name in names)


def pairs(batches: list[Batch]) -> list[tuple[int, int]]:
    return [pair for batch in batches for pair in zip(batch.tokens_T.tolist(), batch.targets_T.tolist(), strict=True)]


@pytest.mark.parametrize("packing", ["cut", "best_fit"])
def test_an_epoch_has_every_token_once(packing: Packing, shards: ShardDocuments) -> None:
    batches = list(passage(source(shards, packing=packing), BatchConfig(tokens=4 * LENGTH, sequence=LENGTH)))
    wanted = [pair for number in range(len(shards)) for pair in pairwise(shards[number].tolist())]
    assert sorted(pairs(batches)) == sorted(wanted)
    for batch in batches:
        assert batch.num_tokens == len(batch.tokens_T) and batch.weights_T.eq(1).all()
        for start, stop in pairwise(batch.starts):
            assert batch.positions_T[start:stop].tolist() == list(range(stop - start))
        assert batch.starts[0] == 0 and max(np.diff(batch.starts)) <= LENGTH


@pytest.mark.parametrize("packing", ["cut", "best_fit"])
def test_going_on_from_any_step_gives_the_same_steps(packing: Packing, shards: ShardDocuments) -> None:
    """Over several epochs, whose orders differ; the position survives JSON."""
    whole = list(islice(loader(source(shards, packing=packing)), 40))
    assert whole[-1].position["a"]["epoch"] > 1
    for number in (0, 1, 7, 29):
        again = loader(source(shards, packing=packing))
        again.seek(json.loads(json.dumps(whole[number].position)))
        assert all(map(same, islice(again, 10), whole[number + 1 :]))


def test_epochs_are_shuffled_anew(shards: ShardDocuments) -> None:
    one = source(shards)
    length = sum(1 for _ in one.epoch())
    first, second = (np.concatenate([next(one).inputs for _ in range(length)]).tolist() for _ in range(2))
    assert first != second and sorted(first) == sorted(second)


def test_a_long_document_does_not_fill_a_batch(tmp_path: Path) -> None:
    """One of half of all tokens, in eight steps of four sequences."""
    long, rest = 16 * LENGTH + 1, [2 * LENGTH + 1] * 8
    write(tmp_path / "0.tokens", [np.full(long, 1), *(np.full(size, 2) for size in rest)])
    found = ShardDocuments(TokenShards.open(tmp_path))
    counts = [
        sum(int(token == 1) for batch in step.batches for token in batch.tokens_T) // LENGTH for step in islice(loader(source(found)), 8)
    ]
    assert sum(counts) >= 14 and max(counts) < 4  # without shuffling three or four steps have nothing else


def test_micro_batches_and_ranks_only_cut(shards: ShardDocuments) -> None:
    whole = next(loader(source(shards)))
    halves = next(loader(source(shards), micro=2 * LENGTH))
    assert (len(whole.batches), len(halves.batches)) == (1, 2)
    assert pairs(list(whole.batches)) == pairs(list(halves.batches)) and whole.position == halves.position
    ranks = [next(loader(source(shards), micro=2 * LENGTH, rank=rank, num_ranks=2)) for rank in (0, 1)]
    assert all(equal(rank.batches[0], half) for rank, half in zip(ranks, halves.batches, strict=True))
    assert {rank.num_tokens for rank in ranks} == {whole.num_tokens}


def test_sources_get_their_shares(shards: ShardDocuments) -> None:
    mixed = loader(source(shards, "a", weight=3.0), source(shards, "b", packing="best_fit"))
    taken = [next(mixed).position for _ in range(30)]
    for position in taken[5:]:
        share = position["a"]["taken"] / (position["a"]["taken"] + position["b"]["taken"])
        assert abs(share - 0.75) * (position["a"]["taken"] + position["b"]["taken"]) <= LENGTH


def test_skipped_steps_are_those_that_would_have_come(shards: ShardDocuments) -> None:
    skipping, plain = loader(source(shards), source(shards, "b")), loader(source(shards), source(shards, "b"))
    skipping.skip(3)
    assert same(next(skipping), list(islice(plain, 4))[-1])


def test_prefetching_changes_nothing(shards: ShardDocuments) -> None:
    with Prefetch(loader(source(shards)), depth=3) as ahead:
        assert all(same(next(ahead), step) for step in islice(loader(source(shards)), 20))


def test_an_error_of_the_thread_comes_where_its_step_would(shards: ShardDocuments, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = loader(source(shards))
    steps = iter([next(loader(source(shards)))])
    monkeypatch.setattr(Loader, "__next__", lambda self: next(steps))
    with Prefetch(broken) as ahead:
        next(ahead)
        with pytest.raises(RuntimeError, match="StopIteration"):
            next(ahead)


def test_other_data_is_refused(shards: ShardDocuments, tmp_path: Path) -> None:
    position = next(loader(source(shards))).position
    write(tmp_path / "0.tokens", documents(30, seed=9))
    other = ShardDocuments(TokenShards.open(tmp_path))
    with pytest.raises(CheckpointError, match="a has changed"):
        loader(source(other)).seek(position)
    with pytest.raises(CheckpointError, match="trained on a, this run on b"):
        loader(source(shards, "b")).seek(position)


def test_what_is_held_out_is_not_trained(shards: ShardDocuments) -> None:
    kept, held = hold_out(shards, 0.2, seed=1)
    assert (len(kept), len(held)) == (40, 10)
    numbers = [{tuple(part[i].tolist()) for i in range(len(part))} for part in (kept, held)]
    assert numbers[0].isdisjoint(numbers[1]) and numbers[0] | numbers[1] == {tuple(x.tolist()) for x in (shards[i] for i in range(50))}
    assert len({kept.fingerprint, held.fingerprint, shards.fingerprint, hold_out(shards, 0.2, seed=2)[0].fingerprint}) == 4
    assert kept.lengths.tolist() == [len(kept[i]) for i in range(40)]


def test_marked_tokens_are_trained_and_no_others(tmp_path: Path) -> None:
    tokens = [np.array([5, 6, 7 | TRAINED, 8 | TRAINED], np.uint32), np.array([9, 1 | TRAINED], np.uint32)]
    assert ConversationDocuments.write(tmp_path, tokens) == 2
    found = ConversationDocuments(tmp_path)
    assert found.lengths.tolist() == [4, 2]
    (batch,) = passage(Source("a", found, "best_fit", LENGTH, seed=0), BatchConfig(tokens=LENGTH, sequence=LENGTH))
    assert batch.tokens_T.tolist() == [5, 6, 7, 9] and batch.targets_T.tolist() == [6, 7, 8, 1]
    assert batch.weights_T.tolist() == [0.0, 1.0, 1.0, 1.0] and batch.weight == 3.0
    assert batch.starts == (0, 3, 4)


def test_a_source_of_nothing_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "0.tokens", [np.array([], np.int64)])
    with pytest.raises(ConfigError, match="a holds nothing to train on"):
        source(ShardDocuments(TokenShards.open(tmp_path)))

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from gemel.config.errors import CheckpointError
from gemel.data.shards import ShardWriter, TokenShard, TokenShards, Vocabulary

SMALL, LARGE = Vocabulary("a" * 32, 1000, 7), Vocabulary("b" * 32, 150_000, 149_999)


def documents(count: int, vocabulary: Vocabulary = SMALL, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocabulary.size, rng.integers(0, 30)) for _ in range(count)]


def write(path: Path, documents: list[np.ndarray], vocabulary: Vocabulary = SMALL, batch: int = 3) -> Path:
    with path.open("wb") as file:
        writer = ShardWriter(file, vocabulary)
        for i in range(0, len(documents), batch):
            writer.write(documents[i : i + batch])
        writer.finish()
    return path


@pytest.mark.parametrize("vocabulary", [SMALL, LARGE])
def test_documents_come_back_with_their_ends(tmp_path: Path, vocabulary: Vocabulary) -> None:
    wrote = documents(50, vocabulary)
    shard = TokenShard(write(tmp_path / "a.tokens", wrote, vocabulary))
    assert [document.tolist() for document in shard] == [[*document.tolist(), vocabulary.end_of_document] for document in wrote]
    assert shard.header.num_documents == len(shard) == 50
    assert shard.header.num_tokens == len(shard.tokens) == sum(len(document) + 1 for document in wrote)
    assert shard.tokens.dtype == (np.uint16 if vocabulary is SMALL else np.uint32)
    assert shard[-1].tolist() == shard[49].tolist()
    assert [document.tolist() for document in shard[3:5]] == [shard[3].tolist(), shard[4].tolist()]
    shard.verify()


def test_the_beginning_of_a_file_is_raw_tokens(tmp_path: Path) -> None:
    wrote = documents(20)
    path = write(tmp_path / "a.tokens", wrote)
    want = [token for document in wrote for token in [*document.tolist(), 7]]
    assert np.fromfile(path, "<u2", len(want)).tolist() == want


def test_nothing_is_copied(tmp_path: Path) -> None:
    shards = TokenShards([write(tmp_path / "a.tokens", documents(20))])
    for array in (shards[5], shards.range(10, 40), shards.shards[0].starts):
        assert not array.flags.owndata
        assert not array.flags.writeable
        assert np.shares_memory(array, shards.shards[0]._bytes)


def test_the_file_depends_on_the_documents_alone(tmp_path: Path) -> None:
    one, other = (write(tmp_path / f"{batch}.tokens", documents(20), batch=batch) for batch in (1, 7))
    assert one.read_bytes() == other.read_bytes()


def test_several_shards_are_one(tmp_path: Path) -> None:
    parts = [documents(count, seed=count) for count in (9, 0, 1, 30)]
    for number, part in enumerate(parts):
        write(tmp_path / f"{number:06d}.tokens", part)
    shards = TokenShards.open(tmp_path)
    flat = [[*document.tolist(), 7] for part in parts for document in part]
    assert len(shards) == 40
    assert [document.tolist() for document in shards] == flat
    assert shards.lengths.tolist() == [len(document) for document in flat]
    tokens = [token for document in flat for token in document]
    assert shards.num_tokens == len(tokens)
    for start, stop in [(0, len(tokens)), (5, 5), (len(tokens), len(tokens)), (3, 200), (len(tokens) - 2, len(tokens))]:
        assert shards.range(start, stop).tolist() == tokens[start:stop]
    owners = [number for number, document in enumerate(flat) for _ in document]
    assert [shards.document_at(token) for token in range(len(tokens))] == owners
    with pytest.raises(IndexError):
        shards[40]
    with pytest.raises(IndexError):
        shards.range(0, len(tokens) + 1)


def test_order_is_a_permutation_that_seed_and_epoch_fix(tmp_path: Path) -> None:
    shards = TokenShards([write(tmp_path / "a.tokens", documents(100))])
    orders = [shards.order(seed, epoch).tolist() for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) == 3
    assert sorted(orders[0]) == list(range(100))


def test_an_empty_shard(tmp_path: Path) -> None:
    shard = TokenShard(write(tmp_path / "a.tokens", []))
    assert len(shard) == 0
    assert len(shard.tokens) == 0
    shard.verify()


def test_half_a_file_and_damage_are_noticed(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.tokens", documents(20)).read_bytes()
    path = tmp_path / "b.tokens"
    for size in (0, 7, 100, len(whole) - 9, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"b\.tokens"):
            TokenShard(path)
    path.write_bytes(whole[8:])
    with pytest.raises(CheckpointError, match="its header says otherwise"):
        TokenShard(path)
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(CheckpointError, match="checksum"):
        TokenShard(path).verify()
    path.write_bytes(whole)
    TokenShard(path).verify()
    with pytest.raises(CheckpointError, match="cannot map"):
        TokenShard(tmp_path / "absent.tokens")


def test_shards_of_different_tokenizers_are_not_mixed(tmp_path: Path) -> None:
    paths = [write(tmp_path / "a.tokens", documents(2)), write(tmp_path / "b.tokens", documents(2), LARGE)]
    with pytest.raises(CheckpointError, match="another tokenizer"):
        TokenShards(paths)
    with pytest.raises(CheckpointError, match=r"no \.tokens files"):
        TokenShards.open(tmp_path / "nowhere")


def test_ids_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    for bad in (1000, -1):
        with pytest.raises(ValueError, match="do not fit a vocabulary of 1000"):
            write(tmp_path / "a.tokens", [np.array([5, bad])])


def test_headers_are_plain_data(tmp_path: Path) -> None:
    header = TokenShard(write(tmp_path / "a.tokens", documents(2))).header
    assert pickle.loads(pickle.dumps(header)) == header

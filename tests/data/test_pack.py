from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import orjson
import pytest

from gemel.config.data.pipeline import Recipe
from gemel.config.errors import ConfigError
from gemel.data.document import Document
from gemel.data.pack import BestFit, Cut, Packed, TokensWriter, best_fit
from gemel.data.pipeline import Job
from gemel.data.shards import TokenShards
from gemel.tokenizer.tokenizer import Tokenizer
from tests.data.test_shards import SMALL, documents, write
from tests.tokenizer import shapes


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    folder = tmp_path_factory.mktemp("shards")
    for number, count in enumerate((40, 25)):
        write(folder / f"{number}.tokens", documents(count, seed=number))
    return TokenShards.open(folder)


def pairs(sequences: list[Packed]) -> list[tuple[int, int, int]]:
    """Every (document, input, target) of the sequences."""
    found = []
    for sequence in sequences:
        owners = np.repeat(sequence.documents, np.diff(sequence.starts, append=len(sequence.inputs)))
        found += list(zip(owners.tolist(), sequence.inputs.tolist(), sequence.targets.tolist(), strict=True))
    return found


def all_pairs(shards: TokenShards) -> list[tuple[int, int, int]]:
    return [(number, a, b) for number, tokens in enumerate(shards) for a, b in pairwise(tokens.tolist())]


@pytest.mark.parametrize("length", [1, 8, 29, 4096])
def test_cutting_trains_every_token_once(shards: TokenShards, length: int) -> None:
    cut = Cut(shards, length, seed=3)
    sequences = [cut[number] for number in range(len(cut))]
    assert sorted(pairs(sequences)) == sorted(all_pairs(shards))
    assert {len(sequence.inputs) for sequence in sequences[:-1]} <= {length}
    flat = [owner for owner, _, _ in pairs(sequences)]
    order = [number for number in shards.order(3).tolist() if shards.lengths[number] > 1]
    assert list(dict.fromkeys(flat)) == order  # documents in shuffled order, each in one run
    with pytest.raises(IndexError):
        cut[len(cut)]


@pytest.mark.parametrize("length", [1, 8, 29, 4096])
def test_best_fit_trains_every_token_once(shards: TokenShards, length: int) -> None:
    sequences = list(BestFit(shards, length, seed=3))
    assert sorted(pairs(sequences)) == sorted(all_pairs(shards))
    assert max(len(sequence.inputs) for sequence in sequences) <= length
    for sequence in sequences:  # a document that fits is whole
        for number, size in zip(sequence.documents, np.diff(sequence.starts, append=len(sequence.inputs)), strict=True):
            assert size == shards.lengths[number] - 1 or shards.lengths[number] - 1 > length


def test_sequences_can_be_taken_up_again(shards: TokenShards) -> None:
    whole = list(BestFit(shards, 40, seed=1).read(0))
    rest = list(BestFit(shards, 40, seed=1).read(0, start=5))
    assert pairs(rest) == pairs(whole[5:])
    assert pairs(whole) != pairs(list(BestFit(shards, 40, seed=1, epoch=1).read(0)))


def test_best_fit_by_hand() -> None:
    assert best_fit([3, 7, 5, 5, 2, 10], 10) == [[5], [1, 0], [2, 3], [4]]
    assert best_fit([4, 4, 6, 3, 3], 10) == [[2, 0], [1, 3, 4]]
    assert best_fit([], 10) == []


def test_best_fit_wastes_little() -> None:
    sizes = np.random.default_rng(0).integers(1, 1024, 5000).tolist()
    bins = best_fit(sizes, 1024)
    assert sorted(item for each in bins for item in each) == list(range(5000))
    assert all(sum(sizes[item] for item in each) <= 1024 for each in bins)
    assert len(bins) <= 11 / 9 * -(-sum(sizes) // 1024) + 1  # as first fit decreasing is proven to (Johnson 1973)


def test_a_length_of_nothing_is_refused(shards: TokenShards) -> None:
    for kind in (Cut, BestFit):
        with pytest.raises(ConfigError, match="at least 1"):
            kind(shards, 0, seed=0)


def test_the_writer_repeats_and_refuses(tmp_path: Path) -> None:
    writer = TokensWriter(tmp_path, "kept/000000", lambda texts: [np.array([ord(c) for c in text]) for text in texts], SMALL)
    bad = writer.write([Document("ab", "0", "s"), Document("\ud800", "1", "s"), Document("c", "2", "s", {"repeat": 3})])
    assert [(i, drop.reason) for i, drop in bad.items()] == [(1, "write.not_utf8")]
    files, num_tokens = writer.commit()
    [(name, entry)] = files.items()
    shards = TokenShards.open(tmp_path)
    assert [document.tolist() for document in shards] == [[97, 98, 7], *[[99, 7]] * 3]
    assert (name, entry.rows, num_tokens) == ("kept/000000.tokens", 4, 9)
    empty = TokensWriter(tmp_path, "kept/000001", lambda texts: [], SMALL)
    assert empty.commit() == ({}, 0)


def test_a_recipe_from_text_to_shards(tmp_path: Path) -> None:
    """Every corpus step in one recipe, by the executor on disk; what is written is what the tokenizer says of the documents that stay."""
    shapes.tokenizer().save(tmp_path / "tokenizer")
    story = "The quick brown fox jumps over the lazy dog and runs away from the hunters into the dark wood. "
    texts = [
        story,
        "A menu\n我们今天学习自然语言处理，内容很多，需要认真听讲。",
        story.upper(),
        story,
        "A menu\nSomething else that nobody has said.",
    ]
    rows = [{"text": text, "id": f"d{number}", "source": "s"} for number, text in enumerate(texts)]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(orjson.dumps(row) for row in rows))
    recipe = Recipe.parse(
        {
            "input": {"kind": "jsonl", "paths": [str(tmp_path / "in.jsonl")], "unit_bytes": 1024},
            "step": [
                {"kind": "exact"},
                {"kind": "minhash"},
                {"kind": "exact_parts", "by": "line", "min_chars": 1},
                {"kind": "lines", "min_documents": 2, "min_chars": 1},
                {"kind": "mix"},
            ],
            "output": {"kind": "tokens", "path": "unused", "tokenizer": str(tmp_path / "tokenizer"), "end_of_document": "</s>"},
        }
    )
    job = Job.begin(recipe, tmp_path / "out")
    for stage in job.stages:
        for index in job.missing(stage):
            job.perform(stage, index, lambda part: None)
    stats = job.finish()
    tokenizer = Tokenizer.load(tmp_path / "tokenizer")
    found = TokenShards.open(tmp_path / "out")
    want = [story, texts[1].removeprefix("A menu\n"), texts[4].removeprefix("A menu\n")]
    assert [tokenizer.decode(document[:-1].tolist()) for document in found] == want
    assert {int(document[-1]) for document in found} == {tokenizer.eos_id}
    assert stats.tokens == found.num_tokens


def test_the_end_of_document_must_be_a_special_token(tmp_path: Path) -> None:
    shapes.tokenizer().save(tmp_path)
    output = {"kind": "tokens", "path": "out", "tokenizer": str(tmp_path), "end_of_document": "<|nothing|>"}
    recipe = Recipe.parse({"input": {"kind": "package", "names": ["json"]}, "output": output})
    from gemel.data import build

    with pytest.raises(ConfigError, match=r"no special token .*</s>"):
        build.writer(recipe.output, tmp_path, 0)

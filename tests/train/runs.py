"""Tiny runs: documents in which the next token follows from the last two, a model that can learn that, and a recipe for both."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from gemel.config.train import TrainRecipe
from gemel.data.pack import Packed
from gemel.data.shards import ShardWriter, Vocabulary
from gemel.tokenizer.tokenizer import Tokenizer
from gemel.train.batch import Batch
from tests import tiny
from tests.tokenizer import shapes

SEQUENCE = 32


@cache
def tokenizer() -> Tokenizer:
    return shapes.tokenizer()


def shards(folder: Path, count: int = 60, seed: int = 0) -> Path:
    """Arithmetic sequences modulo 50, of 3 to 50 tokens."""
    rng = np.random.default_rng(seed)
    checksum = xxhash.xxh3_128_hexdigest(tokenizer().library.to_str().encode())
    vocabulary = Vocabulary(checksum, len(tokenizer().bytes_of), tokenizer().token_id("<|im_end|>") or 0)
    folder.mkdir(parents=True)
    with (folder / "0.tokens").open("wb") as file:
        writer = ShardWriter(file, vocabulary)
        writer.write([np.arange(n) * k % 50 for n, k in zip(rng.integers(3, 50, count), rng.integers(1, 9, count), strict=True)])
        writer.finish()
    return folder


def values(folder: Path, **changes: Any) -> dict[str, Any]:
    """A recipe as a TOML file would have it. A dot in a name of `changes` is spelt as two underscores."""
    for name in ("shards", "tokenizer"):
        if not (folder / name).exists():
            shards(folder / name) if name == "shards" else tokenizer().save(folder / name)
    config = tiny.CONFIGS["gqa"].model_copy(update={"vocab_size": len(tokenizer().bytes_of), "max_positions": 64, "tied_head": True})
    made: dict[str, Any] = {
        "out": str(folder / "out"),
        "steps": 8,
        "tokenizer": {"kind": "pretrained", "path": str(folder / "tokenizer")},
        "model": {"kind": "new", "config": config.model_dump()},
        "data": {"train": [{"kind": "shards", "path": str(folder / "shards")}]},
        "batch": {"tokens": 4 * SEQUENCE, "micro_tokens": 2 * SEQUENCE, "sequence": SEQUENCE},
        "optim": {"lr": 1e-2, "schedule": {"kind": "constant"}},
        "save": {"every": 4},
        "device": "cpu",
    }
    for name, value in changes.items():
        *outer, last = name.split("__")
        table = made
        for part in outer:
            table = table.setdefault(part, {})
        table[last] = value
    return made


def recipe(folder: Path, **changes: Any) -> TrainRecipe:
    return TrainRecipe.parse(values(folder, **changes))


def batch(*documents: list[int], trained: list[list[bool]] | None = None, places: list[int] | None = None) -> Batch:
    """Whole documents in one batch. `trained` is of the targets, `places` are those of the documents in their step."""
    sequences = [Packed(np.array(d[:-1]), np.array(d[1:]), np.array([0]), np.array([number])) for number, d in enumerate(documents)]
    made = Batch.of(sequences, [False] * len(sequences), places)
    if trained is not None:
        made.weights_T.copy_(torch.tensor([float(flag) for flags in trained for flag in flags]))
    return made

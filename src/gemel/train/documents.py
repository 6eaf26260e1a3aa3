"""Documents of every kind of source, as the loader wants them: numbered, with lengths, in an order for every epoch."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from gemel.data.shards import TokenShards
from gemel.train.loader import Documents


class ShardDocuments:
    """Token shards; all of them is trained."""

    marked = False

    def __init__(self, shards: TokenShards):
        self._shards = shards

    @property
    def fingerprint(self) -> str:
        """Of the shards' own checksums."""
        return xxhash.xxh3_128_hexdigest(" ".join(shard.header.xxh3 for shard in self._shards.shards).encode())

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Of each document, in tokens."""
        return self._shards.lengths

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, number: int, /) -> Any:
        return self._shards[number]

    def order(self, seed: int, epoch: int = 0) -> npt.NDArray[np.int64]:
        """All numbers shuffled."""
        return self._shards.order(seed, epoch)


class Part:
    """Some of the documents: what was held out of them, or what was not."""

    def __init__(self, documents: Documents, numbers: npt.NDArray[np.int64]):
        self._documents, self._numbers = documents, np.sort(numbers)
        self.marked = documents.marked

    @property
    def fingerprint(self) -> str:
        """Of the whole, and of which are here."""
        return xxhash.xxh3_128_hexdigest(self._documents.fingerprint.encode() + self._numbers.tobytes())

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Of each document, in tokens."""
        return self._documents.lengths[self._numbers]

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, number: int, /) -> Any:
        return self._documents[int(self._numbers[number])]

    def order(self, seed: int, epoch: int = 0) -> npt.NDArray[np.int64]:
        """All numbers shuffled."""
        return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(len(self))


def hold_out(documents: Documents, share: float, seed: int) -> tuple[Part, Part]:
    """Documents to train on, and at least one to validate on."""
    shuffled = np.random.Generator(np.random.PCG64([seed, 1 << 32])).permutation(len(documents))
    num_held = max(round(share * len(documents)), 1)
    return Part(documents, shuffled[num_held:]), Part(documents, shuffled[:num_held])

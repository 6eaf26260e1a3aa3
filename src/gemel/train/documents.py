"""Documents of every kind of source, as the loader wants them: numbered, with lengths, in an order for every epoch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from gemel.data.shards import TokenShards
from gemel.train.loader import Documents

HOLD_OUT = 1 << 32  # in place of an epoch that is never reached


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


class ConversationDocuments:
    """Conversations as token ids, mapped into memory; `batch.TRAINED` is set in those that are trained."""

    marked = True

    def __init__(self, folder: Path):
        self.fingerprint = (folder / "fingerprint").read_text()
        self._starts: npt.NDArray[np.int64] = np.load(folder / "starts.npy", mmap_mode="r")
        self._tokens: npt.NDArray[np.uint32] = np.memmap(folder / "tokens", np.dtype("<u4"), mode="r")

    @staticmethod
    def write(folder: Path, sequences: Iterable[npt.NDArray[np.uint32]]) -> int:
        """Write them into an empty folder, and return how many there were."""
        starts, checksum = [0], xxhash.xxh3_128()
        with (folder / "tokens").open("wb") as file:
            for tokens in sequences:
                data = tokens.astype("<u4").tobytes()
                checksum.update(data)
                file.write(data)
                starts.append(starts[-1] + len(tokens))
        np.save(folder / "starts.npy", np.array(starts))
        checksum.update(np.array(starts).tobytes())
        (folder / "fingerprint").write_text(checksum.hexdigest())
        return len(starts) - 1

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Of each document, in tokens."""
        return np.diff(self._starts)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, number: int, /) -> Any:
        return self._tokens[self._starts[number] : self._starts[number + 1]]

    def order(self, seed: int, epoch: int = 0) -> npt.NDArray[np.int64]:
        """All numbers shuffled."""
        return shuffled(len(self), seed, epoch)


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
        return shuffled(len(self), seed, epoch)


def hold_out(documents: Documents, share: float, seed: int) -> tuple[Part, Part]:
    """Documents to train on, and at least one to validate on."""
    numbers = shuffled(len(documents), seed, HOLD_OUT)
    num_held = max(round(share * len(documents)), 1)
    return Part(documents, numbers[num_held:]), Part(documents, numbers[:num_held])


def shuffled(num: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Numbers below `num`, as token shards shuffle theirs."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num)

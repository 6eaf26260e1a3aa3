"""Token shards: the corpus as the trainer reads it, mapped into memory.

A file is, in this order: all tokens, little-endian, uint16 if the vocabulary allows it and else uint32; zeros up to a multiple of 8; the
index, a uint64 for where each document starts, counted in tokens, and one for where the last ends; a header in JSON; its length in bytes
as a uint64; eight bytes that name the format. The header comes last so that the file can be written as a stream, and so that half a file
is not mistaken for a whole one. Tokens come first so that whoever knows nothing of all this can still map them.

Every document ends with the end-of-document token. Nothing is cut or padded: that is decided when the tokens are read (`gemel.data.pack`).
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import xxhash

from gemel.config.errors import CheckpointError

SUFFIX = ".tokens"
Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
Index = npt.NDArray[np.uint64]

_MAGIC = b"gemeltok"
_VERSION = 1
_ALIGN = 8


class Output(Protocol):
    """A binary stream: `gemel.data.manifest.Shard`, or an open file."""

    def write(self, data: Any) -> int:
        """Append bytes."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What token ids mean: shards can be read together only if this is the same.

    tokenizer        xxHash3 (128 bits, hexadecimal) of tokenizer.json as it was loaded and written out again
    size             ids are below
    end_of_document  id of the token that ends every document
    """

    tokenizer: str
    size: int
    end_of_document: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """The narrowest integers that hold every id."""
        return np.dtype("<u2" if self.size <= 1 << 16 else "<u4")


@dataclass(frozen=True, slots=True)
class Header:
    """What a shard says about itself. `xxh3` is the hash (128 bits, hexadecimal) of everything before the header."""

    vocabulary: Vocabulary
    num_tokens: int
    num_documents: int
    xxh3: str
    version: int = _VERSION


class ShardWriter:
    """Writes one shard to a stream. Needs memory for the index only: 8 bytes a document."""

    def __init__(self, output: Output, vocabulary: Vocabulary):
        self._output, self._vocabulary = output, vocabulary
        self._hash = xxhash.xxh3_128()
        self._starts = array("Q", [0])

    @property
    def num_tokens(self) -> int:
        """So far, ends of documents counted."""
        return self._starts[-1]

    @property
    def num_documents(self) -> int:
        """So far."""
        return len(self._starts) - 1

    def write(self, documents: Sequence[npt.NDArray[Any]]) -> None:
        """Append documents, each with its end. Raises ValueError for an id that the vocabulary does not have."""
        if not documents:
            return
        vocabulary = self._vocabulary
        end = np.array([vocabulary.end_of_document])
        tokens = np.concatenate([part for document in documents for part in (document, end)])
        if tokens.max() >= vocabulary.size or tokens.min() < 0:
            raise ValueError(f"token ids from {tokens.min()} to {tokens.max()} do not fit a vocabulary of {vocabulary.size}")
        for document in documents:
            self._starts.append(self._starts[-1] + len(document) + 1)
        self._append(tokens.astype(vocabulary.dtype))

    def finish(self) -> Header:
        """Write what follows the tokens; the stream is the caller's to close."""
        self._append(np.zeros(-self.num_tokens * self._vocabulary.dtype.itemsize % _ALIGN, np.uint8))
        self._append(np.frombuffer(self._starts, np.uint64).astype("<u8"))
        header = Header(self._vocabulary, self.num_tokens, self.num_documents, self._hash.hexdigest())
        data = json.dumps(asdict(header), sort_keys=True).encode()
        self._output.write(data + len(data).to_bytes(8, "little") + _MAGIC)
        return header

    def _append(self, values: npt.NDArray[Any]) -> None:
        data = values.tobytes()
        self._hash.update(data)
        self._output.write(data)


class TokenShard(Sequence[Tokens]):
    """One file, mapped: a sequence of documents, each a view of the mapping. Raises CheckpointError if it is not a whole shard.

    tokens  all of them, one document after the other
    starts  where documents start in `tokens`; one more than there are documents
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._bytes = np.memmap(path, np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot map {path}: {error}") from None
        self.header, end = self._read_header()
        num_bytes = self.header.num_tokens * self.header.vocabulary.dtype.itemsize
        index = num_bytes + -num_bytes % _ALIGN
        if index + 8 * (self.header.num_documents + 1) != end:
            raise CheckpointError(f"{path} has {end} bytes of tokens and index, its header says otherwise; write it anew")
        self.tokens: Tokens = self._bytes[:num_bytes].view(self.header.vocabulary.dtype)
        self.starts: Index = self._bytes[index:end].view("<u8")

    def _read_header(self) -> tuple[Header, int]:
        """The header, and where it starts."""
        size = len(self._bytes)
        if size < 16 or self._bytes[-8:].tobytes() != _MAGIC:
            raise CheckpointError(f"{self.path} is no token shard, or not all of one; write it anew with output.kind = 'tokens'")
        start = size - 16 - int.from_bytes(self._bytes[-16:-8].tobytes(), "little")
        try:
            values = json.loads(self._bytes[max(start, 0) : -16].tobytes())
            header = Header(**{**values, "vocabulary": Vocabulary(**values["vocabulary"])})
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"the header of {self.path} cannot be read: {error!r}; perhaps a newer gemel wrote it") from None
        if header.version != _VERSION:
            raise CheckpointError(f"{self.path} is of version {header.version}, this gemel reads version {_VERSION}; write it anew")
        return header, start

    def __len__(self) -> int:
        return self.header.num_documents

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(f"{self.path} has {len(self)} documents, not one with number {number}")
        number %= len(self)
        return self.tokens[self.starts[number] : self.starts[number + 1]]

    def verify(self) -> None:
        """Read everything, and raise CheckpointError if the file is not as it was written."""
        end = len(self._bytes) - 16 - int.from_bytes(self._bytes[-16:-8].tobytes(), "little")
        if xxhash.xxh3_128_hexdigest(self._bytes[:end].data) != self.header.xxh3:
            raise CheckpointError(f"{self.path} is damaged: its checksum is not that of its header; write it anew")


class TokenShards(Sequence[Tokens]):
    """Several shards as one sequence of documents, in the given order. Raises CheckpointError if their tokens differ in meaning."""

    def __init__(self, paths: Iterable[Path]):
        self.shards = tuple(TokenShard(path) for path in paths)
        if not self.shards:
            raise CheckpointError("no token shards were given; write some with output.kind = 'tokens'")
        self.vocabulary = self.shards[0].header.vocabulary
        for shard in self.shards:
            if shard.header.vocabulary != self.vocabulary:
                raise CheckpointError(
                    f"{shard.path} was written with another tokenizer than {self.shards[0].path} "
                    f"({shard.header.vocabulary} and {self.vocabulary}); read them apart, or write one of them anew"
                )
        self._first_documents = np.cumsum([0, *map(len, self.shards)])
        self._first_tokens = np.cumsum([0, *(shard.header.num_tokens for shard in self.shards)])

    @classmethod
    def open(cls, folder: Path) -> Self:
        """All shards of a folder and the folders in it."""
        paths = sorted(folder.rglob(f"*{SUFFIX}"))
        if not paths:
            raise CheckpointError(f"there are no {SUFFIX} files in {folder}; write some with output.kind = 'tokens'")
        return cls(paths)

    @property
    def num_tokens(self) -> int:
        """Of all shards."""
        return int(self._first_tokens[-1])

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """How many tokens each document has, its end counted. Takes 8 bytes a document."""
        return np.concatenate([np.diff(shard.starts.astype(np.int64)) for shard in self.shards])

    def __len__(self) -> int:
        return int(self._first_documents[-1])

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(f"there are {len(self)} documents, not one with number {number}")
        number %= len(self)
        shard = int(np.searchsorted(self._first_documents, number, side="right")) - 1
        return self.shards[shard][int(number - self._first_documents[shard])]

    def range(self, start: int, stop: int) -> Tokens:
        """Tokens `start` to `stop` of all, as if they were one array: a view where one shard has them, else a copy."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start} to {stop} of {self.num_tokens}")
        parts = [shard.tokens[max(start - first, 0) : max(stop - first, 0)] for shard, first in self._overlap(start, stop)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.zeros(0, self.vocabulary.dtype)])

    def _overlap(self, start: int, stop: int) -> Iterator[tuple[TokenShard, int]]:
        for shard, (first, last) in zip(self.shards, pairwise(self._first_tokens.tolist()), strict=True):
            if first < stop and start < last:
                yield shard, first

    def document_at(self, token: int) -> int:
        """The number of the document that a token is in."""
        if not 0 <= token < self.num_tokens:
            raise IndexError(f"token {token} of {self.num_tokens}")
        shard = int(np.searchsorted(self._first_tokens, token, side="right")) - 1
        inside = np.searchsorted(self.shards[shard].starts, np.uint64(token - self._first_tokens[shard]), side="right") - 1
        return int(self._first_documents[shard] + inside)

    def order(self, seed: int, epoch: int = 0) -> npt.NDArray[np.int64]:
        """All documents shuffled: the same for the same seed and epoch, everywhere."""
        return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(len(self))

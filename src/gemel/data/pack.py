"""Between text, token shards and training sequences: the pipeline's writer of tokens, and the two ways to read them in sequences.

A sequence is flat: documents stand one after the other, `starts` says where, and there is no padding; the model's attention keeps them
apart. Each document of n tokens gives n - 1 positions, whose inputs are all its tokens but the last and whose targets all but the first.
So every target is predicted from its own document, every position trains, and where a sequence ends nothing is lost or seen twice.

Cut lets documents run on from one sequence into the next: all sequences but the last are full, and documents are cut where it happens.
BestFit puts documents whole into sequences where they fit (Ding et al. 2024, "Fewer Truncations Improve Language Modeling"): only those
longer than a sequence are cut, and sequences are nearly full.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from gemel.config.data.pipeline import TokensOutput
from gemel.config.errors import ConfigError
from gemel.data.document import Document, Dropped
from gemel.data.manifest import Entry, Shard
from gemel.data.shards import SUFFIX, ShardWriter, Vocabulary

Encode = Callable[[Sequence[str]], Sequence[npt.NDArray[Any]]]


class Documents(Protocol):
    """What is packed: token shards, or anything else that is a number of documents."""

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Of each document, in tokens."""

    def __getitem__(self, number: int, /) -> Any:
        """The tokens of one."""

    def order(self, seed: int, epoch: int = 0) -> npt.NDArray[np.int64]:
        """All numbers shuffled, the same for the same seed and epoch."""


Ids = npt.NDArray[np.int64]

_WINDOW = 1 << 16  # pieces that BestFit looks at together: more would fill sequences no better, and take longer to begin


@lru_cache(maxsize=1)
def load(config: TokensOutput) -> tuple[Encode, Vocabulary]:
    """The tokenizer of a recipe: what encodes texts, and what its ids mean. Raises ConfigError if it lacks the end of document."""
    from gemel.tokenizer.encode import Encoder
    from gemel.tokenizer.tokenizer import Tokenizer

    path = config.tokenizer.parent if config.tokenizer.name == "tokenizer.json" else config.tokenizer
    tokenizer = Tokenizer.load(path)
    end = tokenizer.token_id(config.end_of_document)
    if end is None or end not in tokenizer.special_ids:
        special = ", ".join(sorted(str(tokenizer.library.id_to_token(token)) for token in tokenizer.special_ids)[:20])
        raise ConfigError(f"end_of_document = {config.end_of_document!r} is no special token of {path}; these are: {special or 'none'}")
    checksum = xxhash.xxh3_128_hexdigest(tokenizer.library.to_str().encode())
    return Encoder(tokenizer), Vocabulary(checksum, len(tokenizer.bytes_of), end)


class TokensWriter:
    """The pipeline's writer: a unit of work becomes one shard. A document is written as often as its `metadata.repeat` says."""

    def __init__(self, output: Path, name: str, encode: Encode, vocabulary: Vocabulary):
        self._output, self._name = output, name + SUFFIX
        self._encode, self._vocabulary = encode, vocabulary
        self._open: tuple[Shard, ShardWriter] | None = None

    def write(self, documents: Sequence[Document]) -> dict[int, Dropped]:
        """Take documents; those that cannot be encoded come back, by their index."""
        bad = {i: _unwritable(document) for i, document in enumerate(documents) if not _is_unicode(document.text)}
        good = [document for i, document in enumerate(documents) if i not in bad]
        if good:
            tokens = self._encode([document.text for document in good])
            if self._open is None:
                shard = Shard(self._output, self._name)
                self._open = shard, ShardWriter(shard, self._vocabulary)
            self._open[1].write(
                [ids for document, ids in zip(good, tokens, strict=True) for _ in range(document.metadata.get("repeat", 1))]
            )
        return bad

    def commit(self) -> tuple[dict[str, Entry], int | None]:
        """The shard and its number of tokens; no file if nothing was written."""
        if self._open is None:
            return {}, 0
        shard, writer = self._open
        header = writer.finish()
        return {self._name: shard.commit(header.num_documents)}, header.num_tokens

    def abandon(self) -> None:
        """Leave no trace."""
        if self._open is not None:
            self._open[0].abandon()


def _is_unicode(text: str) -> bool:
    try:
        return text.isascii() or text.encode() is not None
    except UnicodeEncodeError:
        return False


def _unwritable(document: Document) -> Dropped:
    document.text = document.text.encode("utf-8", "backslashreplace").decode()
    return Dropped(document, "write.not_utf8", "the text holds lone surrogates")


@dataclass(frozen=True, slots=True)
class Packed:
    """One training sequence.

    inputs     token ids
    targets    the token that follows each, in its document
    starts     where documents, or parts of them, start in `inputs`; the first is 0
    documents  their numbers in the shards
    """

    inputs: Ids
    targets: Ids
    starts: Ids
    documents: Ids


class Cut:
    """All documents in shuffled order, cut every `length` positions. Sequence i can be read at once: nothing before it needs to be."""

    def __init__(self, shards: Documents, length: int, seed: int, epoch: int = 0):
        self._shards, self._length = shards, _checked(length)
        self._order = shards.order(seed, epoch)
        self._ends = np.cumsum(shards.lengths[self._order] - 1)

    def __len__(self) -> int:
        return -(-int(self._ends[-1] if len(self._ends) else 0) // self._length)

    def __getitem__(self, number: int) -> Packed:
        if not 0 <= number < len(self):
            raise IndexError(f"there are {len(self)} sequences, not one with number {number}")
        start, stop = number * self._length, min((number + 1) * self._length, int(self._ends[-1]))
        first, last = np.searchsorted(self._ends, [start, stop - 1], side="right").tolist()
        pieces = []
        for i in range(first, last + 1):
            begin = int(self._ends[i - 1]) if i else 0
            inner = max(start - begin, 0)
            size = min(stop, int(self._ends[i])) - begin - inner
            if size:
                pieces.append((int(self._order[i]), inner, size))
        return _pack(self._shards, pieces)


class BestFit:
    """Documents put whole into sequences of at most `length` positions; longer ones in pieces of `length` and a rest.

    Documents are taken in shuffled order, `_WINDOW` at a time, and the sequences of a window are shuffled. `read(window)` gives those of
    one window, so a run that was stopped goes on by window and number within it.
    """

    def __init__(self, shards: Documents, length: int, seed: int, epoch: int = 0):
        self._shards, self._length = shards, _checked(length)
        self._seed, self._epoch = seed, epoch
        self._order = shards.order(seed, epoch)

    @property
    def num_windows(self) -> int:
        """How many windows there are."""
        return -(-len(self._order) // _WINDOW)

    def __iter__(self) -> Iterator[Packed]:
        for window in range(self.num_windows):
            yield from self.read(window)

    def read(self, window: int, start: int = 0) -> Iterator[Packed]:
        """The sequences of a window, from number `start`."""
        pieces = []
        for document in self._order[window * _WINDOW : (window + 1) * _WINDOW].tolist():
            positions = int(self._shards.lengths[document]) - 1
            pieces += [(document, inner, min(self._length, positions - inner)) for inner in range(0, positions, self._length)]
        sequences = best_fit([size for _, _, size in pieces], self._length)
        rng = np.random.Generator(np.random.PCG64([self._seed, self._epoch, window]))
        for i in rng.permutation(len(sequences))[start:].tolist():
            yield _pack(self._shards, [pieces[piece] for piece in sequences[i]])


def best_fit(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Items to bins of `room`: the largest first, each into the fullest bin that has room for it. The numbers of each bin's items."""
    bins: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # bins by the room that is left in them
    rooms: list[int] = []  # its keys, sorted
    for item in sorted(range(len(sizes)), key=partial(_larger_first, sizes)):
        at = bisect_left(rooms, sizes[item])
        if at == len(rooms):
            chosen, left = len(bins), room
            bins.append([])
        else:
            left = rooms[at]
            chosen = by_room[left].pop()
            if not by_room[left]:
                del by_room[left], rooms[at]
        bins[chosen].append(item)
        left -= sizes[item]
        if left:
            if left not in by_room:
                by_room[left] = []
                insort(rooms, left)
            by_room[left].append(chosen)
    return bins


def _larger_first(sizes: Sequence[int], item: int) -> int:
    return -sizes[item]


def _pack(shards: Documents, pieces: Sequence[tuple[int, int, int]]) -> Packed:
    """Pieces (document, first position, number of positions) as one sequence."""
    starts = np.cumsum([0, *(size for _, _, size in pieces)])
    inputs, targets = np.empty(starts[-1], np.int64), np.empty(starts[-1], np.int64)
    for (document, inner, size), (start, stop) in zip(pieces, pairwise(starts.tolist()), strict=True):
        tokens = shards[document]
        inputs[start:stop] = tokens[inner : inner + size]
        targets[start:stop] = tokens[inner + 1 : inner + size + 1]
    return Packed(inputs, targets, starts[:-1], np.array([document for document, _, _ in pieces]))


def _checked(length: int) -> int:
    if length < 1:
        raise ConfigError(f"sequences of {length} positions cannot be packed; give a length of at least 1")
    return length

"""From documents to the batches of every step, endlessly, and from any step on again.

A source is documents packed into sequences, epoch after epoch, each epoch in another order. A mixture takes every sequence from the source
that lags furthest behind its share. A loader cuts what the mixture gives into steps of a fixed number of sequences, and these into
micro-batches. None of this draws random numbers as it goes: where a source stands is three integers, and they are all that a checkpoint
needs. They do not depend on micro-batches or on the number of ranks, so a run may go on with others.

A thread prepares steps ahead. It is the only one that reads, so the order is what it would be without it; a step carries the position
behind it, so what is prepared and not trained counts as not read.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from gemel.config.errors import CheckpointError, ConfigError
from gemel.config.sources import BatchConfig, Packing
from gemel.data import pack
from gemel.data.pack import BestFit, Cut, Packed
from gemel.train.batch import Batch

Json = dict[str, Any]


class Documents(pack.Documents, Protocol):
    """What a source is made of."""

    @property
    def fingerprint(self) -> str:
        """Changes when the documents do."""

    @property
    def marked(self) -> bool:
        """Whether `batch.TRAINED` tells which tokens are trained; else all are."""

    def __len__(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Position:
    """Where a source stands: sequence `number` of a window (best_fit; 0 of cut) of an epoch, and the tokens that it gave so far."""

    epoch: int = 0
    window: int = 0
    number: int = 0
    taken: int = 0


class Source:
    """The sequences of some documents, without end."""

    def __init__(self, name: str, documents: Documents, packing: Packing, length: int, seed: int, weight: float = 1.0):
        if not len(documents) or int(documents.lengths.max()) < 2:
            raise ConfigError(f"{name} holds nothing to train on: it needs a document of at least 2 tokens")
        self.name, self.documents, self.weight = name, documents, weight
        self._packing, self._length, self._seed = packing, length, seed
        self.position = Position()
        self._ahead = self._from(self.position)

    def __next__(self) -> Packed:
        self.position, sequence = next(self._ahead)
        return sequence

    def seek(self, position: Position) -> None:
        """Go on from there."""
        self.position = position
        self._ahead = self._from(position)

    def epoch(self) -> Iterator[Packed]:
        """All sequences of the first epoch, once."""
        return (sequence for position, sequence in self._epoch(Position()))

    def _from(self, position: Position) -> Iterator[tuple[Position, Packed]]:
        while True:
            for reached, sequence in self._epoch(position):
                position = reached
                yield reached, sequence
            position = Position(position.epoch + 1, taken=position.taken)

    def _epoch(self, start: Position) -> Iterator[tuple[Position, Packed]]:
        """The rest of an epoch: sequences, each with the position behind it."""
        taken = start.taken
        for window, number, sequence in self._packed(start):
            taken += len(sequence.inputs)
            yield Position(start.epoch, window, number + 1, taken), sequence

    def _packed(self, start: Position) -> Iterator[tuple[int, int, Packed]]:
        if self._packing == "cut":
            cut = Cut(self.documents, self._length, self._seed, start.epoch)
            # Pieces of one long document must not fill a batch: what a step learns would be about that document.
            order = np.random.default_rng([self._seed, start.epoch]).permutation(len(cut))
            for number in range(start.number, len(cut)):
                yield 0, number, cut[int(order[number])]
            return
        best = BestFit(self.documents, self._length, self._seed, start.epoch)
        for window in range(start.window, best.num_windows):
            first = start.number if window == start.window else 0
            for number, sequence in enumerate(best.read(window, first), first):
                yield window, number, sequence


@dataclass(frozen=True, slots=True)
class Step:
    """What one step of the optimizer learns from, and where the loader stands behind it. `shares` are tokens by source."""

    batches: tuple[Batch, ...]
    position: Json
    num_tokens: int


class Loader:
    """Steps from a mixture of sources. A rank of several gets its part of each step: so many of the sequences, in their order."""

    def __init__(self, sources: Sequence[Source], config: BatchConfig, rank: int = 0, num_ranks: int = 1):
        self._sources, self._config = tuple(sources), config
        self._rank, self._num_ranks = rank, num_ranks

    @property
    def position(self) -> Json:
        """Plain JSON: of each source where it stands, and the fingerprint of what it stands in."""
        return {
            source.name: {
                "fingerprint": source.documents.fingerprint,
                "epoch": source.position.epoch,
                "window": source.position.window,
                "number": source.position.number,
                "taken": source.position.taken,
            }
            for source in self._sources
        }

    def seek(self, position: Json) -> None:
        """Go on from there. Raises CheckpointError if it is of other data."""
        names = [source.name for source in self._sources]
        if sorted(position) != sorted(names):
            raise CheckpointError(f"the checkpoint was trained on {', '.join(position)}, this run on {', '.join(names)}")
        for source in self._sources:
            stored = dict(position[source.name])
            if stored.pop("fingerprint") != source.documents.fingerprint:
                raise CheckpointError(
                    f"{source.name} has changed since the checkpoint was written; train into another folder, or restore it"
                )
            source.seek(Position(**stored))

    def __iter__(self) -> Iterator[Step]:
        while True:
            yield next(self)

    def __next__(self) -> Step:
        picked = [self._pick() for _ in range(self._config.sequences)]
        count, size = len(picked) // self._num_ranks, self._config.micro_sequences
        own = picked[self._rank * count : (self._rank + 1) * count]
        groups = [own[i : i + size] for i in range(0, count, size)]
        batches = tuple(Batch.of([sequence for _, sequence in group], [source.documents.marked for source, _ in group]) for group in groups)
        return Step(batches, self.position, sum(len(sequence.inputs) for _, sequence in picked))

    def skip(self, num_steps: int) -> None:
        """Pass over so many steps."""
        for _ in range(num_steps * self._config.sequences):
            self._pick()

    def _pick(self) -> tuple[Source, Packed]:
        """The next sequence, from the source that has given least of what it should; the first of equals."""
        source = min(self._sources, key=lambda source: source.position.taken / source.weight)
        return source, next(source)


def passage(source: Source, config: BatchConfig, max_tokens: int | None = None) -> Iterator[Batch]:
    """Micro-batches of a source's first epoch, or of its first sequences of at most `max_tokens` (but at least one); always the same."""
    sequences = source.epoch() if max_tokens is None else islice(source.epoch(), max(max_tokens // config.sequence, 1))
    while group := list(islice(sequences, config.micro_sequences)):
        yield Batch.of(group, [source.documents.marked] * len(group))


class Prefetch:
    """Steps of a loader, prepared ahead by a thread. An error of the thread is raised where its step would have come."""

    def __init__(self, loader: Loader, depth: int = 2, pin: bool = False):
        self._loader, self._pin = loader, pin
        self._ready: queue.Queue[Step | BaseException] = queue.Queue(depth)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="loader", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._closing.set()
        while self._thread.is_alive():
            with_nothing_left(self._ready)
            self._thread.join(0.01)

    def __next__(self) -> Step:
        found = self._ready.get()
        if isinstance(found, BaseException):
            raise found
        return found

    def _work(self) -> None:
        try:
            for step in self._loader:
                self._ready.put(Step(tuple(b.pinned() for b in step.batches), step.position, step.num_tokens) if self._pin else step)
                if self._closing.is_set():
                    return
        except BaseException as error:
            self._ready.put(error)


def with_nothing_left(waiting: queue.Queue[Any]) -> None:
    """Empty a queue, so that who puts into it need not wait."""
    while True:
        try:
            waiting.get_nowait()
        except queue.Empty:
            return

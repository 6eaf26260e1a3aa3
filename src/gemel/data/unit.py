"""One unit of work through one pass: documents in, kept and dropped documents out, and figures that add up.

Steps see batches, for speed. If one raises, its batch is taken again from where it was, one document at a time, so that the document at
fault is found and dropped with the error as its detail, and costs nobody else anything. A step that fails on most of a unit is broken
itself, and ends the run.
"""

from __future__ import annotations

import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gemel.config.errors import GemelError
from gemel.data import spill
from gemel.data.document import Document, Dropped
from gemel.data.manifest import Entry, Record
from gemel.data.read.reader import Piece, Reader, Reading
from gemel.data.shuffle import UNIT_BITS, KeyWriter
from gemel.data.stats import Stats
from gemel.data.step import CorpusStep, Places
from gemel.data.write import DroppedWriter, Writer

BATCH_DOCUMENTS = 512
BATCH_CHARS = 2**22
MOST_FAILED = 0.5  # of a unit's documents
FEW_FAILED = 10  # so many failures are always the documents' fault

Answer = Callable[[Sequence[Document], Places], Iterable[Document | Dropped]]
Batch = tuple[list[Document], Places, float]  # the last is the part of the unit that has been read
Progress = Callable[[float], None]


class BrokenStep(RuntimeError):
    """A step that does not keep its contract, or fails on most documents."""


FATAL = (GemelError, ImportError, MemoryError, BrokenStep)  # not a document's fault


@dataclass(frozen=True, slots=True)
class Call:
    """A step of the recipe in this pass. `number` counts from 1; 0 is reading."""

    number: int
    name: str
    answer: Answer


@dataclass(slots=True)
class Outcome:
    """What became of a batch: who was kept, who was dropped by which step, and what came to each step (documents, characters)."""

    kept: list[Document]
    places: Places
    dropped: list[tuple[int, Dropped]] = field(default_factory=list)
    taken: list[tuple[int, int, int]] = field(default_factory=list)


class Source:
    """Where a pass gets its documents: from the input, or from the pass before."""

    def __init__(self, unit: int):
        self.unit = unit
        self.dropped: list[Dropped] = []  # by the reader, since they were last fetched
        self.reading = Reading()

    def stored(self, path: Path) -> Iterator[Batch]:
        """Documents that the pass before has put there."""
        yield from spill.read(path)

    def fresh(self, reader: Reader, pieces: Sequence[Piece]) -> Iterator[Batch]:
        """Documents of the input, in batches. What cannot be read gets a place as well, so places do not depend on reasons."""
        weight = max(sum(piece.weight_bytes for piece in pieces), 1)
        documents: list[Document] = []
        numbers: list[int] = []
        number = chars = 0
        for piece in pieces:
            for item in reader.read(piece, self.reading):
                if isinstance(item, Dropped):
                    self.dropped.append(item)
                    chars += len(item.document.text)
                else:
                    documents.append(item)
                    numbers.append(number)
                    chars += len(item.text)
                number += 1
                if chars >= BATCH_CHARS or len(documents) + len(self.dropped) >= BATCH_DOCUMENTS:
                    yield documents, self._places(numbers), min(self.reading.num_bytes / weight, 1.0)
                    documents, numbers, chars = [], [], 0
        assert number < 2**UNIT_BITS, f"unit {self.unit} has {number} documents; set a smaller unit_bytes"
        if documents or self.dropped:
            yield documents, self._places(numbers), 1.0

    def _places(self, numbers: list[int]) -> Places:
        return np.array(numbers, np.uint64) + np.uint64(self.unit << UNIT_BITS)


@dataclass(frozen=True, slots=True)
class PassedOn:
    """What a pass leaves for a step that compares documents: the documents, and their keys."""

    stored: spill.SpillWriter
    keys: KeyWriter
    step: CorpusStep
    name: str


class Sink:
    """Where a pass puts its documents. Exactly one of `writer` (the last pass) and `passed_on` (to the step that it names) is there."""

    def __init__(self, dropped: DroppedWriter, writer: Writer | None, passed_on: PassedOn | None):
        assert (writer is None) != (passed_on is None)
        self._dropped, self._writer, self._passed_on = dropped, writer, passed_on
        self.seconds: defaultdict[str, float] = defaultdict(float)  # for making keys, which belong to the step that wants them

    def keep(self, documents: Sequence[Document], places: Places) -> Mapping[int, Dropped]:
        """Take what all steps have kept; what cannot be written comes back, by its index."""
        if not documents:
            return {}
        if self._writer is not None:
            return self._writer.write(documents)
        assert self._passed_on is not None
        began = time.perf_counter()
        keys = self._passed_on.step.keys(documents, places)
        self.seconds[self._passed_on.name] += time.perf_counter() - began
        self._passed_on.keys.write(keys)
        self._passed_on.stored.write(documents, places)
        return {}

    def drop(self, step: str, dropped: Sequence[Dropped]) -> None:
        """Take what a step has dropped."""
        self._dropped.write(step, dropped)

    def commit(self) -> tuple[dict[str, Entry], int | None]:
        """Finish all files: their entries and, if the output is made of tokens, how many."""
        entries = self._dropped.commit()
        if self._writer is not None:
            written, tokens = self._writer.commit()
            return {**entries, **written}, tokens
        assert self._passed_on is not None
        return {**entries, **self._passed_on.stored.commit(), **self._passed_on.keys.commit()}, None

    def abandon(self) -> None:
        """Leave no trace of any."""
        self._dropped.abandon()
        if self._writer is not None:
            self._writer.abandon()
        if self._passed_on is not None:
            self._passed_on.stored.abandon()
            self._passed_on.keys.abandon()


class UnitPass:
    """The state of one unit in one pass. `names` are the recipe's steps, reading first and writing last."""

    def __init__(self, names: Sequence[str], calls: Sequence[Call], source: Source, sink: Sink):
        self._names, self._calls, self._source, self._sink = names, calls, source, sink
        self._stats = Stats.empty(names)
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._failed: Counter[int] = Counter()
        self._first_failure: dict[int, Dropped] = {}
        self._at = 0  # the call that is being made, for blaming it

    def run(self, batches: Iterator[Batch], first: bool, last: bool, progress: Progress) -> Record:
        """Everything. `first` if the documents come from the input, `last` if they go to the output."""
        try:
            self._run(batches, first, last, progress)
            began = time.perf_counter()
            files, tokens = self._sink.commit()
        except BaseException:
            self._sink.abandon()
            raise
        self._seconds["write"] += time.perf_counter() - began - sum(self._sink.seconds.values())
        for name, spent in self._sink.seconds.items():
            self._seconds[name] += spent
        self._stats.skipped = self._source.reading.skipped
        if tokens is not None:
            self._stats.tokens = tokens
        return Record(files, self._stats.to_json(), dict(self._seconds))

    def _run(self, batches: Iterator[Batch], first: bool, last: bool, progress: Progress) -> None:
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self._seconds["read"] += time.perf_counter() - began
            if batch is None:
                break
            documents, places, part = batch
            if first:
                self._count_read(documents)
            outcome = self._through(documents, places)
            began = time.perf_counter()
            unwritten = self._sink.keep(outcome.kept, outcome.places)
            self._count(outcome)
            if last:
                self._count_written(outcome.kept, unwritten)
            self._seconds["write"] += time.perf_counter() - began
            progress(part)
        self._blame()

    def _through(self, documents: list[Document], places: Places) -> Outcome:
        """A batch through all steps; one document at a time if one of them raises."""
        if not self._calls or not documents:
            return Outcome(documents, places)
        before = [(document.text, document.id, document.source, spill.dump(document.metadata)) for document in documents]
        try:
            return self._once(documents, places)
        except FATAL:
            raise
        except Exception:
            # Documents may have been changed in place, so they are made anew.
            again = [Document(text, name, source, spill.load(metadata)) for text, name, source, metadata in before]
        outcomes = [self._alone(document, places[i : i + 1]) for i, document in enumerate(again)]
        return Outcome(
            [document for outcome in outcomes for document in outcome.kept],
            np.concatenate([outcome.places for outcome in outcomes]),
            [dropped for outcome in outcomes for dropped in outcome.dropped],
            [taken for outcome in outcomes for taken in outcome.taken],
        )

    def _alone(self, document: Document, places: Places) -> Outcome:
        try:
            return self._once([document], places)
        except FATAL:
            raise
        except Exception as error:
            call = self._calls[self._at]
            where = traceback.extract_tb(error.__traceback__)[-1]
            detail = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
            dropped = Dropped(document, f"{call.name}.failed", detail)
            self._failed[call.number] += 1
            self._first_failure.setdefault(call.number, dropped)
            taken = [(earlier.number, 1, len(document.text)) for earlier in self._calls[: self._at + 1]]
            return Outcome([], places[:0], [(call.number, dropped)], taken)

    def _once(self, documents: list[Document], places: Places) -> Outcome:
        outcome = Outcome(documents, places)
        for at, call in enumerate(self._calls):
            documents, places = outcome.kept, outcome.places
            if not documents:
                break
            self._at = at
            outcome.taken.append((call.number, len(documents), _chars(documents)))
            began = time.perf_counter()
            answers = list(call.answer(documents, places))
            self._seconds[call.name] += time.perf_counter() - began
            if len(answers) != len(documents):
                raise BrokenStep(f"step {call.name} gave {len(answers)} answers for {len(documents)} documents; it must give one for each")
            stays = [not isinstance(answer, Dropped) for answer in answers]
            if not all(stays):
                outcome.dropped += [(call.number, answer) for answer in answers if isinstance(answer, Dropped)]
                outcome.places = places[np.array(stays)]
            outcome.kept = [answer for answer in answers if not isinstance(answer, Dropped)]
        return outcome

    def _count_read(self, documents: Sequence[Document]) -> None:
        dropped, self._source.dropped = self._source.dropped, []
        read = [*documents, *(drop.document for drop in dropped)]
        self._stats.take(0, len(read), _chars(read))
        for document in read:
            self._stats.taken_lengths.add(len(document.text))
        self._drop(0, dropped)

    def _count(self, outcome: Outcome) -> None:
        for number, documents, chars in outcome.taken:
            self._stats.take(number, documents, chars)
        by_step: dict[int, list[Dropped]] = {}
        for number, dropped in outcome.dropped:
            by_step.setdefault(number, []).append(dropped)
        for number in sorted(by_step):
            self._drop(number, by_step[number])

    def _count_written(self, kept: Sequence[Document], unwritten: Mapping[int, Dropped]) -> None:
        number = len(self._names) - 1
        self._stats.take(number, len(kept), _chars(kept))
        self._drop(number, list(unwritten.values()))
        for i, document in enumerate(kept):
            if i not in unwritten:
                self._stats.keep(document)

    def _drop(self, number: int, dropped: Sequence[Dropped]) -> None:
        for drop in dropped:
            self._stats.drop(number, drop)
        if dropped:
            self._sink.drop(self._names[number], dropped)

    def _blame(self) -> None:
        for number, failed in self._failed.items():
            taken = self._stats.steps[number].taken.documents
            if failed > max(MOST_FAILED * taken, FEW_FAILED):
                first = self._first_failure[number]
                raise BrokenStep(f"step {self._names[number]} failed on {failed} of {taken} documents; {first.document.id}: {first.detail}")


def _chars(documents: Sequence[Document]) -> int:
    return sum(len(document.text) for document in documents)

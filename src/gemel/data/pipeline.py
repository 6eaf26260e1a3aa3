"""A run of a recipe: cut into tasks that depend on nothing but the plan and the stage before, so that anyone may do any of them.

    pass-0 -> resolve-0 -> conclude-0 -> pass-1 -> ... -> finish

A pass takes each unit of work through consecutive steps that look at documents one by one. A step that compares documents ends it: the
unit's documents go to disk, and their keys, divided by range. Each range is resolved, all findings are concluded, and the next pass begins
with that step's verdicts. The last pass writes the output.
"""

from __future__ import annotations

import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, cast

import orjson
import tomli_w

from gemel.config.data.pipeline import Recipe
from gemel.config.errors import ConfigError
from gemel.data import build, manifest
from gemel.data.manifest import Entry, Plan, Record
from gemel.data.read.reader import Piece
from gemel.data.stats import Stats
from gemel.data.step import CorpusStep, Reporting, Step
from gemel.data.unit import Batch, Call, PassedOn, Progress, Sink, Source, UnitPass

RANGE_BYTES = 128 * 2**20  # of input for one range of keys; keys are smaller than the text they are made of
LEAST_RANGES, MOST_RANGES = 4, 4096
OURS = ("work", "run.toml", "plan.json")  # what may be in a folder in which somebody else begins the same run at this moment
READING, WRITING = "read", "write"  # the names of what stands before and after the recipe's own steps


@dataclass(frozen=True, slots=True)
class Stage:
    """Tasks that may be done in any order, once the stage before is done. `number` counts passes, or the corpus steps between them."""

    kind: Literal["pass", "resolve", "conclude"]
    number: int
    num_tasks: int

    @property
    def name(self) -> str:
        """As in the folder of records."""
        return f"{self.kind}-{self.number}"


def make_plan(recipe: Recipe) -> Plan:
    """Find the input, cut it into units of work, and build every step once, so that what is missing is known before anything runs."""
    units: list[tuple[int, tuple[Piece, ...]]] = []
    for number, config in enumerate(recipe.input):
        units += [(number, unit) for unit in grouped(build.reader(config).pieces(), config.unit_bytes)]
    corpus = tuple(i for i, step in enumerate(recipe.step) if build.is_corpus(build.build(step)))
    weight_bytes = sum(piece.weight_bytes for _, unit in units for piece in unit)
    num_ranges = min(max(weight_bytes // RANGE_BYTES + 1, LEAST_RANGES), MOST_RANGES)
    files = {str(path): manifest.fingerprint(path) for path in recipe.files()}
    return Plan(orjson.loads(orjson.dumps(recipe.what())), tuple(units), corpus, num_ranges, files)


def grouped(pieces: Sequence[Piece], unit_bytes: int) -> Iterator[tuple[Piece, ...]]:
    """Consecutive pieces together, as many as fit into `unit_bytes`, at least one: many small files would be as many tasks otherwise."""
    group: list[Piece] = []
    weight_bytes = 0
    for piece in pieces:
        if group and weight_bytes + piece.weight_bytes > unit_bytes:
            yield tuple(group)
            group, weight_bytes = [], 0
        group.append(piece)
        weight_bytes += piece.weight_bytes
    if group:
        yield tuple(group)


def distinct(names: Sequence[str]) -> list[str]:
    """Names of steps, numbered where one comes again, since figures go by name."""
    return [name if name not in names[:i] else f"{name} {names[: i + 1].count(name)}" for i, name in enumerate(names)]


class Job:
    """A run in its output folder. Everything that it knows is on disk, so any number of processes can each have one."""

    def __init__(self, output: Path):
        plan = Plan.read(output)
        assert plan is not None, f"{output} has no plan; call Job.begin first"
        self.output, self.plan = output, plan
        self.recipe = Recipe.parse(plan.recipe)
        self.names = distinct([READING, *(build.name(step) for step in self.recipe.step), WRITING])
        self._steps: dict[int, Step | CorpusStep] = {}

    @classmethod
    def begin(cls, recipe: Recipe, output: Path) -> Job:
        """Begin a run, or take up the one that is there. Errors: `ConfigError` if that one is of another recipe or input."""
        plan = make_plan(recipe)
        output.mkdir(parents=True, exist_ok=True)
        if Plan.read(output) is None:
            strange = sorted(path.name for path in output.iterdir() if path.name not in OURS)
            if strange:
                raise ConfigError(f"{output} holds other files ({', '.join(strange[:3])}); give a new folder with --output")
            manifest.write_file(output, "run.toml", tomli_w.dumps(plan.recipe).encode())
            plan.write(output)
        there = Plan.read(output)
        assert there is not None
        plan.require_same(there, output)
        return cls(output)

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """All stages, in order."""
        made = [Stage("pass", 0, len(self.plan.units))]
        for number in range(len(self.plan.corpus)):
            made.append(Stage("resolve", number, self.plan.num_ranges))
            made.append(Stage("conclude", number, 1))
            made.append(Stage("pass", number + 1, len(self.plan.units)))
        return tuple(made)

    @property
    def finished(self) -> bool:
        """Whether the manifest is there."""
        return (self.output / "manifest.json").exists()

    def missing(self, stage: Stage) -> list[int]:
        """The tasks of a stage that are still to be done. None if a later stage has begun to clear up after it."""
        return sorted(set(range(stage.num_tasks)) - manifest.done(self.output, stage.name))

    def weight_bytes(self, stage: Stage, index: int) -> int:
        """How large a task is, in bytes of input."""
        if stage.kind == "pass":
            return max(sum(piece.weight_bytes for piece in self.plan.units[index][1]), 1)
        return 1

    def describe(self, stage: Stage, index: int) -> str:
        """A task in words, for messages."""
        if stage.kind != "pass":
            return f"{stage.name}, part {index}"
        pieces = self.plan.units[index][1]
        more = f" and {len(pieces) - 1} more" if len(pieces) > 1 else ""
        return f"{stage.name}, unit {index} ({pieces[0].path} [{pieces[0].start}:{pieces[0].stop}]{more})"

    def perform(self, stage: Stage, index: int, progress: Progress) -> None:
        """Do one task and record it."""
        began = time.perf_counter()
        match stage.kind:
            case "pass":
                record = self._pass(stage.number, index, progress)
            case "resolve":
                record = self._resolve(stage.number, index)
            case "conclude":
                record = self._conclude(stage.number)
        if stage.kind != "pass":
            record.seconds[self.names[self.plan.corpus[stage.number] + 1]] = time.perf_counter() - began
        record.write(self.output, stage.name, index)
        progress(1.0)
        # What this task was made from is not needed any more. If we die before it is gone, `finish` removes it.
        if stage.kind == "pass" and stage.number > 0:
            (self.output / _spilled(stage.number - 1, index)).unlink(missing_ok=True)
        if stage.kind == "conclude":
            for name in ("keys", "findings"):
                shutil.rmtree(self.output / f"work/{name}-{stage.number}", ignore_errors=True)

    def _step(self, number: int) -> Step | CorpusStep:
        if number not in self._steps:
            self._steps[number] = build.build(self.recipe.step[number])
        return self._steps[number]

    def _corpus_step(self, number: int) -> CorpusStep:
        return cast(CorpusStep, self._step(self.plan.corpus[number]))

    def _pass(self, number: int, index: int, progress: Progress) -> Record:
        from gemel.data.shuffle import KeyWriter
        from gemel.data.spill import SpillWriter
        from gemel.data.write import DroppedWriter

        corpus, last = self.plan.corpus, number == len(self.plan.corpus)
        dropped = DroppedWriter(self.output, f"dropped/{index:06d}-{number}")
        if last:
            sink = Sink(dropped, build.writer(self.recipe.output, self.output, index), None)
        else:
            keys = KeyWriter(self.output, _keys(number, index), self.plan.num_ranges)
            stored = SpillWriter(self.output, _spilled(number, index))
            sink = Sink(dropped, None, PassedOn(stored, keys, self._corpus_step(number), self.names[corpus[number] + 1]))
        source = Source(index)
        input_number, pieces = self.plan.units[index]
        batches: Iterator[Batch]
        if number == 0:
            batches = source.fresh(build.reader(self.recipe.input[input_number]), pieces)
        else:
            batches = source.stored(self.output / _spilled(number - 1, index))
        first = 0 if number == 0 else corpus[number - 1]
        beyond = len(self.recipe.step) if last else corpus[number]
        calls = [self._call(i, number, index) for i in range(first, beyond)]
        return UnitPass(self.names, calls, source, sink).run(batches, number == 0, last, progress)

    def _call(self, step: int, pass_number: int, unit: int) -> Call:
        name = self.names[step + 1]
        if step not in self.plan.corpus:
            simple = cast(Step, self._step(step))
            return Call(step + 1, name, lambda documents, _: simple(documents))
        from gemel.data.shuffle import read_table

        corpus = self._corpus_step(pass_number - 1)
        path = self.output / _verdicts(pass_number - 1)
        verdicts = read_table(path, unit) if path.exists() else None  # there are none if no document has come so far
        return Call(step + 1, name, lambda documents, places: corpus.apply(documents, places, verdicts))

    def _resolve(self, number: int, index: int) -> Record:
        from gemel.data.shuffle import read_range, write_table

        rows = read_range(self._files(f"work/keys-{number}"), index, self.plan.num_ranges)
        if rows is None:
            return Record()
        return Record(write_table(self.output, f"work/findings-{number}/{index:06d}.arrow", self._corpus_step(number).resolve(rows)))

    def _conclude(self, number: int) -> Record:
        import pyarrow as pa

        from gemel.data.shuffle import read_table, write_table

        paths = self._files(f"work/findings-{number}")
        if not paths:
            return Record()
        step = self._corpus_step(number)
        verdicts = step.conclude(pa.concat_tables([read_table(path) for path in paths]))
        stats = {"report": step.report(verdicts)} if isinstance(step, Reporting) else {}
        return Record(write_table(self.output, _verdicts(number), verdicts, len(self.plan.units)), stats)

    def _files(self, folder: str) -> list[Path]:
        """Files of a folder in the order of their numbers, which are padded to equal width up to a million."""
        return sorted((self.output / folder).glob("*.arrow"), key=lambda path: int(path.stem))

    def records(self) -> Iterator[Record]:
        """The records of all passes that are there, by unit, then pass."""
        passes = [stage for stage in self.stages if stage.kind == "pass"]
        there = {stage.name: manifest.done(self.output, stage.name) for stage in passes}
        for index in range(len(self.plan.units)):
            for stage in passes:
                if index in there[stage.name]:
                    yield Record.read(self.output / manifest.record_name(stage.name, index))

    def seconds(self) -> dict[str, float]:
        """What each step has taken so far, in all workers together."""
        spent: defaultdict[str, float] = defaultdict(float)
        for stage in self.stages:
            for index in sorted(manifest.done(self.output, stage.name)):
                for name, seconds in Record.read(self.output / manifest.record_name(stage.name, index)).seconds.items():
                    spent[name] += seconds
        return dict(spent)

    def stats(self) -> Stats:
        """The figures so far."""
        found = manifest.read_manifest(self.output)
        return self.gathered()[0] if found is None else Stats.from_json(found[1])

    def gathered(self) -> tuple[Stats, dict[str, Entry]]:
        """Figures and files of the tasks that are done so far."""
        total, entries = Stats.empty(self.names), dict[str, Entry]()
        for record in self.records():
            total.add(Stats.from_json(record.stats))
            entries.update({name: entry for name, entry in record.files.items() if not name.startswith("work/")})
        for number, step in enumerate(self.plan.corpus):
            if manifest.done(self.output, f"conclude-{number}"):
                report = Record.read(self.output / manifest.record_name(f"conclude-{number}", 0)).stats.get("report")
                total.reports |= {self.names[step + 1]: report} if report else {}
        return total, entries

    def finish(self) -> Stats:
        """Check that nothing was lost, write the manifest and remove what was only needed on the way."""
        total, entries = self.gathered()
        total.check()
        for name, entry in entries.items():
            path = self.output / name
            if not path.exists() or path.stat().st_size != entry.bytes:
                raise ConfigError(
                    f"{path} was written with {entry.bytes} bytes and has been changed since; remove {self.output} to begin anew"
                )
        assert sum(entry.rows for name, entry in entries.items() if name.startswith("dropped/")) == sum(s.num_dropped for s in total.steps)
        manifest.write_file(self.output, "timing.json", orjson.dumps(self.seconds(), option=manifest.PRETTY))
        manifest.write_manifest(self.output, dict(sorted(entries.items())), total.to_json())
        shutil.rmtree(self.output / "work", ignore_errors=True)
        return total


def _spilled(number: int, unit: int) -> str:
    return f"work/pass-{number}/{unit:06d}.arrow"


def _keys(number: int, unit: int) -> str:
    return f"work/keys-{number}/{unit:06d}.arrow"


def _verdicts(number: int) -> str:
    return f"work/verdicts-{number}.arrow"

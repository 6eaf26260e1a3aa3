"""Timetables: complete, in an order that can be, as idle as theory says, and within the memory that they promise."""

from __future__ import annotations

from collections import defaultdict

import pytest

from gemel.config.parallel import GPipe, Interleaved, OneFOneB, Pipeline, ZeroBubble
from gemel.train.parallel.timetable import Pass, Timetable, Transfer, num_stages, timetable


def every(stages: int) -> list[Pipeline]:
    one = [GPipe(kind="gpipe", stages=stages), OneFOneB(kind="1f1b", stages=stages)]
    interleaved = [Interleaved(kind="interleaved", stages=stages, chunks=chunks) for chunks in (2, 3)]
    return [*one, *interleaved, *(ZeroBubble(kind="zero_bubble", stages=stages, chunks=chunks) for chunks in (1, 2, 3))]


def passes(table: Timetable, rank: int) -> list[Pass]:
    return [line for line in table.programs[rank] if isinstance(line, Pass)]


@pytest.mark.parametrize("num_micros", [1, 2, 3, 5, 8, 17])
@pytest.mark.parametrize("stages", [2, 3, 4, 8])
def test_ranks_that_only_do_their_lines_come_to_the_end(stages: int, num_micros: int) -> None:
    """Each rank's transfers with another happen in order, and wait for each other, as without tags: the strictest there is."""
    for config in every(stages):
        table = timetable(config, num_micros)
        at, done, here = [0] * stages, set(), [set() for _ in range(stages)]
        moved = True
        while moved:
            moved = False
            for rank, program in enumerate(table.programs):
                if at[rank] == len(program):
                    continue
                line = program[at[rank]]
                if isinstance(line, Transfer):
                    other = line.receiver if rank == line.sender else line.sender
                    theirs = table.programs[other][at[other]] if at[other] < len(table.programs[other]) else None
                    if theirs != line or line.made_by not in done:
                        continue
                    at[other] += 1
                    here[line.receiver].add(Pass(line.made_by.kind, line.stage, line.made_by.micro))
                else:
                    needs = line.stage > 0 if line.kind == "forward" else line.stage < num_stages(config) - 1
                    assert line.kind == "weights" or not needs or line in here[rank], f"{line} begins before its input is here"
                    done.add(line)
                at[rank] += 1
                moved = True
        assert at == [len(program) for program in table.programs], f"{config} waits for itself with {num_micros} micro-batches"
        kinds = ("forward", "backward", "weights") if isinstance(config, ZeroBubble) else ("forward", "backward")
        assert done == {Pass(kind, stage, micro) for kind in kinds for stage in range(num_stages(config)) for micro in range(num_micros)}


@pytest.mark.parametrize(("stages", "num_micros"), [(2, 4), (4, 4), (4, 16), (8, 32)])
def test_idle_time_is_what_the_papers_say(stages: int, num_micros: int) -> None:
    """In passes forward: 3 per micro-batch and stage, and (P - 1) times 3 of waiting; divided by chunks; 1 where weights fill the rest."""
    for config in every(stages):
        chunks = num_stages(config) // stages
        wait = (stages - 1) * (1 if isinstance(config, ZeroBubble) else 3)
        assert timetable(config, num_micros).idle == pytest.approx(wait / (wait + 3 * num_micros * chunks))


@pytest.mark.parametrize("stages", [2, 4])
def test_memory_is_bounded(stages: int) -> None:
    """Micro-batches whose activations are held: all with gpipe, else no more than there are ranks, however many come."""
    for config, most in (
        (GPipe(kind="gpipe", stages=stages), 16),
        (OneFOneB(kind="1f1b", stages=stages), stages),
        (ZeroBubble(kind="zero_bubble", stages=stages), stages),
    ):
        last = "weights" if isinstance(config, ZeroBubble) else "backward"
        held: dict[int, int] = defaultdict(int)
        for rank in range(stages):
            count = 0
            for one in passes(timetable(config, 16), rank):
                count += (one.kind == "forward") - (one.kind == last)
                held[rank] = max(held[rank], count)
        assert max(held.values()) == most


def test_looking_is_only_forward() -> None:
    table = timetable(Interleaved(kind="interleaved", stages=2, chunks=2), 3, learn=False)
    for rank in range(2):
        assert {(one.kind, one.stage, one.micro) for one in passes(table, rank)} == {
            ("forward", stage, micro) for stage in (rank, rank + 2) for micro in range(3)
        }

"""A run as a whole: what it keeps, that nothing is lost or seen twice, and what happens when steps misbehave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gemel.config.data.pipeline import Recipe
from gemel.config.errors import ConfigError
from gemel.data import inspect
from gemel.data.manifest import fingerprint
from gemel.data.pipeline import Job, grouped, make_plan
from gemel.data.read.reader import Piece
from gemel.data.report import page
from gemel.data.unit import BrokenStep
from tests.data.runs import contents, corpus, custom, do, first_of_each, kept, recipe, rows


def truth(path: Path) -> list[dict[str, Any]]:
    """The rows that can be read, by Python's own parser."""
    found = []
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        found += [row] if "text" in row else []
    return found


def test_keeps_what_the_rule_allows_in_order_and_drops_the_rest_with_reasons(tmp_path: Path) -> None:
    path = corpus(tmp_path)
    stats = do(recipe(path), tmp_path / "out")
    long = [row for row in truth(path) if len(row["text"]) >= 40]
    assert [(row["text"], row["id"], row["metadata"]) for row in kept(tmp_path / "out")] == [
        (row["text"], row["id"], {"n": row["n"]}) for row in long
    ]
    reasons = {reason: group.documents for _, reason, group in stats.reasons()}
    assert reasons == {"read.no_text": 1, "read.bad_json": 1, "read.not_utf8": 1, "length.short": len(truth(path)) - len(long)}
    dropped = rows(tmp_path / "out", "dropped")
    assert {row["reason"]: sum(other["reason"] == row["reason"] for other in dropped) for row in dropped} == reasons
    assert stats.steps[0].taken.documents == 200 == stats.kept.documents + sum(reasons.values())
    assert stats.kept.chars == sum(len(row["text"]) for row in long)
    assert len(list((tmp_path / "out" / "kept").iterdir())) > 5


def test_dropped_documents_say_what_broke_the_rule(tmp_path: Path) -> None:
    do(recipe(corpus(tmp_path)), tmp_path / "out")
    by_reason = {row["reason"]: row for row in rows(tmp_path / "out", "dropped")}
    assert by_reason["length.short"]["detail"].endswith("characters, min_chars = 40")
    assert by_reason["length.short"]["step"] == "length"
    assert by_reason["read.not_utf8"]["text"] == '{"text": "not utf-8: \\xff"}'
    assert by_reason["read.no_text"]["id"] == "no text"


def test_corpus_step_sees_all_units_and_the_steps_around_it_act_in_order(tmp_path: Path) -> None:
    path = corpus(tmp_path)
    stats = do(recipe(path, [custom("Upper"), first_of_each(), {"kind": "length", "min_chars": 40}]), tmp_path / "out")
    seen: set[str] = set()
    want = []
    for row in truth(path):
        if row["text"][:5] not in seen:
            seen.add(row["text"][:5])
            want += [row["text"].upper()] if len(row["text"]) >= 40 else []
    assert [row["text"] for row in kept(tmp_path / "out")] == want
    assert [step.name for step in stats.steps] == ["read", "Upper", "FirstOfEach", "length", "write"]
    assert stats.steps[2].num_dropped == len(truth(path)) - len(seen) > 10
    assert stats.counts == {"upper": len(want)}
    assert not (tmp_path / "out" / "work").exists()


def test_every_step_has_its_seconds(tmp_path: Path) -> None:
    do(recipe(corpus(tmp_path), [custom("Sleeps", seconds=0.01), first_of_each()]), tmp_path / "out")
    seconds = json.loads((tmp_path / "out" / "timing.json").read_bytes())
    assert set(seconds) == {"read", "Sleeps", "FirstOfEach", "write"}
    assert all(spent > 0 for spent in seconds.values())


def test_two_corpus_steps(tmp_path: Path) -> None:
    path = corpus(tmp_path)
    stats = do(recipe(path, [first_of_each(), first_of_each(4)]), tmp_path / "out")
    assert stats.kept.documents == len({row["text"][:4] for row in truth(path)}) == 20
    assert [step.name for step in stats.steps] == ["read", "FirstOfEach", "FirstOfEach 2", "write"]


def test_units_and_ranges_do_not_change_what_is_kept(tmp_path: Path) -> None:
    path = corpus(tmp_path)
    steps = [first_of_each(), {"kind": "length", "min_chars": 40}]
    found = []
    for unit_bytes in (1024, 5000, 10**9):
        table = {"kind": "jsonl", "paths": [str(path)], "unit_bytes": unit_bytes}
        do(recipe(path, steps, input=table), tmp_path / str(unit_bytes))
        found.append([row for row in kept(tmp_path / str(unit_bytes)) if row["id"].startswith("doc")])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("output", [{"kind": "parquet"}, {"kind": "jsonl", "compression": "gz"}, {"kind": "jsonl", "compression": "none"}])
def test_every_form_of_output_holds_the_same(tmp_path: Path, output: dict[str, Any]) -> None:
    path = corpus(tmp_path)
    do(recipe(path), tmp_path / "zst")
    do(recipe(path, output=output), tmp_path / "other")
    other = [
        {**row, "metadata": json.loads(row["metadata"])} if isinstance(row["metadata"], str) else row for row in kept(tmp_path / "other")
    ]
    assert other == kept(tmp_path / "zst")


def test_output_can_be_the_next_input(tmp_path: Path) -> None:
    path = corpus(tmp_path)
    for kind in ("jsonl", "parquet"):
        do(recipe(path, output={"kind": kind}), tmp_path / f"first-{kind}")
        again = {"kind": kind, "paths": [str(tmp_path / f"first-{kind}" / "kept")]}
        do(recipe(path, [], input=again), tmp_path / f"second-{kind}")
        assert kept(tmp_path / f"second-{kind}") == kept(tmp_path / "first-jsonl")


def test_a_document_that_breaks_a_step_costs_nobody_else_anything(tmp_path: Path) -> None:
    path = corpus(tmp_path)
    stats = do(recipe(path, [custom("Fails", word="00041")]), tmp_path / "out")
    (lost,) = [row for row in rows(tmp_path / "out", "dropped") if row["reason"] == "Fails.failed"]
    assert lost["id"] == "doc-41"
    assert lost["detail"].startswith("ValueError: cannot take 00041 (custom_steps.py:")
    assert [row["text"] for row in kept(tmp_path / "out")] == [row["text"] + "!" for row in truth(path) if "00041" not in row["text"]]
    assert stats.kept.documents == len(truth(path)) - 1


def test_a_step_that_fails_on_most_documents_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(BrokenStep, match=r"step Fails failed on \d+ of \d+ documents; doc-0: ValueError"):
        do(recipe(corpus(tmp_path), [custom("Fails", word=" ")]), tmp_path / "out")
    assert not list((tmp_path / "out").glob("work/tmp/*"))


def test_a_step_that_loses_documents_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(BrokenStep, match=r"Loses gave \d+ answers for \d+ documents"):
        do(recipe(corpus(tmp_path), [custom("Loses")]), tmp_path / "out")


def test_text_that_cannot_be_written_is_dropped_by_name(tmp_path: Path) -> None:
    lines = ['{"text": "fine"}', '{"text": "half \\ud83d of a pair"}', '{"text": "big", "n": 123456789012345678901234567890}']
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    stats = do(recipe(tmp_path / "in.jsonl", []), tmp_path / "out")
    assert [row["text"] for row in kept(tmp_path / "out")] == ["fine", "big"]
    assert [(reason, group.documents) for _, reason, group in stats.reasons()] == [("read.bad_json", 1)]


def test_another_recipe_is_refused_with_the_difference(tmp_path: Path) -> None:
    path = corpus(tmp_path)
    do(recipe(path), tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"another recipe \(step\.0\.min_chars was 40 and is 41\); give another --output, or remove"):
        Job.begin(recipe(path, [{"kind": "length", "min_chars": 41}]), tmp_path / "out")
    assert contents(tmp_path / "out") == before
    do(recipe(path, [{"kind": "length", "min_chars": 41}]), tmp_path / "other")  # the way out works


def test_changed_input_is_refused(tmp_path: Path) -> None:
    path = corpus(tmp_path)
    do(recipe(path), tmp_path / "out")
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(ConfigError, match=r"the input has changed .*corpus\.jsonl had \d+ bytes and has \d+"):
        Job.begin(recipe(path), tmp_path / "out")


def test_changed_files_of_steps_are_refused(tmp_path: Path) -> None:
    path, words, urls = corpus(tmp_path), tmp_path / "evaluation.txt", tmp_path / "urls.txt"
    words.write_text("a question of thirteen words that nobody would ever write by chance in a text")
    urls.write_text("example.com/bad\n")
    recipes = recipe(path, [{"kind": "url", "url_files": [str(urls)]}, {"kind": "decontaminate", "files": [str(words)]}])
    do(recipes, tmp_path / "out")
    Job.begin(recipes, tmp_path / "out")  # nothing has changed
    urls.write_text("example.com/other\n")
    with pytest.raises(ConfigError, match=r"urls\.txt changed since .*out was begun, and its steps read that; give another --output"):
        Job.begin(recipes, tmp_path / "out")
    do(recipes, tmp_path / "other")
    urls.unlink()
    with pytest.raises(ConfigError, match=r"urls\.txt"):
        Job.begin(recipes, tmp_path / "other")


def test_a_folder_is_known_by_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    (folder / "more").mkdir(parents=True)
    (folder / "tokenizer.json").write_text("{}")
    prints = [fingerprint(folder)]
    (folder / "more" / "merges.txt").write_text("a b")
    prints.append(fingerprint(folder))
    (folder / "more" / "merges.txt").rename(folder / "merges.txt")
    prints.append(fingerprint(folder))
    assert len(set(prints)) == 3
    (folder / "merges.txt").unlink()
    assert fingerprint(folder) == prints[0]
    with pytest.raises(ConfigError, match="absent is not there"):
        fingerprint(tmp_path / "absent")


def test_the_manifest_says_how_a_mixture_meets_its_budget(tmp_path: Path) -> None:
    path, output = corpus(tmp_path), tmp_path / "out"
    mixed = recipe(path, [{"kind": "mix", "unit": "documents", "budget": 50}])
    job = Job.begin(mixed, output)
    for stage in job.stages:
        for index in job.missing(stage):
            job.perform(stage, index, lambda part: None)
    unfinished = inspect.look(output).stats.reports
    job.finish()
    found = inspect.look(output)
    [(source, row)] = found.stats.reports["mix"].items()
    assert unfinished == found.stats.reports == inspect.to_json(found)["reports"]
    assert (row["documents"], row["target"]) == (197, 50)
    assert row["taken_documents"] == found.stats.kept.documents == len(kept(output))
    assert f"\n{source}  " in inspect.tables(found).partition("taken documents")[2]
    assert "What mix says" in page(found, 0)


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    path = corpus(tmp_path / "in")
    with pytest.raises(ConfigError, match=r"holds other files \(corpus\.jsonl\)"):
        Job.begin(recipe(path), tmp_path / "in")


def test_an_output_that_was_tampered_with_is_not_declared_finished(tmp_path: Path) -> None:
    job = Job.begin(recipe(corpus(tmp_path)), tmp_path / "out")
    for index in job.missing(job.stages[0]):
        job.perform(job.stages[0], index, lambda part: None)
    next((tmp_path / "out" / "kept").iterdir()).write_bytes(b"")
    with pytest.raises(ConfigError, match="has been changed since"):
        job.finish()


def test_run_toml_repeats_the_run(tmp_path: Path) -> None:
    from gemel.config.data.pipeline import load

    path = corpus(tmp_path)
    do(recipe(path, [first_of_each(), {"kind": "length", "min_chars": 40}]), tmp_path / "one")
    do(load(tmp_path / "one" / "run.toml"), tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_small_files_share_a_unit_and_order_stays() -> None:
    pieces = [Piece(str(i), 0, size, size) for i, size in enumerate([5, 5, 5, 30, 1, 1])]
    assert [[piece.path for piece in unit] for unit in grouped(pieces, 10)] == [["0", "1"], ["2"], ["3"], ["4", "5"]]


def test_what_is_missing_is_known_before_anything_runs(tmp_path: Path) -> None:
    path = corpus(tmp_path)
    for target, what in {
        "no.such.module:Step": "No module named",
        "os:getcwd": "is not a class with __call__",
        "subprocess:Popen": "is not a class with __call__",
        "tests.data.custom_steps:Fails": "does not take arguments",
    }.items():
        with pytest.raises(ConfigError, match=what):
            make_plan(recipe(path, [{"kind": "custom", "target": target}]))
    with pytest.raises(ConfigError, match="matches no file"):
        make_plan(recipe(tmp_path / "nothing*.jsonl"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": [{"kind": "lenght"}]}, r"step\.0\.kind = 'lenght' is not known: did you mean 'length'"),
        ({"step": [{"kind": "length", "min_char": 3}]}, r"step\.0: LengthConfig has no key 'min_char': did you mean 'min_chars'"),
        ({"step": [{"kind": "length", "min_chars": 9, "max_chars": 3}]}, r"max_chars = 3 is less than min_chars = 9"),
        ({"input": {"paths": ["x"]}}, r"input\.0 has no kind; it is one of jsonl, parquet"),
        ({"input": {"kind": "jsonl", "paths": []}}, r"input\.0: JsonlInput\.paths"),
        ({"outptu": {}}, r"Recipe has no key 'outptu': did you mean 'output'"),
        ({"run": {"kind": "local", "workers": 0}}, r"run: LocalRun\.workers = 0"),
    ],
)
def test_mistakes_in_a_recipe_are_named(change: dict[str, Any], message: str) -> None:
    right = {"input": {"kind": "jsonl", "paths": ["x"]}, "output": {"kind": "jsonl"}}
    with pytest.raises(ConfigError, match=message):
        Recipe.parse({**right, **change})

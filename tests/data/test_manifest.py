"""Durability: a run that is killed anywhere and taken up again leaves exactly the bytes of a run that was not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w

from gemel.config.errors import ConfigError
from gemel.data import manifest
from gemel.data.manifest import Lock, Shard
from gemel.data.pipeline import make_plan
from tests.data.runs import contents, corpus, do, first_of_each, recipe

ROOT = Path(__file__).resolve().parents[2]

# Forks once for each point at which the run makes something durable, names or removes it. The fork kills itself there, a second fork takes
# the run up again. What is printed is the number of points, and the exit status says whether all outputs were the same.
KILLER = """
import os, shutil, signal, sys
from pathlib import Path
from gemel.config.data.pipeline import load
from gemel.data import manifest
from tests.data.runs import contents, do

what, folder = load(Path(sys.argv[1])), Path(sys.argv[2])
do(what, folder / "whole")
whole = contents(folder / "whole")

def deadly(call, calls, at):
    def wrapped(*args, **kwargs):
        calls[0] += 1
        if calls[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    return wrapped

def forked(output, at):
    child = os.fork()
    if not child:
        calls = [0]
        os.fsync = lambda descriptor: None  # a killed process loses nothing that the kernel has; waiting for the disk would only take time
        for place, name in ((os, "fsync"), (os, "link"), (Path, "replace"), (Path, "unlink"), (shutil, "rmtree")):
            setattr(place, name, deadly(getattr(place, name), calls, at))
        do(what, output)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

at = 0
while True:
    at += 1
    status = forked(folder / str(at), at)
    if status == 0:
        break
    assert status == -signal.SIGKILL, status
    assert forked(folder / str(at), 0) == 0
    after = contents(folder / str(at))
    assert after == whole, (at, [name for name in whole.keys() | after.keys() if whole.get(name) != after.get(name)])
    shutil.rmtree(folder / str(at))
print(at)
"""


def test_killed_at_every_point_it_ends_in_the_same_bytes(tmp_path: Path) -> None:
    path = corpus(tmp_path / "in", num=14)
    table = {"kind": "jsonl", "paths": [str(path)], "unit_bytes": 1024}
    what = recipe(path, [first_of_each(), {"kind": "length", "min_chars": 40}], input=table)
    assert len(make_plan(what).units) == 2
    (tmp_path / "run.toml").write_text(tomli_w.dumps(json.loads(json.dumps(what.what()))))
    (tmp_path / "outputs").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path / "run.toml"), str(tmp_path / "outputs")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 60


def test_a_shard_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    shard = Shard(tmp_path, "kept/000000.txt")
    shard.write(b"half")
    assert not (tmp_path / "kept").exists()
    shard.write(memoryview(b" whole"))
    entry = shard.commit(rows=2)
    assert (tmp_path / "kept" / "000000.txt").read_bytes() == b"half whole"
    assert (entry.rows, entry.bytes, entry.xxh3) == (2, 10, manifest.checksum(tmp_path / "kept" / "000000.txt"))
    abandoned = Shard(tmp_path, "kept/000001.txt")
    abandoned.write(b"never")
    abandoned.abandon()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["000000.txt"]


def test_two_runs_cannot_write_to_one_folder_but_members_of_one_can(tmp_path: Path) -> None:
    with Lock(tmp_path, shared=False), pytest.raises(ConfigError, match="another run is writing"):
        Lock(tmp_path, shared=True).__enter__()
    with Lock(tmp_path, shared=True), Lock(tmp_path, shared=True), pytest.raises(ConfigError, match="another run is writing"):
        Lock(tmp_path, shared=False).__enter__()
    with Lock(tmp_path, shared=False):
        pass


def test_what_killed_runs_have_left_is_cleared_away_by_who_is_alone(tmp_path: Path) -> None:
    left = Shard(tmp_path, "kept/000000.txt")
    with Lock(tmp_path, shared=True):
        assert list((tmp_path / "work" / "tmp").iterdir())
    with Lock(tmp_path, shared=False):
        assert not (tmp_path / "work" / "tmp").exists()
    left.abandon()


def test_a_manifest_accounts_for_every_row(tmp_path: Path) -> None:
    stats = do(recipe(corpus(tmp_path)), tmp_path / "out")
    found = manifest.read_manifest(tmp_path / "out")
    assert found is not None
    entries, _ = found
    assert set(entries) == {name for name in contents(tmp_path / "out") if name.startswith(("kept/", "dropped/"))}
    assert sum(entry.rows for name, entry in entries.items() if name.startswith("kept/")) == stats.kept.documents
    assert sum(entry.rows for entry in entries.values()) == 200
    assert all(manifest.checksum(tmp_path / "out" / name) == entry.xxh3 for name, entry in entries.items())


def test_differences_are_named_by_path() -> None:
    before = {"a": 1, "b": [{"x": 1}, {"x": 2}], "c": [1]}
    now = {"a": 1, "b": [{"x": 1}, {"x": 3, "y": True}], "c": [1, 2]}
    assert list(manifest.differences("", before, now)) == [
        "b.1.x was 2 and is 3",
        "b.1.y was not set and is True",
        "c was [1] and is [1, 2]",
    ]

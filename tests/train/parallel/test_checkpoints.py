"""What several ranks save together is whole or absent, whatever happens to one of them. Ranks are threads here, which share a store as
processes would; `test_runs` kills processes, and `test_meshes` has every mesh.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gemel.config.errors import CheckpointError, UnsupportedError
from gemel.config.parallel import ParallelConfig
from gemel.config.train import SaveConfig
from gemel.model.build import load, save
from gemel.model.pieces import Pieces, Share, everything, run
from gemel.model.tensor_file import TensorFile
from gemel.train.checkpoint import Checkpoints
from gemel.train.parallel.mesh import Mesh
from tests import tiny
from tests.train import runs


class Thread(Mesh):
    """A rank that is a thread."""

    def __init__(self, rank: int, store: Any, barrier: threading.Barrier, slots: list[Any]):
        super().__init__(ParallelConfig(replicate=len(slots)), None, rank, store)
        self._barrier, self._slots = barrier, slots

    def _exchange(self, value: Any) -> list[Any]:
        self._slots[self.rank] = value
        self._barrier.wait()
        found = list(self._slots)
        self._barrier.wait()
        return found

    def sum(self, values: Sequence[float]) -> list[float]:
        return [sum(column) for column in zip(*self._exchange(values), strict=True)]

    def from_first(self, value: Any) -> Any:
        return self._exchange(value)[0]


def together(work: Callable[[Mesh], Any], num_ranks: int = 3) -> list[Any]:
    """What each rank returns or raises."""
    store, barrier, slots = dist.HashStore(), threading.Barrier(num_ranks, timeout=20), [None] * num_ranks  # type: ignore[attr-defined]
    with ThreadPoolExecutor(num_ranks) as pool:
        futures = [pool.submit(work, Thread(rank, store, barrier, slots)) for rank in range(num_ranks)]
        return [future.exception() or future.result() for future in futures]


def share(tensors: dict[str, torch.Tensor], mesh: Mesh) -> Share:
    """Of a rank: a stretch of each, all of them of about equal length."""
    parts = {}
    for name, x in tensors.items():
        start, stop = (x.numel() * rank // mesh.num_ranks for rank in (mesh.rank, mesh.rank + 1))
        boxes = list(run([everything(x.shape)], start, stop))
        if boxes:
            parts[name] = Pieces.of(torch.cat([x[box].reshape(-1) for box in boxes]), x.shape, boxes)
    return Share(parts)


def optimizer(step: int) -> dict[str, torch.Tensor]:
    """Of another state at every step: a matrix, what is too short for all ranks to have some, and a type that a rank must keep."""
    return {"w": torch.arange(35.0).view(5, 7) + step, "b": torch.full((1,), step, dtype=torch.uint8), "h": torch.ones(9).bfloat16() * step}


def write(out: Path, mesh: Mesh, *steps: int, **config: Any) -> None:
    loaded = tiny.build()
    weights = dict(loaded.model.named_parameters())
    with Checkpoints(out, SaveConfig(**config), runs.tokenizer(), mesh) as checkpoints:
        for step in steps:
            state = {"optimizer": share(optimizer(step), mesh), "rng": torch.tensor([step]), "step": step}
            mine = share(weights, mesh)
            checkpoints.save(step, loaded, state if mesh.first else state | {"rng": None, "step": None}, weights=mine)
            if checkpoints._config.asynchronous:
                for pieces in (*mine.values(), *state["optimizer"].values()):  # what a rank goes on with is no part of what it has saved
                    for _, tensor in pieces.found:
                        tensor.zero_()


def found(out: Path, mesh: Mesh) -> int | None:
    """The step of the newest checkpoint, when all that a rank could read of it is what was saved."""
    newest = Checkpoints(out, SaveConfig(), runs.tokenizer(), mesh).latest()
    if newest is None:
        return None
    assert (newest.state["step"], newest.state["rng"].tolist()) == (newest.step, [newest.step])
    want = optimizer(newest.step)
    assert newest.state["optimizer"].keys() == want.keys()
    assert all(torch.equal(newest.state["optimizer"][name].whole(), x) and x.dtype == want[name].dtype for name, x in want.items())
    assert all(torch.equal(x, load(newest.model).model.get_parameter(name)) for name, x in tiny.build().model.named_parameters())
    return newest.step


@pytest.mark.parametrize("asynchronous", [True, False])
def test_what_ranks_save_others_find(asynchronous: bool, tmp_path: Path) -> None:
    """Each wrote its own share, and nothing is left of what was only on its way; the model has the bytes that one process writes."""
    assert together(lambda mesh: write(tmp_path, mesh, 1, 2, 3, asynchronous=asynchronous)) == [None] * 3
    for num_ranks in (1, 2, 4):
        assert together(lambda mesh: found(tmp_path, mesh), num_ranks) == [3] * num_ranks
    files = sorted(path.name for path in (tmp_path / "state/step-00000003").iterdir())
    assert files == ["pieces.json", "rank-00000.safetensors", "rank-00001.safetensors", "rank-00002.safetensors", "state.json"]
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["step-00000002", "step-00000003"]
    assert not list((tmp_path / "work/tmp").iterdir())
    save(tiny.build(), tmp_path / "alone")
    assert (tmp_path / "latest/model.safetensors").read_bytes() == (tmp_path / "alone/model.safetensors").read_bytes()


@pytest.mark.parametrize("victim", ["rank-00000.safetensors", "rank-00002.safetensors", "pieces.json", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_damage_of_any_file_is_seen_by_all(damage: str, victim: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On whatever rank looks at it, it is named, and all take the one before."""
    together(lambda mesh: write(tmp_path, mesh, 1, 2))
    file = tmp_path / "state/step-00000002" / victim
    data = bytearray(file.read_bytes())
    data[len(data) // 2 if victim != "state.json" else 0] ^= 1
    file.write_bytes(data)
    if damage == "remove":
        file.unlink()
    assert together(lambda mesh: found(tmp_path, mesh), 2) == [1, 1]
    said = capsys.readouterr().err
    assert "the checkpoint of step 2 is passed over" in said
    assert victim == "state.json" or str(file) in said


@pytest.mark.parametrize("full", ["rank-00000", "rank-00002", "model"])
def test_a_rank_without_room_is_named_by_all(full: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is its own share that it cannot write or the model; the checkpoint before stays, and there is one behind it again."""
    together(lambda mesh: write(tmp_path, mesh, 1))
    put = TensorFile.put

    def no_room(self: TensorFile, name: str, tensor: torch.Tensor) -> None:
        if self._path.name.startswith(full) and "lent" not in str(self._path):
            raise OSError(28, "No space left on device")
        put(self, name, tensor)

    monkeypatch.setattr(TensorFile, "put", no_room)
    errors = together(lambda mesh: write(tmp_path, mesh, 2))
    rank = 2 if full == "rank-00002" else 0
    for error in errors:
        assert isinstance(error, CheckpointError)
        assert str(error).startswith(f"the checkpoint of step 2 cannot be written to {tmp_path} by rank {rank} (")
        assert "No space left on device; make room there" in str(error)
    monkeypatch.undo()
    assert together(lambda mesh: found(tmp_path, mesh), 2) == [1, 1]
    assert together(lambda mesh: write(tmp_path, mesh, 3)) == [None] * 3
    assert together(lambda mesh: found(tmp_path, mesh), 2) == [3, 3]


def test_a_rank_that_never_says_that_it_has_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it died between its write and the commit: there is no checkpoint, the one before is found, and the drafts are swept away."""
    together(lambda mesh: write(tmp_path, mesh, 1))
    written, go_on, asked = threading.Barrier(4, timeout=20), threading.Event(), threading.Event()
    tell, told = Mesh.tell, Mesh.told

    def dies(self: Mesh, key: str, text: str) -> None:
        if not self.first:
            written.wait()
        if self.rank == 1:
            go_on.wait(20)
            text = json.dumps([json.loads(text)[0], {}, "dead"])  # or the others would wait forever, with nobody to end them
        tell(self, key, text)

    def asks(self: Mesh, key: str) -> str | None:
        if self.first and not asked.is_set():  # it has written, too
            asked.set()
            written.wait()
        return told(self, key)

    with monkeypatch.context() as patch:
        patch.setattr(Mesh, "tell", dies)
        patch.setattr(Mesh, "told", asks)
        with ThreadPoolExecutor(1) as pool:
            job = pool.submit(together, lambda mesh: write(tmp_path, mesh, 2))
            written.wait()
            assert list((tmp_path / "work/tmp/step-00000002.state").glob("rank-00001*"))
            assert together(lambda mesh: found(tmp_path, mesh), 2) == [1, 1]
            assert not list((tmp_path / "work/tmp").iterdir())
            go_on.set()
            assert str(job.result()[0]) == "dead"


def test_another_version_is_refused_not_passed_over(tmp_path: Path) -> None:
    """Or the run would begin anew, in the folder where its checkpoints are."""
    together(lambda mesh: write(tmp_path, mesh, 1), 1)
    state = tmp_path / "state/step-00000001/state.json"
    state.write_text(state.read_text().replace('"version": 2', '"version": 1'))
    for error in together(lambda mesh: found(tmp_path, mesh), 2):
        assert isinstance(error, UnsupportedError)
        assert "is of version 1 and this gemel reads version 2: go on with the gemel that wrote it, or begin another run" in str(error)
        assert str(error).endswith(f"with [model] kind = 'pretrained' and path = '{tmp_path / 'step-00000001'}'")
    load(tmp_path / "step-00000001")

"""Checkpoints that survive whatever happens to the processes of a run.

    out/step-00000200/            the model as every tool reads it: config.json, model.safetensors, tokenizer.json ...
    out/latest, out/best          links to the newest of these, and to the one with the least validation loss
    out/state/step-00000200/      what a run needs besides to go on from there:
        rank-00003.safetensors        of tensors, the pieces that were rank 3's to save
        pieces.json                   what pieces there are of each tensor, and in which of these files
        state.json                    everything else, and the checksums of all files of both folders
    out/work/tmp/                 drafts

Everything is written as a draft, forced to the disk, and renamed to where it belongs, the state last: a state that is there and agrees with
its checksums is a whole checkpoint, and before that the one before it still is. Tensors are safetensors and all else is JSON; nothing is
pickled.

Of several ranks each writes its share of the state. When all have, rank 0 puts the model together, tensor by tensor, and does the rest.
What it lacks of the model, others have left for it in a draft, which goes when the model is there: so no rank holds more than its share
and a tensor, nothing is exchanged beside training, and the model does not show how many there were.

A save copies what it needs and goes on in a thread of its own, or writes it as it is and waits. The next save waits for the one before, and
so does the end of the run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError
from torch import Tensor

from gemel.config.errors import CheckpointError, UnsupportedError
from gemel.config.train import SaveConfig
from gemel.data.manifest import checksum, sync
from gemel.model import build, pieces
from gemel.model.build import LoadedModel
from gemel.model.pieces import Pieces, Share
from gemel.tokenizer.tokenizer import Tokenizer
from gemel.train.parallel.mesh import Mesh
from gemel.train.parallel.together import Together

Json = dict[str, Any]
VERSION = 2
LOOK_S = 1.0
_STATE, _INDEX = "state.json", "pieces.json"
_NAME = re.compile(r"step-(\d{8,})")


def name_of(step: int) -> str:
    """The folder of a step."""
    return f"step-{step:08d}"


@dataclass(frozen=True)
class Found:
    """A whole checkpoint: where its model lies, and the state beside it, as it was given to `save`.

    A `Share` in the state is that of all ranks together, read from the disk where and when somebody needs it.
    """

    step: int
    model: Path
    state: Json


@dataclass(frozen=True)
class _Save:
    """What this rank saves: of the model its weights, of the state its tensors. The rest of the state, and `loaded`, are rank 0's."""

    step: int
    loaded: LoadedModel
    weights: Share
    tensors: Share
    state: Json
    best: bool


class Checkpoints:
    """The checkpoints of one run. Whoever uses it holds the run's lock, or is one of several ranks whose first does; all of them call all
    methods in the same order.
    """

    def __init__(self, out: Path, config: SaveConfig, tokenizer: Tokenizer, mesh: Mesh | None = None):
        self._out, self._config, self._tokenizer, self._mesh = out, config, tokenizer, mesh or Mesh()
        self._drafts, self._file = out / "work" / "tmp", f"rank-{self._mesh.rank:05d}.safetensors"
        self._together = Together(self._mesh)
        self._writer: Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, KeyboardInterrupt):
            return  # who cannot wait gets the checkpoint before this one
        self.wait()
        if error is None:
            self._mesh.any(False)  # where ranks leave word may be rank 0's: it stays until all have heard

    def save(self, step: int, loaded: LoadedModel, state: Mapping[str, Any], best: bool = False, weights: Share | None = None) -> None:
        """Keep the model and the state (numbers, texts, lists, tables, tensors, shares) of a step as they are now. `best` so far, or not.

        Of several ranks each gives its share of the weights, and of every `Share` in the state; all else is rank 0's. Without `weights`
        they are those of `loaded`.
        """
        self.wait()
        if weights is None:
            weights = Share({name: Pieces.of(p) for name, p in loaded.model.named_parameters()})
        tensors = Share()
        plain = _split(state, "", tensors, self._mesh.first)
        if self._config.asynchronous:
            weights, tensors = weights.copy(), tensors.copy()
        self._writer = Thread(target=self._work, args=(_Save(step, loaded, weights, tensors, plain, best),), name="checkpoint", daemon=True)
        self._writer.start()
        if not self._config.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Until everything is on the disk. Raises what went wrong there, on all ranks."""
        while self._writer is not None:
            self._writer.join(LOOK_S)
            if not self._writer.is_alive():
                self._writer = None
            elif not self._together.waits:  # disks may be slow: a rank that writes goes on
                self._mesh.at("writing a checkpoint")
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def latest(self) -> Found | None:
        """The newest that is whole. One that is damaged is named on stderr, and the one before it is taken.

        Raises `CheckpointError` if it is of a version that is not read: to pass it over would be to begin anew.
        """
        if self._mesh.first:
            for leftover in self._drafts.glob("step-*.*"):
                shutil.rmtree(leftover)
        for step in self._mesh.from_first(sorted(_steps(self._out / "state"), reverse=True)):
            damage: Exception | None = None
            try:
                self._check(step)
            except UnsupportedError:
                raise
            except (CheckpointError, OSError, ValueError, KeyError) as error:
                damage = error
                print(f"gemel: the checkpoint of step {step} is passed over: {error}", file=sys.stderr)
            if not self._mesh.any(damage is not None):
                return self._read(step)
        return None

    def _check(self, step: int) -> None:
        """A part of the files of a step, on each rank another: to read all of them would take one too long."""
        folder = self._out / "state" / name_of(step)
        stored = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        if stored["version"] != VERSION:
            raise UnsupportedError(
                f"{folder} is of version {stored['version']} and this gemel reads version {VERSION}: go on with the gemel that wrote it, "
                f"or begin another run from its model, with [model] kind = 'pretrained' and path = '{self._out / name_of(step)}'"
            )
        for name, xxh3 in list(stored["files"].items())[self._mesh.rank :: self._mesh.num_ranks]:
            self._mesh.at(f"checking {name}")
            if checksum(self._out / name) != xxh3:
                raise CheckpointError(f"{self._out / name} is damaged")

    def _read(self, step: int) -> Found:
        folder = self._out / "state" / name_of(step)
        state, index = (json.loads((folder / name).read_text(encoding="utf-8")) for name in (_STATE, _INDEX))
        return Found(step, self._out / name_of(step), _join(state["state"], pieces.find(folder, index)))

    # --- in the thread that writes ---------------------------------------------------------------------------------------------------

    def _work(self, save: _Save) -> None:
        try:
            self._together.do(lambda: self._write(save), lambda written: self._commit(save, written))
        except BaseException as error:
            self._error = error

    def _write(self, save: _Save) -> Json:
        """What this rank writes; about it, what rank 0 must know."""
        with self._room(save.step):
            state, lent = self._drafts / f"{name_of(save.step)}.state", self._drafts / f"{name_of(save.step)}.lent"
            for folder, share in ((state, save.tensors), (lent, Share() if self._mesh.first else save.weights)):
                if share:
                    folder.mkdir(parents=True, exist_ok=True)
                    pieces.write(folder / self._file, share)
            if save.tensors:
                _force(state / self._file)
            xxh3 = checksum(state / self._file) if save.tensors else None
            return {"file": self._file, "xxh3": xxh3, "lent": bool(save.weights) and not self._mesh.first}

    def _commit(self, save: _Save, written: Sequence[Json]) -> None:
        """Make of what all ranks have written a checkpoint."""
        with self._room(save.step):
            lent = self._drafts / f"{name_of(save.step)}.lent"
            others = pieces.find(lent, pieces.index(lent, [one["file"] for one in written if one["lent"]]))
            files = self._place_model(save, save.weights.join(others))
            shutil.rmtree(lent, ignore_errors=True)
            self._place_state(save, files, {one["file"]: one["xxh3"] for one in written if one["xxh3"]})
            self._link("latest", save.step)
            if save.best:
                self._link("best", save.step)
            self._prune()

    def _place_model(self, save: _Save, weights: Share) -> dict[str, str]:
        """The checksums of its files."""
        weights.check()
        name = name_of(save.step)
        draft = self._drafts / f"{name}.model"
        self._tokenizer.save(draft)
        outline = build.outline(save.loaded.config, next(iter(weights.values())).dtype)
        build.save(replace(save.loaded, model=outline), draft / "model", read=lambda parameter: weights[parameter].whole())
        for file in (draft / "model").iterdir():
            file.replace(draft / file.name)
        (draft / "model").rmdir()
        files = {f"{name}/{file.relative_to(draft)}": checksum(file) for file in _files(draft)}
        _place(draft, self._out / name)
        return files

    def _place_state(self, save: _Save, files: dict[str, str], written: Mapping[str, str]) -> None:
        folder = Path("state", name_of(save.step))
        draft = self._drafts / f"{name_of(save.step)}.state"
        draft.mkdir(parents=True, exist_ok=True)
        index = pieces.index(draft, written)
        pieces.find(draft, index).check()
        (draft / _INDEX).write_text(json.dumps(index, separators=(",", ":")), encoding="utf-8")
        files |= {f"{folder}/{file}": xxh3 for file, xxh3 in {**written, _INDEX: checksum(draft / _INDEX)}.items()}
        (draft / _STATE).write_text(json.dumps({"version": VERSION, "files": files, "state": save.state}, indent=1), encoding="utf-8")
        _place(draft, self._out / folder)

    def _link(self, name: str, step: int) -> None:
        draft = self._drafts / name
        draft.unlink(missing_ok=True)
        draft.symlink_to(name_of(step))
        draft.replace(self._out / name)

    def _prune(self) -> None:
        """States first: a model without a state is only a model, a state without its model is nothing."""
        states = sorted(_steps(self._out / "state"))
        kept = set(states[-self._config.keep :])
        for step in states:
            if step not in kept:
                shutil.rmtree(self._out / "state" / name_of(step))
        best = self._out / "best"
        for step in _steps(self._out):
            if best.is_symlink() and best.readlink().name == name_of(step):
                continue
            if step not in kept and not (self._config.keep_every and step % self._config.keep_every == 0):
                shutil.rmtree(self._out / name_of(step))

    @contextmanager
    def _room(self, step: int) -> Iterator[None]:
        """Say what it means that the disk does not take what is written."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            by = f" by rank {self._mesh.rank} ({socket.gethostname()})" if self._mesh.num_ranks > 1 else ""
            raise CheckpointError(
                f"the checkpoint of step {step} cannot be written to {self._out}{by}: {error}; make room there, and the same command goes "
                "on from the one before it, which is whole"
            ) from error


def _steps(folder: Path) -> list[int]:
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return [int(match[1]) for match in map(_NAME.fullmatch, names) if match]


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _force(file: Path) -> None:
    """What was written to it is on the disk."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def _place(draft: Path, folder: Path) -> None:
    """Force a folder to the disk and give it its name."""
    for file in _files(draft):
        _force(file)
    sync([draft, *(path for path in draft.rglob("*") if path.is_dir())])
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():  # of a save that was killed before its state had come
        shutil.rmtree(folder)
    draft.replace(folder)
    sync([folder.parent])


def _split(value: Any, name: str, tensors: Share, first: bool) -> Any:
    """The same without tensors, which go to `tensors`, those outside of shares only on the first rank; their names stand in their place."""
    if isinstance(value, Tensor):
        if first:
            tensors[name] = Pieces.of(value.detach())
        return {"tensor": name}
    if isinstance(value, Share):
        tensors |= {f"{name}/{key}": inner for key, inner in value.items()}
        return {"share": name}
    if isinstance(value, Mapping):
        return {key: _split(inner, f"{name}/{key}".lstrip("/"), tensors, first) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_split(inner, f"{name}/{i}", tensors, first) for i, inner in enumerate(value)]
    assert value is None or isinstance(value, str | int | float), f"{name} is {type(value).__name__}, which JSON does not know"
    return value


def _join(value: Any, tensors: Share) -> Any:
    """The way back."""
    if isinstance(value, dict):
        if value.keys() == {"tensor"} and value["tensor"] in tensors:
            return tensors[value["tensor"]].whole().clone()
        if value.keys() == {"share"}:
            start = f"{value['share']}/"
            return Share({name.removeprefix(start): inner for name, inner in tensors.items() if name.startswith(start)})
        return {key: _join(inner, tensors) for key, inner in value.items()}
    return [_join(inner, tensors) for inner in value] if isinstance(value, list) else value

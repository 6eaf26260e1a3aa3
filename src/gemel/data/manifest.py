"""What has been done, on disk: the plan of a run, one record per finished task, and the manifest of a finished run.

A task is done when its record is there, and not before. Its files are written under other names, made durable, and renamed; only then is
the record written, in the same way. So whatever is killed whenever, a restart finds either a whole task or none of it, and does again what
is missing; tasks are pure, so files that a killed task has already renamed are replaced by the same bytes. A file without a record can
therefore not be mistaken for a result, and neither can half a file.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson
import xxhash

from gemel.config.errors import ConfigError
from gemel.data.read.reader import Piece

VERSION: str = import_module("gemel").__version__  # by name, because the package's front door leads to rooms above this one
PRETTY = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE | orjson.OPT_SORT_KEYS


@dataclass(frozen=True, slots=True)
class Entry:
    """A finished file: rows, bytes, and the xxHash3 of all bytes (128 bits, hexadecimal)."""

    rows: int
    bytes: int
    xxh3: str


class Shard:
    """A file in the making: an output stream that counts and hashes, and becomes `folder/name` by `commit` or never."""

    def __init__(self, output: Path, name: str):
        self.name = name
        self._path = output / name
        temporary = output / "work" / "tmp"
        temporary.mkdir(parents=True, exist_ok=True)
        self._temporary = temporary / f"{name.replace('/', '.')}.{os.getpid()}.{secrets.token_hex(4)}"
        self._file = self._temporary.open("wb")
        self._hash = xxhash.xxh3_128()
        self._bytes = 0
        self.closed = False

    def write(self, data: Any) -> int:
        """As a binary file's; `data` is anything that has bytes."""
        view = memoryview(data)
        self._hash.update(view)
        self._bytes += view.nbytes
        self._file.write(view)
        return view.nbytes

    def tell(self) -> int:
        """Bytes written."""
        return self._bytes

    def flush(self) -> None:
        """Nothing: what is not committed need not be anywhere."""

    def close(self) -> None:
        """Nothing: writers close what they are given, but only `commit` makes a file."""

    def readable(self) -> bool:
        """Never."""
        return False

    def seekable(self) -> bool:
        """Never."""
        return False

    def writable(self) -> bool:
        """Always."""
        return True

    def commit(self, rows: int) -> Entry:
        """Make the file durable and give it its name. The name is durable after `sync` of its folder."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary.replace(self._path)
        return Entry(rows, self._bytes, self._hash.hexdigest())

    def abandon(self) -> None:
        """Leave no trace."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)


def sync(folders: Iterable[Path]) -> None:
    """Make the names in these folders durable."""
    for folder in folders:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_file(output: Path, name: str, data: bytes) -> Entry:
    """A whole small file at once, durable with its name."""
    shard = Shard(output, name)
    shard.write(data)
    entry = shard.commit(0)
    sync([(output / name).parent])
    return entry


def checksum(path: Path) -> str:
    """The hash that `Entry` has."""
    found = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            found.update(chunk)
    return found.hexdigest()


def fingerprint(path: Path) -> str:
    """The hash of a file, or of a folder's files with their names. Errors: `ConfigError` if there is nothing of that name."""
    if path.is_file():
        return checksum(path)
    if not path.is_dir():
        raise ConfigError(f"{path} is not there; the recipe names it, relative to {Path.cwd()}")
    whole = xxhash.xxh3_128()
    for file in sorted(path.rglob("*")):
        if file.is_file():
            whole.update(f"{file.relative_to(path)}\0{checksum(file)}\0".encode())
    return whole.hexdigest()


@dataclass(frozen=True, slots=True)
class Plan:
    """How the work is cut: fixed when a run begins, and the same for everyone who takes part.

    recipe      `Recipe.what()`
    units       each some pieces of one input, with the number of that input
    corpus      which steps, counted from 0, compare documents with each other and so end a pass over the text
    num_ranges  into how many parts their keys are divided
    files       what steps read beside the input, by name: the xxHash3 of it
    """

    recipe: dict[str, Any]
    units: tuple[tuple[int, tuple[Piece, ...]], ...]
    corpus: tuple[int, ...]
    num_ranges: int
    files: dict[str, str] = field(default_factory=dict)
    version: str = VERSION

    @classmethod
    def read(cls, output: Path) -> Self | None:
        """The plan that is being followed in a folder, None if there is none."""
        try:
            values = orjson.loads((output / "plan.json").read_bytes())
        except FileNotFoundError:
            return None
        units = tuple((number, tuple(Piece(*piece) for piece in pieces)) for number, pieces in values["units"])
        return cls(values["recipe"], units, tuple(values["corpus"]), values["num_ranges"], values.get("files", {}), values["version"])

    def write(self, output: Path) -> None:
        """Write it, unless somebody else was faster."""
        units = [[number, [[piece.path, piece.start, piece.stop, piece.weight_bytes] for piece in pieces]] for number, pieces in self.units]
        values = {**asdict(self), "units": units}
        shard = Shard(output, f"work/plan.{secrets.token_hex(4)}.json")
        shard.write(orjson.dumps(values, option=orjson.OPT_SORT_KEYS) + b"\n")
        shard.commit(len(units))
        written = output / shard.name
        try:
            os.link(written, output / "plan.json")
        except FileExistsError:
            pass
        finally:
            written.unlink()
        sync([output])

    def require_same(self, other: Plan, output: Path) -> None:
        """Refuse to go on where `other`, the plan in `output`, was made of something else. Errors: `ConfigError`."""
        way_out = f"give another --output, or remove {output} to begin anew"
        if other.version != self.version:
            raise ConfigError(f"{output} was begun by gemel {other.version}, this is {self.version}, whose steps may differ; {way_out}")
        if changes := list(differences("", other.recipe, self.recipe)):
            raise ConfigError(f"{output} holds the result of another recipe ({'; '.join(changes[:4])}); {way_out}")
        if other.files != self.files:
            names = sorted(name for name in other.files.keys() | self.files.keys() if other.files.get(name) != self.files.get(name))
            raise ConfigError(f"{', '.join(names[:4])} changed since {output} was begun, and its steps read that; {way_out}")
        if other.units != self.units:
            before, now = (_sizes(plan) for plan in (other, self))
            parts = [f"{path} is new" for path in now.keys() - before.keys()]
            parts += [f"{path} is gone" for path in before.keys() - now.keys()]
            parts += [
                f"{path} had {before[path]} bytes and has {now[path]}" for path in before.keys() & now.keys() if before[path] != now[path]
            ]
            raise ConfigError(f"the input has changed since {output} was begun ({'; '.join(sorted(parts)[:4])}); {way_out}")


def _sizes(plan: Plan) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for _, pieces in plan.units:
        for piece in pieces:
            sizes[piece.path] = sizes.get(piece.path, 0) + piece.weight_bytes
    return sizes


def differences(where: str, before: Any, now: Any) -> Iterable[str]:
    """How two nested values differ, one short sentence for each place."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            yield from differences(f"{where}.{key}".lstrip("."), before.get(key), now.get(key))
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for number, (old, new) in enumerate(zip(before, now, strict=True)):
            yield from differences(f"{where}.{number}", old, new)
    elif before != now:
        yield f"{where} was {_brief(before)} and is {_brief(now)}"


def _brief(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)} tables" if value and isinstance(value[0], dict) else str(value)
    return "not set" if value is None else f"a {value.get('kind', 'table')}" if isinstance(value, dict) else repr(value)


@dataclass(slots=True)
class Record:
    """What a finished task leaves behind: its files by name, its figures, and the seconds it took, which no result may depend on."""

    files: dict[str, Entry] = field(default_factory=dict)
    stats: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Self:
        """A record from its file."""
        values = orjson.loads(path.read_bytes())
        files = {name: Entry(**entry) for name, entry in values.pop("files").items()}
        return cls(files=files, **values)

    def write(self, output: Path, stage: str, index: int) -> None:
        """Make the task done. Its files must have been committed."""
        sync({(output / name).parent for name in self.files})
        write_file(output, record_name(stage, index), orjson.dumps(asdict(self), option=orjson.OPT_SORT_KEYS))


def record_name(stage: str, index: int) -> str:
    """Where the record of a task is, relative to the output."""
    return f"work/done/{stage}/{index:06d}.json"


def done(output: Path, stage: str) -> set[int]:
    """The tasks of a stage that are done."""
    folder = output / "work" / "done" / stage
    return {int(path.stem) for path in folder.glob("*.json")} if folder.is_dir() else set()


class Lock:
    """Keeps two runs from writing to one folder at once. The kernel releases it however the process ends.

    `shared` is for members of one run, who may all be there at once, but not with others.
    """

    def __init__(self, output: Path, shared: bool):
        (output / "work").mkdir(parents=True, exist_ok=True)
        self._output = output
        self._mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX

    def __enter__(self) -> Self:
        self._file = (self._output / "work" / "lock").open("a")
        try:
            fcntl.flock(self._file, self._mode | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ConfigError(f"another run is writing to {self._output}; wait for it, or give another --output") from None
        except OSError:
            pass  # this file system has no locks; two runs would do work twice, and still agree on every byte
        if self._mode == fcntl.LOCK_EX:
            shutil.rmtree(self._output / "work" / "tmp", ignore_errors=True)  # what killed runs have left
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()


def locked(output: Path) -> bool | None:
    """Whether somebody holds the lock of a folder now; None where that cannot be known."""
    try:
        with (output / "work" / "lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None  # no lock was ever there, or this file system has none
    return False


def write_manifest(output: Path, files: Mapping[str, Entry], stats: Mapping[str, Any]) -> None:
    """What a finished run consists of. Holds no times, hosts or worker numbers: equal results have equal manifests."""
    values = {"version": VERSION, "files": {name: asdict(entry) for name, entry in files.items()}, "stats": stats}
    write_file(output, "manifest.json", orjson.dumps(values, option=PRETTY))


def read_manifest(output: Path) -> tuple[dict[str, Entry], dict[str, Any]] | None:
    """Files and figures of a finished run; None if there is none."""
    try:
        values = orjson.loads((output / "manifest.json").read_bytes())
    except FileNotFoundError:
        return None
    return {name: Entry(**entry) for name, entry in values["files"].items()}, values["stats"]

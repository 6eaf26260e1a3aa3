"""Files as streams of bytes: found by path, glob or URL, opened at an offset, decompressed as their name says.

Decompression is ours, around the standard library's decoders, for two reasons. What precedes the damage in a truncated file must still come
out, and `gzip.open` discards it; and the output of a small file may be huge, so it comes in chunks of bounded size.
"""

from __future__ import annotations

import bz2
import glob
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from gemel.config.errors import ConfigError
from gemel.data.read.reader import Reading

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

CHUNK_BYTES = 2**17  # fits into a core's own cache, with what is made of it
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")


class Damaged(Exception):
    """A compressed stream that breaks off (`read.truncated`) or is nonsense (`read.corrupt`). All bytes before it have come out."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Found:
    """A file that a recipe names."""

    path: str
    size_bytes: int

    @property
    def compressed(self) -> bool:
        """Whether it must be read from its beginning."""
        return self.path.endswith(COMPRESSIONS)


class Decoder(Protocol):
    """The common face of bz2's, lzma's and zstd's decompressors."""

    @property
    def eof(self) -> bool:
        """One stream has ended; a file may hold several."""

    @property
    def needs_input(self) -> bool:
        """More output needs more input."""

    @property
    def unused_data(self) -> bytes:
        """What follows the stream."""

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        """Some output, at most `max_length` bytes."""


class Gunzip:
    """zlib with the face of the others."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(wbits=31)
        self._full = False

    @property
    def eof(self) -> bool:
        """As `Decoder`'s."""
        return self._zlib.eof

    @property
    def needs_input(self) -> bool:
        """As `Decoder`'s."""
        return not self._zlib.unconsumed_tail and not self._full

    @property
    def unused_data(self) -> bytes:
        """As `Decoder`'s."""
        return self._zlib.unused_data

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        """As `Decoder`'s."""
        out = self._zlib.decompress(self._zlib.unconsumed_tail + data, max(max_length, 0))
        self._full = len(out) == max_length
        return out


DECODERS: dict[str, Callable[[], Decoder]] = {
    ".gz": Gunzip,
    ".zst": zstd.ZstdDecompressor,
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lzma.LZMADecompressor,
}


def find(paths: Sequence[str], suffixes: Sequence[str]) -> list[Found]:
    """The files that paths, globs and URLs name, sorted within each, every file once. Folders are searched for `suffixes`."""
    found: dict[str, Found] = {}
    endings = tuple(suffix + compression for suffix in suffixes for compression in ("", *COMPRESSIONS))
    for path in paths:
        here = _find_remote(path, endings) if "://" in path else _find_local(path, endings)
        if not here:
            raise ConfigError(f"input path {path!r} matches no file" + (f" ending in {', '.join(suffixes)}" if suffixes else ""))
        found |= {file.path: file for file in sorted(here, key=lambda file: file.path) if file.path not in found}
    return list(found.values())


def _find_local(path: str, endings: tuple[str, ...]) -> list[Found]:
    there = Path(path).expanduser()
    if there.is_dir():
        names = [name for name in there.rglob("*") if name.name.endswith(endings)]
    else:
        names = [there] if there.exists() else [Path(name) for name in glob.glob(str(there), recursive=True)]  # noqa: PTH207
    return [Found(str(name), name.stat().st_size) for name in names if name.is_file()]


def _find_remote(url: str, endings: tuple[str, ...]) -> list[Found]:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
        if glob.has_magic(path):
            infos = list(system.glob(path, detail=True).values())
        elif system.isdir(path):
            infos = [info for name, info in system.find(path, detail=True).items() if name.endswith(endings)]
        else:
            infos = [system.info(path)]
    except ImportError as error:
        raise ConfigError(f"{url} needs a package that is not installed: {error}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot find {url}: {error}") from None
    return [Found(system.unstrip_protocol(info["name"]), int(info["size"] or 0)) for info in infos if info["type"] == "file"]


def open_raw(path: str) -> IO[bytes]:
    """The file as it is stored; seekable if it is local."""
    if "://" not in path:
        return Path(path).open("rb", buffering=0)  # chunks are large, so a buffer would only copy them once more
    import fsspec

    system, name = fsspec.core.url_to_fs(path)
    file: IO[bytes] = system.open(name, "rb")
    return file


def stored(path: str, start: int, reading: Reading) -> Iterator[bytes]:
    """The bytes of a file as they are stored, from `start` on."""
    with open_raw(path) as file:
        if start:
            file.seek(start)
        while chunk := file.read(CHUNK_BYTES):
            reading.num_bytes += len(chunk)
            yield chunk


def contents(path: str, reading: Reading, start: int = 0) -> Iterator[bytes]:
    """The bytes that a file means, decompressed if its name says so. `start` is for files that are not. Raises `Damaged` at its end."""
    make = DECODERS.get(Path(path).suffix)
    chunks = stored(path, start, reading)
    return chunks if make is None else decompressed(chunks, make)


def decompressed(chunks: Iterator[bytes], make: Callable[[], Decoder]) -> Iterator[bytes]:
    """The streams of a compressed file, one after the other. Raises `Damaged` where it breaks off or makes no sense."""
    decoder, num_bytes = make(), 0
    begun = False  # the current stream has got some of its bytes
    for chunk in chunks:
        data = chunk
        while data or (begun and not decoder.needs_input):
            if not begun:
                data = data.lstrip(b"\0")  # tapes and some tools pad with zeros between streams
                if not data:
                    break
            begun = True
            try:
                out = decoder.decompress(data, CHUNK_BYTES)
            except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, zstd.ZstdError) as error:
                raise Damaged("read.corrupt", f"after {num_bytes} bytes of content: {error}") from None
            if out:
                num_bytes += len(out)
                yield out
            data = b""
            if decoder.eof:
                data, decoder, begun = decoder.unused_data, make(), False
    if begun:
        raise Damaged("read.truncated", f"the file ends inside its compressed stream, after {num_bytes} bytes of content")

"""Web archives: WARC 1.0 and 1.1 (ISO 28500), and Common Crawl's WET files, which have the same frame.

An archive is usually compressed record by record, one gzip member each. That gives it a grain: a member belongs to the piece in which it
begins, and a reader that starts anywhere looks for the next place where a member begins that unpacks to `WARC/`. The same search leads on
after a damaged record, so that one bad record costs one record. (Compressed bytes that look so by chance do not occur in practice: the gzip
header has to be valid and the first bytes have to unpack to the very word.) Other archives are read from their beginning.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from gemel.config.data.pipeline import WarcInput, WetInput
from gemel.data.document import Document, Dropped
from gemel.data.read import charset, files
from gemel.data.read.http import Response, response
from gemel.data.read.reader import EXCERPT_BYTES, Piece, Reading, cut, printable

MAGIC = b"\x1f\x8b\x08"
VERSION = re.compile(rb"WARC/1\.[01]\r?\n")
MOST_HEADER_BYTES = 2**16
PROBE_BYTES = 1024


class Broken(Exception):
    """A record that does not keep to the format."""


@dataclass(frozen=True, slots=True)
class WarcRecord:
    """`content` is only its beginning if there are more than `max_document_bytes` of it; `num_bytes` counts all."""

    headers: dict[str, str]
    content: bytes
    num_bytes: int


class Buffer:
    """A stream of bytes to take from, holding no more than is asked for and one chunk."""

    def __init__(self, chunks: Iterator[bytes]):
        self._chunks = chunks
        self._data = b""

    def _fill(self) -> bool:
        chunk = next(self._chunks, None)
        self._data += chunk or b""
        return chunk is not None

    def take(self, num_bytes: int, keep_bytes: int) -> bytes:
        """The next `num_bytes`, of which at least the first `keep_bytes` are returned. Fewer come at the end of the stream only."""
        kept: list[bytes] = []
        taken = held = 0
        while taken < num_bytes and (self._data or self._fill()):
            part, self._data = self._data[: num_bytes - taken], self._data[num_bytes - taken :]
            taken += len(part)
            if held < keep_bytes:
                kept.append(part)
                held += len(part)
        if taken < num_bytes:
            raise Broken(f"{num_bytes} bytes are announced, {taken} are there")
        return b"".join(kept)

    def head(self) -> bytes:
        """Everything before the next blank line, blank lines before it left out; nothing at the end of the stream."""
        while True:
            self._data = self._data.lstrip(b"\r\n")
            if self._data or not self._fill():
                break
        while not (end := re.search(rb"\r?\n\r?\n", self._data)):
            if len(self._data) > MOST_HEADER_BYTES:
                raise Broken(f"no end of a header in {len(self._data)} bytes")
            if not self._fill():
                if self._data:
                    raise Broken("the file ends inside a header")
                return b""
        head, self._data = self._data[: end.start()], self._data[end.end() :]
        return head

    def skip_to_record(self) -> bool:
        """Go on to the next line that begins a record; False if there is none."""
        while not (found := VERSION.search(self._data, 1)):
            self._data = self._data[-16:]
            if not self._fill():
                return False
        self._data = self._data[found.start() :]
        return True


def parse(buffer: Buffer, max_bytes: int) -> WarcRecord | None:
    """The next record; None at the end. Raises `Broken`, and what the stream raises."""
    head = buffer.head()
    if not head:
        return None
    version, *lines = head.decode("utf-8", "replace").splitlines()
    if not version.startswith("WARC/1."):
        raise Broken(f"a record begins with {version[:40]!r}, not with WARC/1.0 or WARC/1.1")
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if colon:
            headers[name.strip().lower()] = value.strip()
    length = headers.get("content-length", "")
    if not length.isdecimal():
        raise Broken(f"Content-Length is {length!r}")
    return WarcRecord(headers, buffer.take(int(length), max_bytes + 1), int(length))


class WarcReader:
    """Pages that servers sent (`warc`), or texts that were made of them (`wet`)."""

    def __init__(self, config: WarcInput | WetInput):
        self.config = config
        self.source = config.source or config.kind

    def pieces(self) -> list[Piece]:
        """As `Reader.pieces`."""
        suffixes = (".warc", ".warc.wet", ".wet")
        found = files.find(self.config.paths, suffixes)
        sizes = [(file, self.config.unit_bytes if self._by_members(file.path) else file.size_bytes + 1) for file in found]
        return [piece for file, most in sizes for piece in cut(file.path, file.size_bytes, most)]

    @staticmethod
    def _by_members(path: str) -> bool:
        return path.endswith(".gz") and "://" not in path  # searching needs cheap seeks

    def read(self, piece: Piece, reading: Reading) -> Iterator[Document | Dropped]:
        """As `Reader.read`."""
        if not self._by_members(piece.path):
            try:
                yield from self._records(Buffer(files.contents(piece.path, reading)), f"{piece.path}:", reading)
            except files.Damaged as damage:
                yield self._dropped(piece.path, damage.reason, str(damage))
            return
        with files.open_raw(piece.path) as file:
            offset = next_member(file, piece.start, piece.stop) if piece.start else 0
            while offset is not None and offset < piece.stop:
                member = Member(file, offset, reading)
                try:
                    yield from self._records(Buffer(member.chunks()), f"{piece.path}:{offset}:", reading)
                    offset = member.end
                except files.Damaged as damage:
                    yield self._dropped(f"{piece.path}:{offset}", damage.reason, str(damage))
                    offset = next_member(file, offset + 1, piece.stop)

    def _records(self, buffer: Buffer, place: str, reading: Reading) -> Iterator[Document | Dropped]:
        """The records of one stream."""
        wanted = {"conversion"} if isinstance(self.config, WetInput) else {"response", "resource"}
        number = 0
        while True:
            try:
                record = parse(buffer, self.config.max_document_bytes)
                if record is None:
                    return
                kind = record.headers.get("warc-type", "unknown")
                if kind in wanted:
                    yield self._document(record, f"{place}{number}")
                else:
                    reading.skipped[f"warc.{kind}"] += 1
            except Broken as error:
                yield self._dropped(f"{place}{number}", "read.broken_record", str(error))
                if not buffer.skip_to_record():
                    return
            number += 1

    def _document(self, record: WarcRecord, place: str) -> Document | Dropped:
        headers, most = record.headers, self.config.max_document_bytes
        metadata = {key: headers[name] for key, name in (("url", "warc-target-uri"), ("date", "warc-date")) if name in headers}
        if "url" in metadata:
            metadata["url"] = metadata["url"].strip("<>")  # WARC 1.0 files of wget have them
        made = Document("", headers.get("warc-record-id", place).strip("<>"), self.source, metadata)
        if record.num_bytes > most:
            made.text = printable(record.content[:EXCERPT_BYTES])
            return Dropped(made, "read.too_long", f"{record.num_bytes} bytes, max_document_bytes = {most}")
        if isinstance(self.config, WetInput):
            return self._plain_text(record.content, made)
        if headers["warc-type"] == "resource":
            return self._page(Response(200, headers.get("content-type", ""), record.content), made)
        answer = response(record.content, most)
        return self._page(answer, made) if isinstance(answer, Response) else Dropped(made, *answer)

    def _plain_text(self, data: bytes, made: Document) -> Document | Dropped:
        try:
            made.text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            made.text = printable(data)
            return Dropped(made, "read.not_utf8", f"byte {error.start} is 0x{data[error.start]:02x}")
        return made if made.text.strip() else Dropped(made, "read.empty", f"{len(data)} bytes, all blank")

    def _page(self, answer: Response, made: Document) -> Document | Dropped:
        assert isinstance(self.config, WarcInput)
        if not 200 <= answer.status < 300:
            return Dropped(made, "read.http_status", str(answer.status))
        kind, _, parameters = answer.content_type.partition(";")
        if kind.strip().lower() not in self.config.content_types:
            return Dropped(made, "read.content_type", kind.strip() or "none is given")
        label = re.search(r"charset\s*=\s*[\"']?([\w:.-]+)", parameters, re.IGNORECASE)
        return charset.page(answer.body, label and label[1], made)

    def _dropped(self, name: str, reason: str, detail: str) -> Dropped:
        return Dropped(Document("", name, self.source), reason, detail)


class Member:
    """One gzip member of a file. `end` is where the next begins, once all chunks have been taken."""

    def __init__(self, file: IO[bytes], start: int, reading: Reading):
        self._file = file
        self._reading = reading
        self.start = self.end = start

    def chunks(self) -> Iterator[bytes]:
        """What the member unpacks to. Raises `Damaged`."""
        decoder = files.Gunzip()
        self._file.seek(self.start)
        while not decoder.eof:
            data = self._file.read(2**16) if decoder.needs_input else b""
            if not data and decoder.needs_input:
                raise files.Damaged("read.truncated", f"the file ends inside the record at byte {self.start}")
            try:
                out = decoder.decompress(data, files.CHUNK_BYTES)
            except zlib.error as error:
                raise files.Damaged("read.corrupt", f"the record at byte {self.start}: {error}") from None
            self._reading.num_bytes += len(data)
            if out:
                yield out
        self._reading.num_bytes -= len(decoder.unused_data)
        self.end = self._file.tell() - len(decoder.unused_data)


def next_member(file: IO[bytes], start: int, stop: int) -> int | None:
    """The first offset in [start, stop) at which a gzip member begins that holds a WARC record."""
    offset = start
    while offset < stop:
        file.seek(offset)
        data = file.read(files.CHUNK_BYTES)
        at = data.find(MAGIC)
        while at >= 0 and offset + at < stop:
            file.seek(offset + at)
            try:
                if files.Gunzip().decompress(file.read(PROBE_BYTES), 5) == b"WARC/":
                    return offset + at
            except zlib.error:
                pass
            at = data.find(MAGIC, at + 1)
        if len(data) < len(MAGIC):
            return None
        offset += len(data) - len(MAGIC) + 1
    return None

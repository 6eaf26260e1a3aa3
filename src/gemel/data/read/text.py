"""Documents that are text: plain, Markdown, HTML. One per file, or plain text cut at a separator."""

from __future__ import annotations

import re
from collections.abc import Iterator

from gemel.config.data.pipeline import FileInput, HtmlInput, MarkdownInput, TextInput
from gemel.data.document import Document, Dropped
from gemel.data.read import charset, files
from gemel.data.read.lines import NEWLINE, records
from gemel.data.read.reader import EXCERPT_BYTES, Piece, Reading, cut, printable

FRONT_MATTER = re.compile(r"\A---[ \t]*\n(.*?)^(?:---|\.\.\.)[ \t]*\n", re.DOTALL | re.MULTILINE)
HEADING = re.compile(r"^#{1,6}[ \t]+(.+?)[ \t#]*$", re.MULTILINE)


def whole(path: str, max_bytes: int, reading: Reading) -> bytes | tuple[bytes, str, str]:
    """A file's content; or its beginning, a reason and a detail."""
    chunks: list[bytes] = []
    num_bytes = 0
    try:
        for chunk in files.contents(path, reading):
            num_bytes += len(chunk)
            chunks.append(chunk)
            if num_bytes > max_bytes:
                return chunks[0][:EXCERPT_BYTES], "read.too_long", f"more than max_document_bytes = {max_bytes}"
    except files.Damaged as damage:
        return b"".join(chunks)[:EXCERPT_BYTES], damage.reason, str(damage)
    return b"".join(chunks)


def accepted(document: Document) -> Document | Dropped:
    """A document, unless it is blank."""
    if document.text and not document.text.isspace():
        return document
    return Dropped(document, "read.empty", f"{len(document.text)} characters, all blank")


def unicode_text(data: bytes, name: str, source: str) -> Document | Dropped:
    """UTF-8 with or without a byte order mark, line ends of any system."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Dropped(Document(printable(data), name, source), "read.not_utf8", f"byte {error.start} is 0x{data[error.start]:02x}")
    if "\r" in text:
        text = text.replace("\r\n", "\n")
    return accepted(Document(text, name, source))


class FileReader:
    """One document per file. What the kinds differ in is where they look for files, and what they make of one."""

    suffixes: tuple[str, ...]

    def __init__(self, config: FileInput, source: str):
        self.config = config
        self.source = config.source or source

    def pieces(self) -> list[Piece]:
        """As `Reader.pieces`."""
        return [Piece(file.path, 0, file.size_bytes, file.size_bytes) for file in files.find(self.config.paths, self.suffixes)]

    def read(self, piece: Piece, reading: Reading) -> Iterator[Document | Dropped]:
        """As `Reader.read`."""
        data = whole(piece.path, self.config.max_document_bytes, reading)
        if isinstance(data, bytes):
            yield self.interpret(data, piece.path)
        else:
            beginning, reason, detail = data
            yield Dropped(Document(printable(beginning), piece.path, self.source), reason, detail)

    def interpret(self, data: bytes, path: str) -> Document | Dropped:
        """The content of one file as a document."""
        return unicode_text(data, path, self.source)


class TextReader(FileReader):
    """Plain text."""

    suffixes = (".txt", ".text")

    def __init__(self, config: TextInput):
        super().__init__(config, config.kind)
        self.separator = None if config.separator is None else config.separator.encode()

    def pieces(self) -> list[Piece]:
        """As `Reader.pieces`. Only lines can be cut anywhere: of a longer separator one cannot tell where it begins."""
        if self.separator != NEWLINE:
            return super().pieces()
        found = files.find(self.config.paths, self.suffixes)
        sizes = [(file, file.size_bytes + 1 if file.compressed else self.config.unit_bytes) for file in found]
        return [piece for file, most in sizes for piece in cut(file.path, file.size_bytes, most)]

    def read(self, piece: Piece, reading: Reading) -> Iterator[Document | Dropped]:
        """As `Reader.read`."""
        if self.separator is None:
            yield from super().read(piece, reading)
            return
        plain = not piece.path.endswith(files.COMPRESSIONS)
        chunks = files.contents(piece.path, reading, max(piece.start - 1, 0))
        most = self.config.max_document_bytes
        for record in records(chunks, self.separator, most, piece.start, piece.stop if plain else None):
            name = f"{piece.path}:{record.offset}"
            if record.damage is not None:
                yield Dropped(Document(printable(record.data), name, self.source), record.damage.reason, str(record.damage))
            elif record.num_bytes > most:
                detail = f"{record.num_bytes} bytes, max_document_bytes = {most}"
                yield Dropped(Document(printable(record.data), name, self.source), "read.line_too_long", detail)
            elif record.data.strip():  # blank lines are no documents
                yield unicode_text(record.data.strip(b"\r\n"), name, self.source)


class MarkdownReader(FileReader):
    """Markdown. Front matter is not text of the document, so it goes into the metadata as it stands; so does the first heading."""

    suffixes = (".md", ".markdown")

    def __init__(self, config: MarkdownInput):
        super().__init__(config, config.kind)

    def interpret(self, data: bytes, path: str) -> Document | Dropped:
        """As `FileReader.interpret`."""
        made = unicode_text(data, path, self.source)
        if isinstance(made, Dropped):
            return made
        if front := FRONT_MATTER.match(made.text):
            made.metadata["front_matter"] = front[1]
            made.text = made.text[front.end() :].lstrip("\n")
        if heading := HEADING.search(made.text):
            made.metadata["title"] = heading[1]
        return accepted(made)


class HtmlReader(FileReader):
    """HTML. The text is the source of the page, for an extraction step to read."""

    suffixes = (".html", ".htm", ".xhtml")

    def __init__(self, config: HtmlInput):
        super().__init__(config, config.kind)

    def interpret(self, data: bytes, path: str) -> Document | Dropped:
        """As `FileReader.interpret`."""
        return charset.page(data, None, Document("", path, self.source))

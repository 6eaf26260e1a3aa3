"""Python packages as a corpus: their source files, or the docstrings in them. Nothing is imported, so nothing of them runs.

The standard library is on every machine, which makes it the corpus of examples and tests.
"""

from __future__ import annotations

import ast
import io
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path

from gemel.config.data.pipeline import PackageInput
from gemel.config.errors import ConfigError
from gemel.data.document import Document, Dropped
from gemel.data.read.reader import Piece, Reading, printable
from gemel.data.read.text import accepted, whole

STANDARD_LIBRARY = "stdlib"


class PackageReader:
    """Modules, named as they are imported."""

    def __init__(self, config: PackageInput):
        self.config = config
        self.source = config.source or config.kind

    def pieces(self) -> list[Piece]:
        """As `Reader.pieces`."""
        found = {path: path.relative_to(folder) for name in self.config.names for folder, path in modules(name)}
        kept = [path for path, inside in found.items() if not {*inside.parts, inside.stem} & set(self.config.exclude)]
        if not kept:
            raise ConfigError(f"of the packages {', '.join(self.config.names)}, exclude = {list(self.config.exclude)} leaves nothing")
        return [Piece(str(path), 0, size, size) for path in kept for size in (path.stat().st_size,)]

    def read(self, piece: Piece, reading: Reading) -> Iterator[Document | Dropped]:
        """As `Reader.read`."""
        name = module_name(Path(piece.path))
        data = whole(piece.path, self.config.max_document_bytes, reading)
        if not isinstance(data, bytes):
            yield Dropped(Document(printable(data[0]), name, self.source), data[1], data[2])
            return
        try:
            encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
            text = io.TextIOWrapper(io.BytesIO(data), encoding).read()
        except (SyntaxError, UnicodeDecodeError, LookupError) as error:
            yield Dropped(Document(printable(data), name, self.source), "read.not_utf8", str(error))
            return
        if self.config.part == "source":
            yield accepted(Document(text, name, self.source))
        else:
            yield from self._docstrings(text, name)

    def _docstrings(self, text: str, name: str) -> Iterator[Document | Dropped]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of invalid escapes, which are the package's business
                tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError) as error:
            yield Dropped(Document(text, name, self.source), "read.bad_python", str(error))
            return
        for path, node in _documented(tree, ""):
            docstring = ast.get_docstring(node)
            if docstring and not docstring.isspace():
                yield Document(docstring, f"{name}:{path}" if path else name, self.source)


def _documented(node: ast.AST, path: str) -> Iterator[tuple[str, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Everything that may have a docstring, with its path inside the module, in the order of the file."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield path, node
    for child in ast.iter_child_nodes(node):
        named = isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        yield from _documented(child, f"{path}.{child.name}".lstrip(".") if named else path)  # type: ignore[attr-defined]


def modules(name: str) -> list[tuple[Path, Path]]:
    """The source files of a package or module, or of the standard library, sorted, each after the folder that it is imported from.

    Errors: `ConfigError` if it is not installed.
    """
    if name == STANDARD_LIBRARY:
        folder = Path(sysconfig.get_path("stdlib"))
        return sorted((folder, path) for path in folder.rglob("*.py") if not {"site-packages", "dist-packages"} & set(path.parts))
    places: list[str] | None = None
    found = None
    for i in range(1, len(name.split(".")) + 1):  # find_spec would import the parents
        found = PathFinder.find_spec(".".join(name.split(".")[:i]), places)
        places = list(found.submodule_search_locations or []) if found else []
        if not found:
            raise ConfigError(f"package {name!r} is not installed for {sys.executable}; install it, or name another")
    assert found is not None
    if places:
        return sorted((Path(place).parent, path) for place in places for path in Path(place).rglob("*.py"))
    if not found.origin or not found.origin.endswith(".py"):
        raise ConfigError(f"module {name!r} has no Python source; name another")
    return [(Path(found.origin).parent, Path(found.origin))]


def module_name(path: Path) -> str:
    """The name by which a source file is imported."""
    parts = [] if path.stem == "__init__" else [path.stem]
    folder = path.parent
    while (folder / "__init__.py").exists():
        parts.insert(0, folder.name)
        folder = folder.parent
    return ".".join(parts) or path.stem

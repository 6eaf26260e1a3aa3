"""Language models in the forms of others: ARPA text files, read here; KenLM's binary files, through its own library.

ARPA files carry spellings, so what a token is (words, SentencePiece pieces, characters) is up to who made them; the recipe says it.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from gemel.config.errors import CheckpointError, UnsupportedError
from gemel.data.steps.ngram import NgramModel, Table, Unit
from gemel.data.steps.segment import RunningHash, Segments, hash_of


def load_arpa(file: Path, unit: Unit, fold: bool) -> NgramModel:
    """Reads an ARPA file, perhaps gzipped.

    Raises CheckpointError: a line cannot be understood, or an order has fewer n-grams than the file says.
    """
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
        sizes = _sizes(file, lines)
        hashes: dict[str, int] = {}
        tables = []
        for n, size in enumerate(sizes, 1):
            rows = list(_rows(file, lines, n))
            if len(rows) != size:
                raise CheckpointError(f"{file}: {len(rows)} {n}-grams, {size} announced: the file is cut off or damaged")
            if n == 1:
                hashes = {row[1][0]: hash_of(row[1][0]) for row in rows}
            tables.append(_table(file, rows, n, hashes))
    return NgramModel(tables, unit, fold)


Row = tuple[float, list[str], float]


def _sizes(file: Path, lines: IO[str]) -> list[int]:
    sizes = []
    for line in lines:
        if line.startswith("ngram "):
            sizes.append(int(line.partition("=")[2]))
        elif line.startswith("\\1-grams:"):
            return sizes
    raise CheckpointError(f"{file} is no ARPA file: it has no line \\1-grams:")


def _rows(file: Path, lines: IO[str], n: int) -> Iterator[Row]:
    """The rows of one order, up to the next one's heading."""
    for line in lines:
        if line.startswith("\\"):
            return
        fields = line.split()
        if not fields:
            continue
        try:
            yield float(fields[0]), fields[1 : n + 1], float(fields[n + 1]) if len(fields) > n + 1 else 0.0
        except (ValueError, IndexError):
            raise CheckpointError(f"{file}: not a {n}-gram: {line.strip()!r}") from None


def _table(file: Path, rows: list[Row], n: int, hashes: dict[str, int]) -> Table:
    try:
        words = np.array([[hashes[word] for word in row[1]] for row in rows], np.uint64).reshape(len(rows), n)
    except KeyError as error:
        raise CheckpointError(f"{file}: the word {error.args[0]!r} of a {n}-gram is no 1-gram") from None
    starts = np.arange(len(rows)) * n
    keys = RunningHash(words.ravel()).spans(starts, starts + n)
    order = np.argsort(keys)
    log_p, backoff = (np.array([row[column] for row in rows], np.float32)[order] for column in (0, 2))
    return Table(keys[order], log_p, backoff)


class KenLm:
    """A KenLM binary file, asked through its library one line at a time. Tokens are made here and handed over between spaces."""

    def __init__(self, file: Path, unit: Unit, fold: bool):
        try:
            import kenlm
        except ImportError:
            raise UnsupportedError(f"{file} needs the library of KenLM: pip install kenlm, or give the model as an ARPA file") from None
        self._model = kenlm.Model(str(file))
        self.unit: Unit = unit
        self.fold = fold

    def score(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """See `ngram.Scorer`."""
        log_p, num_tokens = np.zeros(len(texts)), np.zeros(len(texts))
        for number, text in enumerate(texts):
            for line in (text.lower() if self.fold else text).split("\n"):
                tokens = _split(line, self.unit)
                if tokens:
                    log_p[number] += self._model.score(" ".join(tokens), bos=True, eos=True)
                    num_tokens[number] += len(tokens) + 1
        return log_p, num_tokens


def _split(line: str, unit: Unit) -> list[str]:
    if unit == "spaces":
        return line.split()
    if unit == "characters":
        return [character for character in line if not character.isspace()]
    spans = Segments([line]).tokens
    return [line[start:end] for start, end in zip(spans.start.tolist(), spans.end.tolist(), strict=True)]

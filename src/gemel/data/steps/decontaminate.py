"""Decontamination: documents that share long n-grams with evaluation data are dropped, so that a model is not tested on what it was taught.

After GPT-3 (Brown et al. 2020, appendix C): 13 words in a row. Text without word spaces is compared by characters, of which it takes more
to be as telling; which of the two an item of the evaluation data is compared by is decided by what most of it is. Items shorter than one
n-gram cannot be found and are counted in a warning.
"""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gemel.config.data.dedup import DecontaminateConfig
from gemel.config.errors import ConfigError
from gemel.data.document import Document, Dropped
from gemel.data.steps import shingles
from gemel.data.steps.normal import groups, normal
from gemel.data.steps.shingles import Hashes, Words

Hits = npt.NDArray[np.int64]

_FILTER_BITS = 20  # 1 MB, half of a core's second-level cache: nearly all n-grams of a corpus are turned away there


class Decontaminate:
    """The step. Reason: `decontaminate.ngram`; the detail is the first n-gram found and the file it is in."""

    def __init__(self, config: DecontaminateConfig):
        self._config = config
        items = [(number, text) for number, path in enumerate(config.files) for text in _read(path, config.fields)]
        num_words, without_spaces = self._describe([text for _, text in items])
        short = int((num_words < np.where(without_spaces, config.ngram_chars, config.ngram)).sum())
        by_words = [item for item, spaceless in zip(items, without_spaces.tolist(), strict=True) if not spaceless]
        by_chars = [item for item, spaceless in zip(items, without_spaces.tolist(), strict=True) if spaceless]
        if short == len(items):
            names = ", ".join(map(str, config.files))
            raise ConfigError(f"none of the {len(items)} items in {names} has an n-gram of {config.ngram} words; set a smaller ngram")
        if short:
            logging.getLogger(__name__).warning(
                "%d of %d evaluation items are shorter than one n-gram and cannot be found; a smaller ngram finds more", short, len(items)
            )
        self._tables = [_Table(by_words, config.ngram, config), _Table(by_chars, config.ngram_chars, config)]

    def __call__(self, documents: Sequence[Document]) -> Iterable[Document | Dropped]:
        """Drop documents with at least `min_matches` different n-grams of the evaluation data."""
        texts = [document.text for document in documents]
        for group in groups(texts):
            words = shingles.words(texts[group], self._config.normalize)
            found = [(table, table.find(words)) for table in self._tables if len(table.hashes)]
            for number, document in enumerate(documents[group]):
                hits = [(table, rows, where) for table, texts_ in found for rows, where in [texts_[number]] if len(rows)]
                matches = sum(len(np.unique(rows)) for _, rows, _ in hits)
                yield self._drop(document, *hits[0], matches) if matches >= self._config.min_matches else document

    def _describe(self, texts: Sequence[str]) -> tuple[Hits, npt.NDArray[np.bool_]]:
        """How many words each text has, and whether most of them are characters of a script without word spaces."""
        num_words, alone = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for group in groups(texts):
            text = normal(texts[group], self._config.normalize)
            num_words.append(np.diff(shingles.word_starts(text)[1]))
            alone.append(np.diff(np.append(0, np.cumsum(text.alone))[text.starts]))
        return np.concatenate(num_words), 2 * np.concatenate(alone) > np.concatenate(num_words)

    def _drop(self, document: Document, table: _Table, rows: Hits, where: Hits, matches: int) -> Dropped:
        text = normal([document.text], self._config.normalize)
        starts = np.append(shingles.word_starts(text)[0], len(text.codes))
        begin = int(where[0])
        ngram = text.string(int(starts[begin]), int(starts[min(begin + table.n, len(starts) - 1)]))
        path = self._config.files[int(table.files[rows[0]])]
        return Dropped(document, "decontaminate.ngram", f"{ngram!r} is in {path.name}; {matches} such n-grams")


class _Table:
    """All n-grams of evaluation items, sorted, and the number of the file that each is in."""

    def __init__(self, items: Sequence[tuple[int, str]], n: int, config: DecontaminateConfig):
        self.n = n
        words = shingles.words([text for _, text in items], config.normalize)
        grams = _whole(words, n)
        files = np.repeat(np.array([number for number, _ in items], np.int64), np.diff(grams.starts))
        self.hashes, first = np.unique(grams.hashes, return_index=True)
        self.files = files[first]
        self._filter = np.zeros(1 << _FILTER_BITS, np.bool_)
        self._filter[self._low(self.hashes)] = True

    def find(self, words: Words) -> list[tuple[Hits, Hits]]:
        """For each text, its n-grams that are here: their rows, and which of the text's words they start at."""
        grams = _whole(words, self.n)
        maybe = np.flatnonzero(self._filter[self._low(grams.hashes)])
        rows = np.minimum(np.searchsorted(self.hashes, grams.hashes[maybe]), len(self.hashes) - 1)
        hit = self.hashes[rows] == grams.hashes[maybe]
        rows, maybe = rows[hit], maybe[hit]
        ends = np.searchsorted(maybe, grams.starts).tolist()
        return [(rows[i:j], maybe[i:j] - first) for first, (i, j) in zip(grams.starts.tolist(), pairwise(ends), strict=False)]

    @staticmethod
    def _low(hashes: Hashes) -> npt.NDArray[np.int64]:
        return (hashes >> np.uint64(64 - _FILTER_BITS)).astype(np.int64)


def _whole(words: Words, n: int) -> Words:
    """The n-grams of the texts that have as many words."""
    grams = words.ngrams(n)
    enough = np.diff(words.starts) >= n
    counts = np.diff(grams.starts)
    starts = np.zeros(len(grams.starts), np.int64)
    np.cumsum(np.where(enough, counts, 0), out=starts[1:])
    return Words(grams.hashes[np.repeat(enough, counts)], starts)


def _read(path: Path, fields: Sequence[str]) -> Iterator[str]:
    """The items of an evaluation file. Raises ConfigError if there are none."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            text = file.read()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the evaluation file {path}: {error}") from None
    if ".jsonl" not in path.suffixes:
        items = [item for item in text.split("\n\n") if item.strip()]
    else:
        items = []
        for number, line in enumerate(text.splitlines(), 1):
            try:
                items += _strings(json.loads(line), fields, not fields) if line.strip() else ()
            except json.JSONDecodeError as error:
                raise ConfigError(f"{path}, line {number} is not JSON ({error}); mend it, or name the file .txt") from None
    if not items:
        raise ConfigError(f"{path} has no text{' under ' + ', '.join(fields) if fields else ''} to compare with; check files and fields")
    yield from items


def _strings(value: Any, fields: Sequence[str], wanted: bool) -> Iterator[str]:
    match value:
        case str() if wanted:
            yield value
        case dict():
            for key, inner in value.items():
                yield from _strings(inner, fields, wanted or key in fields)
        case list():
            for inner in value:
                yield from _strings(inner, fields, wanted)

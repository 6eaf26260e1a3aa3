"""Language models of n-grams: trained here with modified Kneser-Ney smoothing, or read from ARPA files; a few look-ups per word.

Estimates follow Chen and Goodman (1999, "An empirical study of smoothing techniques for language modeling") with the interpolation and the
counts of Heafield et al. (2013, "Scalable modified Kneser-Ney language model estimation"): raw counts at the highest order and behind the
beginning of a sentence, elsewhere the number of different words seen before. What remains after discounting goes to the next lower order.

A model is a table per order, from the 64-bit hash of an n-gram to its log-probability and the weight of backing off from it, as in an ARPA
file but without spellings. Keys are sorted and found by their leading bits, so a file is a few arrays, and loading it is reading it.
A sentence is a line.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from gemel.config.errors import CheckpointError, ConfigError
from gemel.data.steps.segment import SPACE, Hashes, Index, Mask, RunningHash, Segments, Spans, hash_of, sums

Unit = Literal["words", "spaces", "characters"]  # what a token is: a word or symbol of `segment`; what stands between spaces; a character
Floats = npt.NDArray[np.float32]

BEGIN, END, UNKNOWN = (hash_of(word) for word in ("<s>", "</s>", "<unk>"))
_UNKNOWN_KEY = RunningHash(np.array([UNKNOWN], np.uint64)).windows(1)  # as an n-gram of one word
FORMAT = "gemel n-grams 1"
NEVER = -99.0  # log10 of a probability that is never asked for, as ARPA files have it for <s>


@dataclass(frozen=True)
class Table:
    """All n-grams of one order."""

    keys: Hashes  # sorted
    log_p: Floats  # base 10
    backoff: Floats  # base 10

    @cached_property
    def _index(self) -> tuple[np.uint64, Index]:
        """Where keys with the same leading bits begin: about one key for each, as hashes are spread evenly."""
        bits = max(1, len(self.keys).bit_length())
        shift = np.uint64(64 - bits)
        return shift, np.searchsorted(self.keys, np.arange(1 << bits, dtype=np.uint64) << shift)

    def find(self, keys: Hashes) -> Index:
        """The row of each key, or -1."""
        rows = np.full(len(keys), -1, np.int64)
        if not len(self.keys):
            return rows
        shift, first = self._index
        at = first[keys >> shift]
        open_ = np.flatnonzero(at < len(self.keys))
        while len(open_):
            held, wanted = self.keys[at[open_]], keys[open_]
            hit = open_[held == wanted]
            rows[hit] = at[hit]
            open_ = open_[held < wanted]
            at[open_] += 1
            open_ = open_[at[open_] < len(self.keys)]
        return rows


class Scorer(Protocol):
    """What can say how likely texts are."""

    def score(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """For each text the log10 of its probability, and how many tokens that is, ends of lines included."""


class NgramModel:
    """A model of order `len(tables)`. `fold` reads text in lower case."""

    def __init__(self, tables: Sequence[Table], unit: Unit, fold: bool):
        self.tables = tuple(tables)
        self.unit: Unit = unit
        self.fold = fold
        row = int(self.tables[0].find(_UNKNOWN_KEY)[0])
        self._unknown = float(self.tables[0].log_p[row]) if row >= 0 else NEVER

    def score(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """See `Scorer`."""
        tokens, text_of, begins = tokenize(texts, self.unit, self.fold)
        running = RunningHash(tokens)
        place = np.arange(len(tokens))
        depth = place - np.maximum.accumulate(np.where(begins, place, 0))  # how many tokens before it are in its sentence
        log_p = np.full(len(tokens), self._unknown)
        backoff = np.zeros(len(tokens))  # of the n-gram that ends here, n as in the last round
        for n, table in enumerate(self.tables, 1):
            ends = np.flatnonzero(depth >= n - 1)
            rows = table.find(running.windows(n)[ends - (n - 1)])
            found = rows >= 0
            if n > 1:
                context = np.concatenate(([0.0], backoff[:-1]))
                log_p[ends] += context[ends]
            log_p[ends[found]] = table.log_p[rows[found]]
            backoff = np.zeros(len(tokens))
            backoff[ends[found]] = table.backoff[rows[found]]
        bounds = np.searchsorted(text_of, np.arange(len(texts) + 1))
        return sums(np.where(begins, 0.0, log_p), bounds), sums(~begins, bounds)

    def save(self, file: Path) -> None:
        """Writes one safetensors file."""
        from safetensors.numpy import save_file

        arrays = {
            f"{n}.{name}": np.ascontiguousarray(getattr(table, name))
            for n, table in enumerate(self.tables, 1)
            for name in ("keys", "log_p", "backoff")
        }
        save_file(arrays, file, {"format": FORMAT, "unit": self.unit, "fold": str(self.fold)})

    @classmethod
    def load(cls, file: Path) -> NgramModel:
        """Reads what `save` wrote.

        Raises CheckpointError: the file is something else.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, "numpy") as opened:
                about = opened.metadata() or {}
                if about.get("format") != FORMAT:
                    raise CheckpointError(f"{file} holds no n-gram model ({about.get('format', 'no format')!r} instead of {FORMAT!r})")
                order = len(opened.keys()) // 3
                tables = [Table(*(opened.get_tensor(f"{n}.{name}") for name in ("keys", "log_p", "backoff"))) for n in range(1, order + 1)]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read the n-gram model {file}: {error}") from None
        return cls(tables, about["unit"], about["fold"] == "True")


def tokenize(texts: Sequence[str], unit: Unit, fold: bool) -> tuple[Hashes, Index, Mask]:
    """The tokens of all lines with <s> and </s> around each line: their hashes, which text each is from, and which are <s>."""
    segments = Segments([text.lower() for text in texts] if fold else texts)
    spans = _spans(segments, unit)
    lines = segments.lines
    first = np.searchsorted(spans.start, lines.start)
    # Two more tokens for every line before: <s> stands two places further right for each.
    number = np.arange(len(lines))
    begin_at = first + 2 * number
    last = np.append(first[1:], len(spans))
    end_at = last + 2 * number + 1
    tokens = np.empty(len(spans) + 2 * len(lines), np.uint64)
    is_token = np.ones(len(tokens), np.bool_)
    is_token[begin_at] = is_token[end_at] = False
    tokens[begin_at], tokens[end_at] = np.uint64(BEGIN), np.uint64(END)
    tokens[is_token] = segments.characters.spans(spans.start, spans.end)
    begins = np.zeros(len(tokens), np.bool_)
    begins[begin_at] = True
    text_of = np.repeat(lines.document, last - first + 2)
    return tokens, text_of, begins


def _spans(segments: Segments, unit: Unit) -> Spans:
    if unit == "words":
        return segments.tokens
    filled = segments.kind != SPACE
    if unit == "characters":
        start = np.flatnonzero(filled)
        return Spans(start, start + 1, np.searchsorted(start, segments.bounds))
    before = np.concatenate(([False], filled[:-1]))
    start, end = np.flatnonzero(filled & ~before), np.flatnonzero(~filled & before)
    return Spans(start, end, np.searchsorted(start, segments.bounds))


def train(texts: Iterable[Sequence[str]], order: int = 3, unit: Unit = "words", fold: bool = True, min_count: int = 1) -> NgramModel:
    """A model of these texts, given in batches. Holds all tokens in memory: about 100 bytes per word of text at order 3.

    min_count   n-grams of order 2 and more that occur less often are left out; their probability goes to shorter ones
    Raises ConfigError: there is nothing to learn from.
    """
    parts = [tokenize(batch, unit, fold) for batch in texts]
    tokens = np.concatenate([part[0] for part in parts]) if parts else np.empty(0, np.uint64)
    if not len(tokens):
        raise ConfigError("no text to train an n-gram model from: give files with at least one line of text")
    sentence = np.cumsum(np.concatenate([part[2] for part in parts]))
    counted = list(_count(tokens, sentence, order))
    tables: list[Table] = []
    for n, counts in enumerate(counted, 1):
        tables.append(_smooth(counts, n, counted[n] if n < order else None, tables, min_count))
    return NgramModel(tables, unit, fold)


@dataclass(frozen=True)
class _Counts:
    """N-grams of one order, sorted by key."""

    keys: Hashes
    raw: Index
    context: Hashes  # the n-gram without its last word
    suffix: Hashes  # without its first word
    after_begin: Mask  # its first word is <s>


def _count(tokens: Hashes, sentence: Index, order: int) -> Iterator[_Counts]:
    running = RunningHash(tokens)
    for n in range(1, order + 1):
        last = max(0, len(tokens) - n + 1)
        inside = np.flatnonzero(sentence[:last] == sentence[n - 1 :])
        keys, first, raw = np.unique(running.windows(n)[inside], return_index=True, return_counts=True)
        place = inside[first]
        context = running.spans(place, place + n - 1)
        yield _Counts(keys, raw, context, running.spans(place + 1, place + n), tokens[place] == np.uint64(BEGIN))


def _smooth(counts: _Counts, n: int, higher: _Counts | None, lower: list[Table], min_count: int) -> Table:
    """The table of order n, and the backing-off weights of the order below, now that all of its continuations are known."""
    adjusted = counts.raw.copy()
    if higher is not None:  # how many different words stand before it
        suffixes, different = np.unique(higher.suffix, return_counts=True)
        rows = np.searchsorted(counts.keys, suffixes)
        adjusted[rows] = np.where(counts.after_begin[rows], counts.raw[rows], different)
    asked = ~counts.after_begin if n == 1 else np.ones(len(counts.keys), np.bool_)  # nothing leads to <s>
    kept = asked if n == 1 else counts.raw >= min_count
    discounted = adjusted - _discounts(adjusted[asked])[np.minimum(adjusted, 3)]
    contexts, group = np.unique(counts.context, return_inverse=True)  # of order 1 there is one, of no words
    total = np.bincount(group, adjusted * asked)
    given = np.bincount(group, discounted * (kept & asked)) / total
    left = np.clip(1.0 - given, 1e-12, 1.0)  # the probability that shorter n-grams share
    if n == 1:
        return _unigrams(counts.keys, np.where(asked, discounted / total[group], 0.0), asked, float(left[0]))
    below = lower[-1]
    held = below.find(contexts)  # some were left out for being rare
    below.backoff[held[held >= 0]] = np.log10(left[held >= 0])
    # Every suffix of an n-gram that is kept is kept too: it occurs at least as often.
    rows = below.find(counts.suffix[kept])
    p = discounted[kept] / total[group[kept]] + left[group[kept]] * 10.0 ** below.log_p[rows].astype(np.float64)
    return Table(counts.keys[kept], np.log10(p).astype(np.float32), np.zeros(int(kept.sum()), np.float32))


def _unigrams(keys: Hashes, p: npt.NDArray[np.float64], asked: Mask, left: float) -> Table:
    """Words share what is left with one that was never seen."""
    uniform = left / (int(asked.sum()) + 1)
    log_p = np.where(asked, np.log10(p + uniform), NEVER)
    keys, log_p = np.append(keys, _UNKNOWN_KEY), np.append(log_p, np.log10(uniform))
    order = np.argsort(keys)
    return Table(keys[order], log_p[order].astype(np.float32), np.zeros(len(keys), np.float32))


def _discounts(adjusted: Index) -> npt.NDArray[np.float64]:
    """What to take from counts of 0, 1, 2, and 3 or more (Chen and Goodman 1999, equation 26)."""
    n1, n2, n3, n4 = (int((adjusted == count).sum()) for count in (1, 2, 3, 4))
    if n1 and n2 and n3 and n4:
        y = n1 / (n1 + 2 * n2)
        estimated = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
        if ((estimated >= 0) & (estimated <= [0, 1, 2, 3])).all():
            return estimated
    return np.array([0.0, 0.5, 1.0, 1.5])  # too little text, or not natural text: KenLM's fallback

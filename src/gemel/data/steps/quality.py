"""Gopher, C4 and FineWeb rules in one pass: a batch of documents is cut into words and lines once, and each rule is a line of arithmetic.

Rules apply in the order in which FineWeb applied them: the document as it came (Gopher), then its lines (C4), then the lines that are left
(C4's count of sentences, FineWeb). A document that breaks several rules keeps the first one, in the order of `QUALITY_RULES`.

Words are counted by `segment`: in scripts without spaces `characters_per_word` characters make a word, so one threshold serves Chinese,
English, and a page that mixes them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from gemel.config.data.rules import QUALITY_RULES, QualityConfig
from gemel.config.errors import ConfigError
from gemel.data.document import Document, Dropped
from gemel.data.steps.repetition import Repeat, first_repeats
from gemel.data.steps.segment import CLOSERS, SYMBOL, UNSPACED, WORD, Mask, Segments, Spans, batches, hash_of, sums

Floats = npt.NDArray[np.float64]

LETTERS_PER_WORD = 6  # with the space behind it, in English: what makes "30 characters" mean as many words in Chinese
BULLETS = "•‣▪●◦·-*–"
LINE_ENDS = ".?!\"'。？！．｡”’」』»"  # C4 asks for . ? ! or an end quotation mark
_CITATION = re.compile(r"\[(?:\d*|edit|citation needed)\]")


class Quality:
    """Drops what is not prose, and lines that are not sentences."""

    def __init__(self, config: QualityConfig):
        self.config = config
        for language, words in config.stop_words.items():
            for word in words:
                if len(Segments([word]).words) != 1:
                    raise ConfigError(
                        f"stop word {word!r} ({language}) is not one word here: give words without spaces, single characters in Chinese"
                    )
        self._stop_words = {code: [np.uint64(hash_of(word)) for word in words] for code, words in config.stop_words.items()}

    def __call__(self, documents: Sequence[Document]) -> Iterable[Document | Dropped]:
        """One answer per document, in order; texts lose the lines that C4's rules reject."""
        for batch in batches(documents):
            yield from self._judge(batch)

    def _judge(self, documents: list[Document]) -> Iterator[Document | Dropped]:
        limit = self.config.max_characters
        huge = np.array([len(document.text) > limit and self.config.asks("gopher.long") for document in documents])
        texts = ["" if skip else document.text for document, skip in zip(documents, huge, strict=True)]
        page, verdicts = _Page(Segments(texts), self.config), _Verdicts(len(documents))
        verdicts.broken("gopher.long", huge, lambda n: f"{len(documents[n].text)} characters > {limit}")
        _gopher_counts(page, verdicts, self._stop_words, [document.metadata.get("language") for document in documents])
        _gopher_repetition(page, verdicts)
        lines = _Lines(page, texts)
        _c4(page, lines, verdicts)
        _fineweb(page, lines, verdicts)
        lines.rewrite(documents, verdicts.clean())
        for number, document in enumerate(documents):
            reason = verdicts.first(number)
            yield Dropped(document, *reason) if reason else document


class _Verdicts:
    """Which rule each document broke first, and by how much."""

    def __init__(self, count: int):
        self._first: list[tuple[int, str] | None] = [None] * count

    def broken(self, rule: str, where: Mask, detail: Callable[[int], str]) -> None:
        rank = QUALITY_RULES.index(rule)
        for number in np.flatnonzero(where):
            held = self._first[number]
            if held is None or rank < held[0]:
                self._first[number] = rank, detail(int(number))

    def clean(self) -> Mask:
        """Documents that broke none so far."""
        return np.array([held is None for held in self._first], np.bool_)

    def first(self, number: int) -> tuple[str, str] | None:
        held = self._first[number]
        return held and (QUALITY_RULES[held[0]], held[1])


class _Page:
    """What several rules want to know of a batch, and how a rule is asked."""

    def __init__(self, segments: Segments, config: QualityConfig):
        self.segments = segments
        self.config = config
        self.words = self.count_words(segments.words)
        self.text_length = np.diff(segments.bounds) - 1

    def count_words(self, spans: Spans, chosen: Mask | None = None) -> Floats:
        """Words per document, where some characters make one in scripts without spaces."""
        return sums(self.word_weight if chosen is None else self.word_weight * chosen, spans.bounds)

    @cached_property
    def word_weight(self) -> Floats:
        weight: Floats = np.where(self.segments.word_kind == UNSPACED, 1.0 / self.config.characters_per_word, 1.0)
        return weight

    def above(self, verdicts: _Verdicts, rule: str, value: Floats, limit: float) -> None:
        if self.config.asks(rule):
            verdicts.broken(rule, value > limit, lambda n: f"{value[n]:.4g} > {limit:.4g}")

    def below(self, verdicts: _Verdicts, rule: str, value: Floats, limit: float) -> None:
        if self.config.asks(rule):
            verdicts.broken(rule, value < limit, lambda n: f"{value[n]:.4g} < {limit:.4g}")


def _share(part: Floats, whole: Floats, otherwise: float = 0.0) -> Floats:
    share = np.full(len(part), otherwise)
    np.divide(part, whole, out=share, where=whole > 0)
    return share


def _is_ellipsis(segments: Segments) -> Mask:
    """For each token: `...`, `…`, `……`."""
    first = segments.points[segments.tokens.start]
    found: Mask = (first == ord("…")) | ((first == ord(".")) & (segments.tokens.length >= 3))
    return found


def _gopher_counts(page: _Page, verdicts: _Verdicts, stop_words: dict[str, list[np.uint64]], languages: list[str | None]) -> None:
    gopher, segments = page.config.gopher, page.segments
    page.below(verdicts, "gopher.short", page.words, gopher.min_words)
    page.above(verdicts, "gopher.long", page.words, gopher.max_words)

    spaced = segments.word_kind == WORD
    num_spaced = segments.words.total(spaced)
    mean = _share(segments.words.total(segments.words.length * spaced), num_spaced)
    asked = (num_spaced > 0) & (num_spaced >= segments.words.total() / 2)
    page.below(verdicts, "gopher.word_length", np.where(asked, mean, np.inf), gopher.min_word_length)
    page.above(verdicts, "gopher.word_length", np.where(asked, mean, 0.0), gopher.max_word_length)

    page.above(verdicts, "gopher.hashes", _share(sums(segments.points == ord("#"), segments.bounds), page.words), gopher.max_hashes)
    ellipsis = _is_ellipsis(segments)
    page.above(verdicts, "gopher.ellipses", _share(segments.tokens.total(ellipsis), page.words), gopher.max_ellipses)
    num_lines = segments.lines.total()
    bullet = np.isin(segments.points[segments.lines.start], np.array([ord(c) for c in BULLETS], np.uint32))
    page.above(verdicts, "gopher.bullet_lines", _share(segments.lines.total(bullet), num_lines), gopher.max_bullet_lines)
    trailing = ellipsis[segments.line_tokens[1] - 1]
    page.above(verdicts, "gopher.ellipsis_lines", _share(segments.lines.total(trailing), num_lines), gopher.max_ellipsis_lines)

    has_letter = segments.letters[segments.words.end] > segments.letters[segments.words.start]
    free_symbols = segments.tokens.total(_free_standing(segments))
    alphabetic = _share(page.count_words(segments.words, has_letter), page.words + free_symbols)
    page.below(verdicts, "gopher.alphabetic_words", alphabetic, gopher.min_alphabetic_words)
    page.below(verdicts, "gopher.stop_words", _stop_words(segments, stop_words, languages), gopher.min_stop_words)


def _free_standing(segments: Segments) -> Mask:
    """Symbols with space on both sides, which a count of words between spaces would take for words."""
    tokens, kind = segments.tokens, segments.kind
    before = (tokens.start == 0) | (kind[np.maximum(tokens.start, 1) - 1] == 0)
    alone: Mask = (segments.token_kind == SYMBOL) & before & (kind[tokens.end] == 0)
    return alone


def _stop_words(segments: Segments, tables: dict[str, list[np.uint64]], languages: list[str | None]) -> Floats:
    """How many different stop words each document has; infinitely many where its language has no table."""
    best = np.zeros(len(segments))
    for code, hashes in tables.items():
        different = np.zeros(len(segments))
        for word in hashes:
            places = np.flatnonzero(segments.word_hash == word)
            different[np.searchsorted(segments.words.bounds, places, side="right") - 1] += 1  # once per document, however often
        speaks = np.array([language is None or language == code for language in languages])
        best = np.where(speaks, np.maximum(best, different), best)
    unknown = np.array([language is not None and language not in tables for language in languages])
    return np.where(unknown, np.inf, best)


def _gopher_repetition(page: _Page, verdicts: _Verdicts) -> None:
    gopher, segments = page.config.gopher, page.segments
    length = page.text_length.astype(np.float64)
    for name, spans, share, characters in (
        ("line", segments.lines, gopher.max_duplicate_lines, gopher.max_duplicate_line_characters),
        ("paragraph", segments.paragraphs, gopher.max_duplicate_paragraphs, gopher.max_duplicate_paragraph_characters),
    ):
        again = _seen_before(segments, spans)
        page.above(verdicts, f"gopher.duplicate_{name}s", _share(spans.total(again), spans.total()), share)
        page.above(verdicts, f"gopher.duplicate_{name}_characters", _share(spans.total(spans.length * again), length), characters)
    asked = {rule for rule in QUALITY_RULES if rule.endswith("_gram") and page.config.asks(rule)}
    if not asked:
        return
    repeats = first_repeats(segments, verdicts.clean(), page.text_length, gopher, asked, page.config.characters_per_word)
    for number, repeat in enumerate(repeats):
        if repeat:
            verdicts.broken(repeat.rule, np.arange(len(segments)) == number, lambda _, r=repeat: _explain(r))  # type: ignore[misc]


def _explain(repeat: Repeat) -> str:
    return f"{repeat.share:.4g} > {repeat.limit:.4g}"


def _seen_before(segments: Segments, spans: Spans, chosen: Mask | None = None) -> Mask:
    """Which lines or paragraphs, of those chosen, equal an earlier one of the same document."""
    again = np.zeros(len(spans), np.bool_)
    places = np.arange(len(spans)) if chosen is None else np.flatnonzero(chosen)
    key = segments.hash_lines(spans)[places]
    owner = spans.document[places]
    order = np.lexsort((key, owner))  # stable: the earliest of equals stays first
    key, owner = key[order], owner[order]
    again[places[order[1:]]] = (key[1:] == key[:-1]) & (owner[1:] == owner[:-1])
    return again


class _Lines:
    """The lines of a batch, which of them C4's rules keep, and the text that is left."""

    def __init__(self, page: _Page, texts: list[str]):
        self.page = page
        self.spans = page.segments.lines
        self.kept = np.ones(len(self.spans), np.bool_)
        self._removed: dict[str, Mask] = {}
        self._lowered = _lower("\n".join(texts))

    def remove(self, rule: str, where: Mask) -> None:
        """Lines that earlier rules removed do not count again."""
        if self.page.config.asks(rule):
            self._removed[rule] = where & self.kept
            self.kept = self.kept & ~where

    def _places(self, phrase: str) -> list[int]:
        places, place = [], self._lowered.find(phrase)
        while place >= 0:
            places.append(place)
            place = self._lowered.find(phrase, place + 1)
        return places

    def with_phrase(self, phrase: str) -> Mask:
        """Lines in which a phrase stands, in any case."""
        hits = np.zeros(len(self.spans), np.bool_)
        hits[np.searchsorted(self.spans.start, self._places(phrase), side="right") - 1] = True
        return hits

    def documents_with(self, phrase: str) -> Mask:
        """Documents in which a phrase stands, in any case."""
        hits = np.zeros(len(self.page.segments), np.bool_)
        hits[np.searchsorted(self.page.segments.bounds, self._places(phrase), side="right") - 1] = True
        return hits

    def rewrite(self, documents: Sequence[Document], chosen: Mask) -> None:
        """Takes removed lines and citations out of the texts chosen, and notes how many of each under the metadata's counts."""
        spans, offsets = self.spans, self.page.segments.bounds
        removed = {rule: spans.total(mask).astype(np.int64).tolist() for rule, mask in self._removed.items() if mask.any()}
        complete = (spans.total(self.kept) == spans.total()).tolist()
        for number in np.flatnonzero(chosen).tolist():
            document, text = documents[number], documents[number].text
            counts = {} if complete[number] else {rule: totals[number] for rule, totals in removed.items()}
            if not complete[number]:
                lo, hi = spans.bounds[number : number + 2]
                kept, offset = np.flatnonzero(self.kept[lo:hi]) + lo, int(offsets[number])
                bounds = zip((spans.start[kept] - offset).tolist(), (spans.end[kept] - offset).tolist(), strict=True)
                text = "\n".join(text[start:end] for start, end in bounds)
            if "[" in text and self.page.config.asks("c4.citation"):
                text, counts["c4.citation"] = _CITATION.subn("", text)
            if any(counts.values()):
                document.text = text
                held = document.metadata.setdefault("counts", {})
                for rule, count in counts.items():
                    if count:
                        held[rule] = held.get(rule, 0) + count


def _lower(text: str) -> str:
    """In lower case, with every character where it was (İ alone becomes two)."""
    lowered = text.lower()
    return lowered if len(lowered) == len(text) else "".join(low if len(low := c.lower()) == 1 else c for c in text)


def _c4(page: _Page, lines: _Lines, verdicts: _Verdicts) -> None:
    c4, segments, config = page.config.c4, page.segments, page.config
    for rule, phrase in (("c4.lorem_ipsum", "lorem ipsum"), ("c4.curly_bracket", "{")):
        if config.asks(rule):
            verdicts.broken(rule, lines.documents_with(phrase), lambda _, p=phrase: f"contains {p!r}")  # type: ignore[misc]
    if config.asks("c4.long_word"):
        lines.remove("c4.long_word", _has_long_word(segments, c4.max_word_length))
    first, last = segments.line_tokens
    final = segments.points[segments.lines.end - 1]
    ends_well = np.isin(final, np.array([ord(c) for c in LINE_ENDS], np.uint32)) & ~_is_ellipsis(segments)[last - 1]
    lines.remove("c4.line_punctuation", ~ends_well)
    weight = np.zeros(len(segments.tokens))
    weight[segments.token_kind != SYMBOL] = page.word_weight
    words_in_line = sums(weight, np.append(first, last[-1:])) if len(first) else np.zeros(0)
    lines.remove("c4.line_words", words_in_line < c4.min_line_words)
    if config.asks("c4.javascript"):
        lines.remove("c4.javascript", lines.with_phrase("javascript"))
    if config.asks("c4.policy"):
        for_policy = np.zeros(len(lines.kept), np.bool_)
        for phrase in c4.policy_phrases:
            for_policy |= lines.with_phrase(phrase.lower())
        lines.remove("c4.policy", for_policy)
    page.below(verdicts, "c4.sentences", _sentences(segments, lines.kept), c4.min_sentences)


def _has_long_word(segments: Segments, limit: int) -> Mask:
    """Lines with more than `limit` characters between two spaces. Scripts without spaces have no such words."""
    spans = segments.lines
    hits = np.zeros(len(spans), np.bool_)
    for number in np.flatnonzero(spans.length > limit):
        start, end = spans.start[number], spans.end[number]
        gaps = np.flatnonzero((segments.kind[start:end] == 0) | (segments.kind[start:end] == UNSPACED))
        hits[number] = np.diff(np.concatenate(([-1], gaps, [end - start]))).max() - 1 > limit
    return hits


def _sentences(segments: Segments, kept: Mask) -> Floats:
    """Sentences in the lines kept: ends of sentences, and one more where a line does not close with one."""
    spans, ends = segments.lines, segments.sentence_ends
    inside = np.searchsorted(ends, spans.end) - np.searchsorted(ends, spans.start)
    closing = np.array([ord(c) for c in CLOSERS], np.uint32)
    last = spans.end - 1
    last = np.where(np.isin(segments.points[last], closing), np.maximum(last - 1, spans.start), last)
    closed = np.isin(last, ends)
    return spans.total((inside + ~closed) * kept)


def _fineweb(page: _Page, lines: _Lines, verdicts: _Verdicts) -> None:
    fineweb, segments = page.config.fineweb, page.segments
    spans, kept = lines.spans, lines.kept
    num_lines = spans.total(kept)
    ended = np.isin(segments.points[spans.end - 1], _sentence_end_points()) & kept
    page.below(verdicts, "fineweb.line_punctuation", _share(spans.total(ended), num_lines, 1.0), fineweb.min_line_punctuation)

    unspaced = segments.unspaced[spans.end] - segments.unspaced[spans.start]
    width = spans.length + unspaced * (LETTERS_PER_WORD / page.config.characters_per_word - 1)
    short = (width <= fineweb.short_line) & kept
    page.above(verdicts, "fineweb.short_lines", _share(spans.total(short), num_lines), fineweb.max_short_lines)

    again = _seen_before(segments, spans, kept)
    characters = spans.total(spans.length * kept)
    repeated = _share(spans.total(spans.length * again), characters)
    page.above(verdicts, "fineweb.duplicate_line_characters", repeated, fineweb.max_duplicate_line_characters)

    line_of_word = np.searchsorted(spans.start, segments.words.start, side="right") - 1
    words = page.count_words(segments.words, kept[line_of_word])
    page.above(verdicts, "fineweb.newlines", _share(np.maximum(num_lines - 1, 0), words), fineweb.max_newlines)


def _sentence_end_points() -> npt.NDArray[np.uint32]:
    return np.array([ord(c) for c in ".!?。！？．｡؟۔।॥"], np.uint32)

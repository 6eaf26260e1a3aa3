"""How much of a document repeats itself: Gopher's n-gram rules, for many documents at once.

Rae et al. 2021 (arXiv 2112.11446, table A1) ask for the share of characters in the most frequent sequence of n words (n = 2, 3, 4) and in
sequences of n words that occurred before (n = 5 ... 10), the latter counted greedily: after a repeated sequence the search goes on behind
it. That is a loop over every word, nine times. Almost no document needs it, because two sorts bound all nine shares from above:

- A sequence of 3 or 4 words lies within two pairs that are at least as frequent; so twice the greatest product of a pair's count and length
  bounds the top sequence of 2, 3 and 4.
- Every repeated sequence of 5 to 10 words lies within sequences of 5 that occurred before; so what those cover bounds all six.

Only where a bound reaches a limit is the share itself worked out, one document at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from gemel.config.data.rules import Gopher
from gemel.data.steps.segment import UNSPACED, Hashes, Index, Mask, RunningHash, Segments

TOP, DUPLICATE = (2, 3, 4), (5, 6, 7, 8, 9, 10)


@dataclass(frozen=True, slots=True)
class Repeat:
    """The first n-gram rule that a document breaks."""

    rule: str
    share: float
    limit: float


class _Words:
    """The words of one document, ready for windows of any width."""

    def __init__(self, segments: Segments, document: int, text_length: int, unspaced: bool, scale: float):
        lo, hi = segments.words.bounds[document : document + 2]
        self.running = RunningHash(segments.word_hash[lo:hi])
        self.before = np.concatenate(([0], np.cumsum(segments.words.length[lo:hi])))  # characters up to each word
        self.text_length = text_length
        self.gap = 0 if unspaced else 1
        self.scale = scale if unspaced else 1.0


def first_repeats(
    segments: Segments, chosen: Mask, text_length: Index, gopher: Gopher, asked: set[str], characters_per_word: float
) -> list[Repeat | None]:
    """For each document chosen the first n-gram rule that it breaks, of those asked. Lengths are in characters, of the whole text."""
    words = segments.words
    # A sequence of words in Chinese is longer in characters: what is asked of 5 words is asked of 8 characters.
    unspaced = words.total(segments.word_kind == UNSPACED) > words.total() / 2
    found: list[Repeat | None] = [None] * len(segments)
    top, duplicate = _suspects(segments, unspaced, text_length, gopher, characters_per_word)
    for document in np.flatnonzero(chosen & (top | duplicate)).tolist():
        one = _Words(segments, document, int(text_length[document]), bool(unspaced[document]), characters_per_word)
        if top[document]:
            found[document] = _first(one, "top", zip(TOP, gopher.max_top_n_gram, strict=True), asked, _top)
        if duplicate[document] and found[document] is None:
            found[document] = _first(one, "duplicate", zip(DUPLICATE, gopher.max_duplicate_n_gram, strict=True), asked, _duplicate)
    return found


def _suspects(segments: Segments, unspaced: Mask, text_length: Index, gopher: Gopher, scale: float) -> tuple[Mask, Mask]:
    """Documents whose bounds reach a limit: of top sequences, of duplicate ones. Each kind of script is windowed in its own way."""
    words = segments.words
    over_top, over_duplicate = np.zeros((2, len(segments)), np.bool_)
    running = RunningHash(segments.word_hash)
    lengths = np.concatenate(([0], np.cumsum(words.length)))
    for is_unspaced in np.unique(unspaced):
        pair, widest, five = (_scaled(n, scale if is_unspaced else 1.0) for n in (TOP[0], TOP[-1], DUPLICATE[0]))
        spaces = 0 if is_unspaced else pair
        top = _greatest_product(*_windows(running, words.bounds, pair), pair, spaces, lengths, len(segments)) * -(-widest // pair)
        covered = _covered(*_windows(running, words.bounds, five), five, lengths, len(segments))
        over_top |= (unspaced == is_unspaced) & (top > min(gopher.max_top_n_gram) * text_length)
        over_duplicate |= (unspaced == is_unspaced) & (covered > min(gopher.max_duplicate_n_gram) * text_length)
    return over_top, over_duplicate


def _scaled(n: int, scale: float) -> int:
    return round(n * scale)


def _windows(running: RunningHash, bounds: Index, width: int) -> tuple[Hashes, Index, Index]:
    """Hashes of all sequences of `width` words within a document, different in each document; their places and documents."""
    counts = np.maximum(np.diff(bounds) - width + 1, 0)
    document = np.repeat(np.arange(len(counts)), counts)
    place = np.arange(len(document)) + np.repeat(bounds[:-1] - np.concatenate(([0], np.cumsum(counts)[:-1])), counts)
    salt = (document.astype(np.uint64) + np.uint64(1)) * np.uint64(0xD6E8FEB86659FD93)
    return running.windows(width)[place] ^ salt, place, document


def _greatest_product(hashes: Hashes, place: Index, document: Index, width: int, spaces: int, lengths: Index, num_documents: int) -> Index:
    """For each document the greatest product of count and length, spaces included, over the sequences that occur in it more than once."""
    order = np.argsort(hashes)
    ranked = hashes[order]
    first = np.flatnonzero(np.concatenate(([True], ranked[1:] != ranked[:-1])))[: len(ranked)]
    counts = np.diff(np.append(first, len(ranked)))
    often = counts > 1
    at, counts = order[first[often]], counts[often]
    most = np.zeros(num_documents, np.int64)
    np.maximum.at(most, document[at], counts * (lengths[place[at] + width] - lengths[place[at]] + spaces))
    return most


def _covered(hashes: Hashes, place: Index, document: Index, width: int, lengths: Index, num_documents: int) -> Index:
    """Characters of each document in sequences that occurred before in it."""
    ranked = np.sort(hashes)
    repeated = np.unique(ranked[1:][ranked[1:] == ranked[:-1]])
    if not len(repeated):
        return np.zeros(num_documents, np.int64)
    at = np.minimum(np.searchsorted(repeated, hashes), len(repeated) - 1)
    hits = np.flatnonzero(repeated[at] == hashes)
    _, first = np.unique(hashes[hits], return_index=True)
    later = np.delete(hits, first)
    start, end, owner = place[later], place[later] + width, document[later]
    # Places ascend, so a window adds what reaches beyond the one before it.
    start[1:] = np.maximum(start[1:], end[:-1])
    return np.bincount(owner, lengths[end] - lengths[np.minimum(start, end)], num_documents).astype(np.int64)


def _first(
    words: _Words, name: str, limits: Iterable[tuple[int, float]], asked: set[str], measure: Callable[[_Words, int], int]
) -> Repeat | None:
    for n, limit in limits:
        if (rule := f"gopher.{name}_{n}_gram") in asked:
            share = measure(words, _scaled(n, words.scale)) / words.text_length
            if share > limit:
                return Repeat(rule, share, limit)
    return None


def _top(words: _Words, width: int) -> int:
    """Characters of the most frequent sequence, all occurrences together, with the spaces in it. The first one of equally frequent ones."""
    _, first, counts = np.unique(words.running.windows(width), return_index=True, return_counts=True)
    most = int(counts.max(initial=0))
    if most < 2:
        return 0
    place = int(first[counts == most].min())
    return most * int(words.before[place + width] - words.before[place] + words.gap * (width - 1))


def _duplicate(words: _Words, width: int) -> int:
    """Characters of sequences that occurred before; a repeated sequence is stepped over, so that nothing counts twice."""
    _, name, counts = np.unique(words.running.windows(width), return_inverse=True, return_counts=True)
    places = np.flatnonzero(counts[name] > 1)  # others can neither be nor have a repetition
    seen: set[int] = set()
    behind = characters = 0
    for place, sequence in zip(places.tolist(), name[places].tolist(), strict=True):
        if place < behind:
            continue
        if sequence in seen:
            behind = place + width
            characters += int(words.before[behind] - words.before[place])
        else:
            seen.add(sequence)
    return characters

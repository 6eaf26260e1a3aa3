from __future__ import annotations

import math
import random

import numpy as np
import pytest

from gemel.config.data.dedup import MinHashConfig, Normalize
from gemel.data.document import Document, Dropped
from gemel.data.steps import minhash, shingles
from gemel.data.steps.minhash import MinHash, components
from gemel.data.steps.shingles import Words
from tests.data import corpus
from tests.tolerance import CHI_SQUARE_P

RNG = random.Random(7)
WORDS = ["".join(RNG.choices("abcdefghijklmnop", k=RNG.randint(2, 9))) for _ in range(3000)]
HAN = [chr(RNG.randrange(0x4E00, 0x9000)) for _ in range(1500)]


def prose(length: int, words: list[str] = WORDS, gap: str = " ") -> list[str]:
    return [word + gap for word in RNG.choices(words, k=length)]


def edited(words: list[str], count: int, others: list[str] = WORDS, gap: str = " ") -> list[str]:
    """`count` words replaced, spread evenly."""
    words = list(words)
    for i in range(count):
        words[(2 * i + 1) * len(words) // (2 * count)] = RNG.choice(others) + gap
    return words


@pytest.fixture(scope="module")
def mixed() -> list[Document]:
    """Originals, copies that differ in case and numbers, copies with some edits, in English and Chinese, and short and empty ones."""
    texts = []
    for number in range(12):
        han = number % 2
        base = prose(300, HAN if han else WORDS, "" if han else " ")
        texts += ["".join(base), "".join(edited(base, 2, HAN if han else WORDS, "" if han else " "))]
    texts += ["Released 2024-01-02, VERSION 1.", "released 1999/11/30: version 22", "", "...", "two words", "Two words!"]
    order = RNG.sample(range(len(texts)), len(texts))
    return corpus.documents(*(texts[i] for i in order))


def test_signatures_are_the_smallest_products() -> None:
    step = MinHash(MinHashConfig(bands=3, rows=2))
    texts = ["a b c d e f g", "", "x", " ".join(WORDS[:500])]
    grams = shingles.words(texts, Normalize()).ngrams(5)
    odd = step._odd.tolist()
    want = []
    for i in (0, 2, 3):
        values = [int(h) >> 32 | 1 for h in grams.hashes[grams.starts[i] : grams.starts[i + 1]]]
        want.append([min(value * a % 2**32 for value in values) for a in odd])
    assert step.signatures(grams).tolist() == want


def test_signatures_do_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    step = MinHash(MinHashConfig())
    grams = shingles.words(["".join(prose(RNG.randint(1, 60))) for _ in range(50)], Normalize()).ngrams(5)
    whole = step.signatures(grams)
    monkeypatch.setattr(minhash, "_BLOCK_NGRAMS", 64)
    assert np.array_equal(step.signatures(grams), whole)


@pytest.mark.parametrize("shared", [50, 200, 320])
def test_signatures_agree_as_often_as_the_sets_overlap(shared: int) -> None:
    """Broder's theorem: the share of equal places is the Jaccard similarity, up to chance."""
    step, jaccard = MinHash(MinHashConfig(bands=256, rows=8)), shared / (2 * 400 - shared)
    rng = np.random.default_rng(shared)
    pool = rng.integers(0, 2**64, 2 * 400 - shared, np.uint64)
    pair = np.concatenate([pool[:400], pool[-400:]])
    left, right = step.signatures(Words(pair, np.array([0, 400, 800])))
    z = (np.mean(left == right) - jaccard) / math.sqrt(jaccard * (1 - jaccard) / len(left))
    assert math.erfc(abs(z) / math.sqrt(2)) > CHI_SQUARE_P


def test_one_of_each_cluster_is_kept_the_first(mixed: list[Document]) -> None:
    answers, _ = corpus.run(MinHash(MinHashConfig()), mixed)
    assert len(corpus.kept(answers)) == 12 + 4  # of each pair one; the number-only pair; two that have no words; "two words"
    first: dict[str, str] = {}
    for answer, document in zip(answers, mixed, strict=True):
        begin = document.text[:12].lower()  # edits leave the beginning alone
        begin = "released" if begin.startswith("released") else begin[:9]
        if isinstance(answer, Dropped):
            assert answer.reason == "minhash.duplicate"
            assert begin in first
        elif document.text.strip("."):
            assert begin not in first
            assert answer.metadata == {"minhash": {"copies": 2}}
            first[begin] = document.id


@pytest.mark.parametrize("cutting", corpus.CUTTINGS)
def test_the_result_does_not_depend_on_the_cutting(mixed: list[Document], cutting: tuple[int, int, int]) -> None:
    step = MinHash(MinHashConfig())
    assert corpus.outcome(corpus.run(step, mixed, *cutting)[0]) == corpus.outcome(corpus.run(step, mixed)[0])


def test_normalization_is_a_choice() -> None:
    documents = corpus.documents("Version 1 of the thing, here", "VERSION 2 of the thing here")
    assert corpus.kept(corpus.run(MinHash(MinHashConfig()), documents)[0]) == ["d0"]
    assert corpus.kept(corpus.run(MinHash(MinHashConfig(normalize=Normalize())), documents)[0]) == ["d0", "d1"]


def test_details_name_the_document_that_is_kept() -> None:
    text = "the same words in every one of them"
    answers, _ = corpus.run(MinHash(MinHashConfig()), corpus.documents("other", text, "else", text), units=2)
    assert isinstance(answers[3], Dropped)
    assert answers[3].detail == "of document 1 of unit 0, one of 2 alike"


def test_chains_are_one_cluster() -> None:
    base = prose(400)
    texts = ["".join(base)]
    for number in range(1, 6):
        base[number * 60] = "changed "
        base[number * 60 + 30] = "changed "
        texts.append("".join(base))
    assert corpus.kept(corpus.run(MinHash(MinHashConfig(bands=32, rows=4)), corpus.documents(*texts))[0]) == ["d0"]


def test_components_are_those_of_a_search() -> None:
    rng = np.random.default_rng(3)
    for count, edges in ((1, 0), (50, 20), (200, 190), (300, 900)):
        left, right = rng.integers(0, count, (2, edges))
        want = np.arange(count)
        for _ in range(count):
            for a, b in zip(left, right, strict=True):
                want[a] = want[b] = min(want[a], want[b])
            if np.array_equal(want[left], want[right]):
                break
        assert components(count, left, right).tolist() == want.tolist()
    chain = rng.permutation(1000)
    assert components(1000, chain[:-1], chain[1:]).max() == 0

from __future__ import annotations

import re

import numpy as np
import pytest

from gemel.config.data.dedup import EVERYTHING, Normalize
from gemel.data.steps import shingles
from gemel.data.steps.normal import BLOCK_CHARS, normal

R, Q = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F
MASK = 2**64 - 1
TEXTS = ["The quick brown fox", "", "我们在2024年训练了 GPT 模型。", "a", "...", "one two three four five six seven", "ภาษา ok"]


def split(text: str) -> list[str]:
    """Words of normalized text: Han, kana and Thai characters alone."""
    return re.findall(r"[\u4e00-\u9fff\u3041-\u30ff\u0e00-\u0eff]|[^\s\u4e00-\u9fff\u3041-\u30ff\u0e00-\u0eff]+", text)


def hash_word(word: str) -> int:
    return sum(ord(char) * pow(R, i, 2**64) for i, char in enumerate(word)) & MASK


def mix(value: int) -> int:
    value = ((value ^ value >> 33) * 0xFF51AFD7ED558CCD) & MASK
    value = ((value ^ value >> 33) * 0xC4CEB9FE1A85EC53) & MASK
    return value ^ value >> 33


def hash_ngrams(words: list[str], n: int) -> list[int]:
    count = max(len(words) - n + 1, 1) if words else 0
    mixed = [mix(hash_word(word)) for word in words]
    return [mix(sum(m * pow(Q, k + 1, 2**64) for k, m in enumerate(mixed[i : i + n])) & MASK) for i in range(count)]


@pytest.mark.parametrize("config", [Normalize(), EVERYTHING])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_hashes_are_the_polynomials_of_the_words(config: Normalize, n: int) -> None:
    words = shingles.words(TEXTS, config)
    grams = words.ngrams(n)
    for number, text in enumerate(normal(TEXTS, config).strings()):
        want = split(text)
        assert words.hashes[words.starts[number] : words.starts[number + 1]].tolist() == [hash_word(word) for word in want]
        assert grams.hashes[grams.starts[number] : grams.starts[number + 1]].tolist() == hash_ngrams(want, n)


def test_hashes_do_not_depend_on_the_batch_nor_on_length() -> None:
    long = "词 word  " * BLOCK_CHARS  # several pieces
    texts = ["short", long, "short", "x" * (BLOCK_CHARS + 5), "tail end"]
    together = shingles.words(texts, EVERYTHING)
    for number, text in enumerate(texts):
        alone = shingles.words([text], EVERYTHING)
        assert np.array_equal(alone.hashes, together.hashes[together.starts[number] : together.starts[number + 1]])
    assert np.diff(together.starts).tolist() == [1, 2 * BLOCK_CHARS, 1, 2, 2]  # a word longer than a piece is cut

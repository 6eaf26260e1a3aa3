"""Text that is like prose, made here: seeded, without repetitions, in English and Chinese."""

from __future__ import annotations

import random
import string

from gemel.data.document import Document, Dropped
from gemel.data.step import Step


def english(num_sentences: int = 30, seed: int = 0) -> str:
    """Sentences of made-up words and English stop words; four sentences a line."""
    draw = random.Random(seed)

    def word() -> str:
        return "".join(draw.choices(string.ascii_lowercase, k=draw.randint(3, 9)))

    def sentence() -> str:
        return f"The {word()} of {word()} and {word()} have to {word()} with {word()} {word()}, but {word()} {word()}."

    return "\n".join(" ".join(sentence() for _ in range(min(4, num_sentences - i))) for i in range(0, num_sentences, 4))


def chinese(num_sentences: int = 30, seed: int = 0) -> str:
    """Sentences of common Han characters in any order; four sentences a line."""
    draw = random.Random(seed)

    def some(count: int) -> str:
        return "".join(chr(draw.randint(0x4E00, 0x9FA0)) for _ in range(count))

    def sentence() -> str:
        return f"{some(5)}的{some(6)}，是{some(7)}了{some(4)}。"

    return "\n".join("".join(sentence() for _ in range(min(4, num_sentences - i))) for i in range(0, num_sentences, 4))


def run(step: Step, *texts: str, **metadata: object) -> list[Document | Dropped]:
    """What a step makes of these texts."""
    return list(step([Document(text, str(number), "test", dict(metadata)) for number, text in enumerate(texts)]))


def reason(step: Step, text: str, **metadata: object) -> str:
    """Why a step drops this text, or nothing."""
    (answer,) = run(step, text, **metadata)
    return answer.reason if isinstance(answer, Dropped) else ""


def kept(step: Step, text: str, **metadata: object) -> Document:
    """The document that a step makes of this text."""
    (answer,) = run(step, text, **metadata)
    assert isinstance(answer, Document), answer
    return answer

"""Text to train tokenizers on: the standard library's own sources, and Chinese put together from common words."""

from __future__ import annotations

import json
import random
import re
from functools import cache
from pathlib import Path

from gemel.config.tokenizer import TrainConfig
from gemel.tokenizer.tokenizer import Tokenizer
from gemel.tokenizer.train import train

WORDS = [
    "我们",
    "今天",
    "学习",
    "自然",
    "语言",
    "处理",
    "模型",
    "训练",
    "数据",
    "非常",
    "重要",
    "因为",
    "可以",
    "理解",
    "世界",
    "中国",
    "问题",
]


def english() -> list[str]:
    folder = Path(json.__file__).parent
    return [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))] + [Path(re.__file__).read_text(encoding="utf-8")]


def chinese(num_sentences: int = 300, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices(WORDS, k=draw.randint(3, 9))) + draw.choice("。！？，") for _ in range(num_sentences)]


@cache
def trained(vocab_size: int = 800) -> Tokenizer:
    return train([*english(), *chinese()], TrainConfig(vocab_size=vocab_size))

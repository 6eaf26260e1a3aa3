"""How much a set of conversations repeats itself: distinct n-grams, what is asked for, how long, in what languages.

Distinct-n (Li et al. 2016, arXiv 1510.03055) is the share of n-grams that are different; it falls with the amount of text, so it is taken
over the same number of n-grams each time. What is asked for is told by verbs and their objects, as Self-Instruct does (Wang et al. 2023,
arXiv 2212.10560), but without a parser: in English the first verb-like word of the question and the next word that means something; in
Chinese the first of the verbs that instructions are made of.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from statistics import quantiles
from typing import Any

from gemel.data.conversation.quality import script
from gemel.tokenizer.conversation import Conversation

SAMPLE_NGRAMS = 20_000
MOST_COMMON = 25

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]+(?:['’]\w+)?")
_SMALL = re.compile(  # words that do not say what is asked for
    "(?:a|an|the|of|to|in|on|for|with|and|or|from|by|at|as|is|are|be|this|that|these|those|it|its|your|my|our|their|his|her|some|any|each|"
    "following|given|please|can|could|would|will|you|i|me|we|us|do|does|did|one|two|three|not|no|so|about|into|what|which|who|how|why|when|"
    "where|there|[0-9]+)"
)
_QUESTION = ("what", "which", "who", "whose", "how", "why", "when", "where", "is", "are", "do", "does", "did", "can", "could", "should")
_POLITE = re.compile(
    r"^(?:please|kindly|(?:can|could|would|will) you(?: please)?|help me(?: to)?|i (?:want|need) (?:you )?to|your task is to)\s+"
)
_CHINESE_VERB = re.compile(
    "写出|编写|撰写|写|描述|解释|说明|生成|列出|列举|翻译|总结|概括|分析|比较|对比|给出|提供|创建|创作|设计|计算|判断|分类|改写|重写|推荐|介绍|讲述|讨论|"
    "找出|识别|确定|提出|制定|构建|建议|编辑|修改|回答|选择|预测|评估|排序|转换|提取|定义|证明|求|讲|帮|什么|如何|怎么|为什么|谁|哪"
)


def report(conversations: Sequence[Conversation], seed: int = 0) -> dict[str, Any]:
    """Everything as plain data."""
    instructions = [conversation.instruction for conversation in conversations]
    answers = [conversation.answer for conversation in conversations]
    asked = Counter(map(intent, instructions))
    return {
        "num_conversations": len(conversations),
        "distinct_instructions": len(set(instructions)) / max(len(instructions), 1),
        "instruction_distinct_n": {n: distinct(instructions, n, seed) for n in (1, 2, 3)},
        "answer_distinct_n": {n: distinct(answers, n, seed) for n in (1, 2, 3)},
        "intents": dict(asked.most_common(MOST_COMMON)),
        "num_intents": len(asked),
        "languages": dict(Counter(script(answer) or "none" for answer in answers).most_common()),
        "turns": dict(sorted(Counter(sum(m.role == "assistant" for m in (*c.messages, *c.chosen)) for c in conversations).items())),
        "sources": dict(Counter(conversation.source for conversation in conversations).most_common()),
        "instruction_chars": _spread(list(map(len, instructions))),
        "answer_chars": _spread(list(map(len, answers))),
    }


def words(text: str) -> list[str]:
    """Words in lower case; a Chinese character or a kana is one."""
    return _WORD.findall(text.lower())


def distinct(texts: Sequence[str], n: int, seed: int = 0) -> float:
    """The share of different n-grams among SAMPLE_NGRAMS of them, or all if there are fewer; of texts in random order."""
    grams: list[tuple[str, ...]] = []
    for text in random.Random(seed).sample(texts, len(texts)):
        parts = words(text)
        grams += [tuple(parts[i : i + n]) for i in range(len(parts) - n + 1)]
        if len(grams) >= SAMPLE_NGRAMS:
            break
    grams = grams[:SAMPLE_NGRAMS]
    return len(set(grams)) / max(len(grams), 1)


def intent(instruction: str) -> str:
    """What is asked for, in one or two words; "other" if that cannot be told."""
    text = instruction.strip().lower()
    if script(text) == "zh":
        found = _CHINESE_VERB.search(text)
        return found[0] if found else "other"
    parts = words(_POLITE.sub("", text))
    if not parts:
        return "other"
    if parts[0] in _QUESTION:
        return " ".join(parts[:2]) if parts[0] in ("how", "what") and len(parts) > 1 else parts[0]
    meaningful = [part for part in parts[1:12] if not _SMALL.fullmatch(part)]
    return " ".join([parts[0], *meaningful[:1]])


def _spread(lengths: Sequence[int]) -> dict[str, float]:
    if len(lengths) < 2:
        return {"median": float(lengths[0]) if lengths else 0.0}
    cuts = quantiles(lengths, n=20)
    return {"p5": cuts[0], "median": cuts[9], "p95": cuts[18], "max": float(max(lengths))}

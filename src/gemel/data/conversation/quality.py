"""Steps that choose among conversations. Each takes all of them, in order, and answers for each: kept, or dropped with a reason.

Conversations are few enough to be in memory together, so a step may compare them all. What needs a model (language, perplexity, similarity,
reward) is a function that the recipe names; steps here only hold it against the recipe's limits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any

import numpy as np

from gemel.config.data.conversation import LanguageStep, LengthStep, MismatchStep, NearDuplicateStep, RefusalStep, ScoreStep
from gemel.config.errors import ConfigError
from gemel.data.document import Document, Dropped
from gemel.data.step import CorpusStep
from gemel.tokenizer.conversation import Conversation

Answer = Conversation | Dropped
Gain = Callable[[Sequence[Conversation]], Sequence[float | None]]  # how much questions help answers, nats per token; None: not known

# Looked for at the start of an answer only, because a good one may quote such sentences.
REFUSALS = (
    r"\b(?:i(?:'|’)?m|i am) (?:sorry|afraid)\b.{0,40}\b(?:can(?:not|(?:'|’)t)|unable|not able|won(?:'|’)t)\b",
    r"\b(?:i|we) (?:can(?:not|(?:'|’)t)|am unable to|won(?:'|’)t|will not) (?:assist|help|fulfill?|comply|provide|create|answer)\b",
    r"\bas an? (?:ai|artificial intelligence|(?:large )?language)(?: language)?(?: model| assistant)?\b",
    r"\bi(?:'|’)?m (?:just )?an ai\b",
    r"(?:抱歉|对不起|很遗憾|不好意思).{0,12}(?:无法|不能|没办法|不会|不可以)",
    r"(?:作为|身为)(?:一个|一名|一款)?(?:人工智能|AI|ai|大?型?语言模型|智能助手|机器人)",
    r"我(?:只是|是)(?:一个|一名|一款)?(?:人工智能|AI|ai|大?型?语言模型)",
    r"我(?:无法|不能|没有办法)(?:提供|回答|帮助|协助|完成|满足|生成|处理)",
)

# Scripts that tell languages apart without a model; a text belongs to the first that makes up enough of it.
_SCRIPTS = (
    ("ja", re.compile(r"[\u3040-\u30ff]"), 0.1),
    ("ko", re.compile(r"[\uac00-\ud7af]"), 0.2),
    ("zh", re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]"), 0.2),
    ("ru", re.compile(r"[\u0400-\u04ff]"), 0.5),
    ("ar", re.compile(r"[\u0600-\u06ff]"), 0.5),
    ("latin", re.compile(r"[A-Za-z\u00c0-\u024f]"), 0.5),
)


def dropped(conversation: Conversation, reason: str, detail: str) -> Dropped:
    """A conversation that is not wanted, whole, so that it can be read and taken back."""
    text = json.dumps(conversation.as_json(), ensure_ascii=False)
    return Dropped(Document(text, conversation.id, conversation.source), reason, detail)


def length(conversations: Sequence[Conversation], config: LengthStep) -> Iterator[Answer]:
    """Reasons: `sft.short_instruction`, `sft.short_answer`, `sft.long`. A call of a tool is an answer of any length."""
    for conversation in conversations:
        spoken = (*conversation.messages, *conversation.chosen)
        num_chars = sum(len(message.content) for message in spoken)
        asked, answered = len(conversation.instruction.strip()), len(conversation.answer.strip())
        if asked < config.min_instruction_chars:
            yield dropped(
                conversation, "sft.short_instruction", f"{asked} characters, min_instruction_chars = {config.min_instruction_chars}"
            )
        elif answered < config.min_answer_chars and not spoken[-1].tool_calls:
            yield dropped(conversation, "sft.short_answer", f"{answered} characters, min_answer_chars = {config.min_answer_chars}")
        elif num_chars > config.max_chars:
            yield dropped(conversation, "sft.long", f"{num_chars} characters, max_chars = {config.max_chars}")
        else:
            yield conversation


def refusal(conversations: Sequence[Conversation], config: RefusalStep) -> Iterator[Answer]:
    """Reason: `sft.refusal`."""
    try:
        pattern = re.compile("|".join(f"(?:{part})" for part in (*REFUSALS, *config.patterns)), re.IGNORECASE)
    except re.error as error:
        raise ConfigError(f"patterns = {list(config.patterns)}: {error}") from None
    for conversation in conversations:
        found = pattern.search(conversation.answer[: config.chars])
        yield conversation if found is None else dropped(conversation, "sft.refusal", found[0])


def language(conversations: Sequence[Conversation], config: LanguageStep) -> Iterator[Answer]:
    """Reason: `sft.language`. Answers without letters (numbers, code, calls) are of every language."""
    detect: Callable[[str], str] = function(config.detector) if config.detector else script
    for conversation in conversations:
        found = detect(conversation.answer)
        if found in ("", *config.languages):
            yield conversation
        else:
            yield dropped(conversation, "sft.language", f"{found}, languages = {', '.join(config.languages)}")


def script(text: str) -> str:
    """zh, ja, ko, ru, ar or latin by the share of letters in that script; empty if there are no letters, "other" if none fits."""
    num_letters = sum(map(str.isalpha, text))
    if not num_letters:
        return ""
    return next((name for name, letters, share in _SCRIPTS if len(letters.findall(text)) >= share * num_letters), "other")


def score(conversations: Sequence[Conversation], config: ScoreStep) -> Iterator[Answer]:
    """Reason: `sft.NAME`. The score is kept in the metadata under the name."""
    rate: Callable[[str, str], float] = function(config.target)
    low, high = (-float("inf") if config.min is None else config.min), (float("inf") if config.max is None else config.max)
    for conversation in conversations:
        value = float(rate(conversation.instruction, conversation.answer))
        conversation.metadata[config.name] = value
        if low <= value <= high:
            yield conversation
        else:
            limit = f"min = {config.min}" if not value >= low else f"max = {config.max}"
            yield dropped(conversation, f"sft.{config.name}", f"{value:g}, {limit}")


def mismatch(conversations: Sequence[Conversation], config: MismatchStep, gain: Gain) -> Iterator[Answer]:
    """Reason: `sft.mismatch`. The gain is kept in the metadata."""
    for conversation, nats in zip(conversations, gain(conversations), strict=True):
        conversation.metadata["gain"] = nats
        if nats is None or nats >= config.min_gain:
            yield conversation
        else:
            yield dropped(conversation, "sft.mismatch", f"the question helps by {nats:.3f} nats per token, min_gain = {config.min_gain:g}")


def near_duplicate(conversations: Sequence[Conversation], config: NearDuplicateStep) -> Iterator[Answer]:
    """Reason: `sft.near_duplicate`."""
    from gemel.data.steps.minhash import MinHash

    documents = []
    for conversation in conversations:
        spoken = [message.content for message in (*conversation.messages, *conversation.chosen)]
        text = conversation.instruction if config.compare == "instruction" else "\n".join(spoken)
        documents.append(Document(text, conversation.id, conversation.source))
    for conversation, answer in zip(conversations, in_memory(MinHash(config.minhash), documents), strict=True):
        if isinstance(answer, Dropped):
            first = conversations[int(answer.detail.split()[2])]
            yield dropped(conversation, "sft.near_duplicate", f"of {first.id}: {first.instruction[:80]!r}")
        else:
            yield conversation


def in_memory(step: CorpusStep, documents: Sequence[Document]) -> list[Document | Dropped]:
    """A step over a whole corpus, for a corpus that fits into memory: the same passes, without the disk between them."""
    places = np.arange(len(documents), dtype=np.uint64)
    rows = step.keys(documents, places).sort_by([("key", "ascending"), ("place", "ascending")])
    return list(step.apply(documents, places, step.conclude(step.resolve(rows))))


def function(target: str) -> Any:
    """The function that a recipe names as module:name."""
    module, _, name = target.partition(":")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{target!r}: {error}; the module must be importable, see PYTHONPATH") from None
    if not callable(found):
        raise ConfigError(f"{target!r} is a {type(found).__name__}, not a function")
    return found

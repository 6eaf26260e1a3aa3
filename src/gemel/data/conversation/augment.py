"""Steps that add conversations: the same question in other words, with examples before it, with the reasoning said aloud.

They only rearrange what is there; nothing is invented, so no model is needed. Which conversations get a copy, and which form it takes,
follows from a hash of their names and the step's seed: it does not change when others are added. Copies stand behind their originals and
name what they were made of.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

from gemel.config.data.conversation import ChainOfThoughtStep, FewShotStep, ParaphraseStep
from gemel.data.conversation.quality import script
from gemel.tokenizer.conversation import Conversation, Message

PARAPHRASES = {
    "latin": (
        "Please help me with this: {instruction}",
        "{instruction}\nAnswer as well as you can.",
        "I have a task for you.\n\n{instruction}",
        "Here is what I would like to know or have done:\n{instruction}",
        "Task: {instruction}\nResponse:",
    ),
    "zh": (
        "请帮我完成下面的任务：{instruction}",
        "{instruction}\n请尽量回答得准确、完整。",
        "我有一个问题想请教你：\n{instruction}",
        "任务：{instruction}\n回答：",
        "请根据以下要求作答。\n\n{instruction}",
    ),
}
SHOT = {"latin": ("Question: ", "Answer: ", "\n\n"), "zh": ("问题：", "回答：", "\n\n")}
THINK = {"latin": "\nLet's think step by step.", "zh": "\n请一步一步地思考。"}
RESULT = {"latin": "\n\nThe answer is: ", "zh": "\n\n答案是："}
MAX_SHOT_CHARS = 1_000  # longer conversations are no examples


def paraphrase(conversations: Sequence[Conversation], config: ParaphraseStep) -> Iterator[Conversation]:
    """Copies with the first question put into a template of its language."""
    for conversation in conversations:
        yield conversation
        templates = config.templates or PARAPHRASES.get(_language(conversation), ())
        if templates and _draw(conversation, config.seed, "paraphrase") < config.share:
            template = templates[int(_draw(conversation, config.seed, "template") * len(templates))]
            yield _asked(conversation, template.replace("{instruction}", conversation.instruction), "paraphrase")


def few_shot(conversations: Sequence[Conversation], config: FewShotStep) -> Iterator[Conversation]:
    """Copies whose question has other questions and answers of the same source and language before it."""
    shots: dict[tuple[str, str], list[Conversation]] = defaultdict(list)
    for conversation in conversations:
        if _is_single(conversation) and len(conversation.instruction) + len(conversation.answer) <= MAX_SHOT_CHARS:
            shots[conversation.source, _language(conversation)].append(conversation)
    for conversation in conversations:
        yield conversation
        language = _language(conversation)
        others = [shot for shot in _chosen(shots[conversation.source, language], conversation, config) if shot is not conversation]
        if language not in SHOT or not _is_single(conversation) or len(others) < config.examples:
            continue
        if _draw(conversation, config.seed, "few_shot") < config.share:
            ask, tell, between = SHOT[language]
            said = [f"{ask}{shot.instruction}\n{tell}{shot.answer}" for shot in others[: config.examples]]
            yield _asked(conversation, between.join([*said, f"{ask}{conversation.instruction}\n{tell.strip()}"]), "few_shot")


def chain_of_thought(conversations: Sequence[Conversation], config: ChainOfThoughtStep) -> Iterator[Conversation]:
    """Copies that ask for the reasoning and answer with it, where there is one."""
    for conversation in conversations:
        yield conversation
        language, last = _language(conversation), conversation.messages[-1]
        reasoning, result = last.reasoning.strip(), last.content.strip()
        if not reasoning and "\n####" in last.content:
            reasoning, _, result = (part.strip() for part in last.content.partition("\n####"))
        if not reasoning or not result or language not in THINK or not _is_single(conversation):
            continue
        if _draw(conversation, config.seed, "chain_of_thought") < config.share:
            asked = _asked(conversation, conversation.instruction + THINK[language], "chain_of_thought")
            answer = replace(last, content=reasoning + RESULT[language] + result, reasoning="")
            yield replace(asked, messages=(*asked.messages[:-1], answer))


def _language(conversation: Conversation) -> str:
    return script(conversation.instruction)


def _is_single(conversation: Conversation) -> bool:
    """One question and one answer, without tools."""
    roles = [message.role for message in conversation.messages if message.role != "system"]
    return roles == ["user", "assistant"] and not conversation.tools and not conversation.rejected


def _asked(conversation: Conversation, question: str, how: str) -> Conversation:
    """A copy whose first question is another one."""
    at = next(index for index, message in enumerate(conversation.messages) if message.role == "user")
    messages = (*conversation.messages[:at], Message("user", question), *conversation.messages[at + 1 :])
    metadata = {**conversation.metadata, "augmented": how, "original": conversation.id}
    return replace(conversation, messages=messages, id=f"{conversation.id}+{how}", metadata=metadata)


def _chosen(shots: Sequence[Conversation], conversation: Conversation, config: FewShotStep) -> list[Conversation]:
    """Examples for one conversation: some more than are needed, from a place that its name decides."""
    start = int(_draw(conversation, config.seed, "examples") * len(shots))
    return [shots[(start + step) % len(shots)] for step in range(min(len(shots), config.examples + 1))]


def _draw(conversation: Conversation, seed: int, purpose: str) -> float:
    """A number in [0, 1) that depends on nothing but its arguments."""
    digest = hashlib.blake2b(f"{seed}\0{purpose}\0{conversation.source}\0{conversation.id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64

"""Copies say the same in another form, stand behind their originals, and are the same every time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gemel.config.data.conversation import ChainOfThoughtStep, FewShotStep, ParaphraseStep
from gemel.config.errors import ConfigError
from gemel.data.conversation import augment
from gemel.tokenizer.conversation import Conversation, Message
from tests.data.conversation.talks import talk

TALKS = [talk(f"如何解决第{i}个问题？", f"第{i}个答案", f"zh{i}") for i in range(30)]
TALKS += [talk(f"What is {i} plus one?", f"It is {i + 1}.", f"en{i}") for i in range(30)]


def copies(found: list[Conversation]) -> list[Conversation]:
    return [conversation for conversation in found if "augmented" in conversation.metadata]


def test_paraphrases() -> None:
    step = ParaphraseStep(kind="paraphrase", share=0.5)
    found = list(augment.paraphrase(TALKS, step))
    added = copies(found)
    assert 15 < len(added) < 45
    assert [c for c in found if c not in added] == TALKS
    originals = {c.id: c for c in TALKS}
    for copy in added:
        original = originals[copy.metadata["original"]]
        assert original.instruction in copy.instruction
        assert original.instruction != copy.instruction
        assert copy.messages[1:] == original.messages[1:]
        assert found[found.index(copy) - 1] == original
        assert any("\u4e00" <= c <= "\u9fff" for c in copy.instruction) == original.id.startswith("zh")
    assert len({copy.instruction.replace(originals[copy.metadata["original"]].instruction, "") for copy in added}) > 5


def test_the_choice_depends_on_names_and_seed_alone() -> None:
    def chosen(talks: list[Conversation], seed: int) -> set[str]:
        return {c.id for c in copies(list(augment.paraphrase(talks, ParaphraseStep(kind="paraphrase", share=0.3, seed=seed))))}

    assert chosen(TALKS, 0) == chosen(TALKS[::-1], 0)
    assert chosen(TALKS[:20], 0) == {name for name in chosen(TALKS, 0) if name.startswith(tuple(f"zh{i}+" for i in range(20)))}
    assert chosen(TALKS, 0) != chosen(TALKS, 1)


def test_templates_of_the_user() -> None:
    step = ParaphraseStep(kind="paraphrase", share=1, templates=("<<{instruction}>> {x}",))
    assert copies(list(augment.paraphrase([talk("{y}", "b")], step)))[0].instruction == "<<{y}>> {x}"
    with pytest.raises(ConfigError, match="do not contain"):
        ParaphraseStep.parse({"kind": "paraphrase", "templates": ["no question"]})


def test_few_shots() -> None:
    added = copies(list(augment.few_shot(TALKS, FewShotStep(kind="few_shot", share=1, examples=2))))
    assert len(added) == len(TALKS)
    for copy in added:
        original = next(c for c in TALKS if c.id == copy.metadata["original"])
        chinese = original.id.startswith("zh")
        ask, tell = ("问题：", "回答：") if chinese else ("Question: ", "Answer: ")
        assert copy.instruction.count(ask) == 3
        assert copy.instruction.count(original.instruction) == 1
        assert copy.instruction.endswith(f"{ask}{original.instruction}\n{tell.strip()}")
        assert original.answer not in copy.instruction.split()
        assert copy.answer == original.answer
    assert copies(list(augment.few_shot(TALKS[:2], FewShotStep(kind="few_shot", share=1, examples=2)))) == []
    other_source = [replace(c, source=c.id) for c in TALKS]
    assert copies(list(augment.few_shot(other_source, FewShotStep(kind="few_shot", share=1)))) == []


def test_reasoning_is_said_where_there_is_one() -> None:
    gsm = talk("How many?", "There are 2 and 3, so 2 + 3 = 5.\n#### 5", "gsm")
    thought = Conversation(
        (Message("system", "s"), Message("user", "多少？"), Message("assistant", "五", reasoning="二加三")), "think", "test"
    )
    found = list(augment.chain_of_thought([gsm, thought, talk("plain", "answer", "p")], ChainOfThoughtStep(kind="chain_of_thought")))
    assert [c.id for c in found] == ["gsm", "gsm+chain_of_thought", "think", "think+chain_of_thought", "p"]
    assert found[1].instruction == "How many?\nLet's think step by step."
    assert found[1].answer == "There are 2 and 3, so 2 + 3 = 5.\n\nThe answer is: 5"
    assert found[3].answer == "二加三\n\n答案是：五"
    assert found[3].messages[0].content == "s"
    assert found[3].messages[-1].reasoning == ""

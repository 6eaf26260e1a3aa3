"""What each step keeps and drops, in English and Chinese."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gemel.config.data.conversation import LanguageStep, LengthStep, MismatchStep, NearDuplicateStep, RefusalStep, ScoreStep, SftRecipe
from gemel.config.errors import ConfigError
from gemel.data.conversation import quality, sft
from gemel.data.document import Dropped
from gemel.tokenizer.conversation import Conversation, Message, ToolCall
from tests.data.conversation.talks import reasons, talk

HERE = "tests.data.conversation.talks"


def test_length_counts_characters() -> None:
    called = Conversation((Message("user", "天气如何"), Message("assistant", tool_calls=(ToolCall("get"),))), "c", "t")
    found = quality.length(
        [talk("学", "习"), talk("学习", "习"), talk("学习", "学习" * 50), called, talk("学习", "学习 ")],
        LengthStep(kind="length", min_answer_chars=2, max_chars=50),
    )
    assert reasons(found) == ["sft.short_instruction", "sft.short_answer", "sft.long", "", ""]


REFUSED = [
    "I'm sorry, but I can't help with that.",
    "I am afraid that I am unable to open links.",
    "As an AI language model, I do not have feelings.",
    "Sorry. I cannot assist with this request.",
    "抱歉，我无法回答这个问题。",
    "很遗憾，这个我不能告诉你。",
    "作为一个人工智能语言模型，我没有个人观点。",
    "作为AI，我不会感到疲倦。",
    "我是一个语言模型，不能上网。",
    "我无法提供实时信息。",
]
ANSWERED = [
    "I'm sorry to hear that! Here is what you can do.",
    "You cannot divide by zero.",
    "An AI model is a function with parameters.",
    "抱歉让您久等了，您的订单已经发出。",
    "这台机器人无法在水下工作。",
    "人工智能是计算机科学的一个分支。",
    "他说：我无法理解。",
    "A polite refusal would be as follows, at some length. " * 5 + "I'm sorry, but I can't come.",
]


@pytest.mark.parametrize("answer", REFUSED)
def test_refusals_are_found(answer: str) -> None:
    assert reasons(quality.refusal([talk("q", answer)], RefusalStep(kind="refusal"))) == ["sft.refusal"]


@pytest.mark.parametrize("answer", ANSWERED)
def test_answers_are_no_refusals(answer: str) -> None:
    assert reasons(quality.refusal([talk("q", answer)], RefusalStep(kind="refusal"))) == [""]


def test_patterns_of_the_user_are_looked_for_too() -> None:
    assert reasons(quality.refusal([talk("q", "No comment.")], RefusalStep(kind="refusal", patterns=("^no comment",)))) == ["sft.refusal"]
    with pytest.raises(ConfigError, match="patterns"):
        list(quality.refusal([], RefusalStep(kind="refusal", patterns=("(",))))


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("我们今天学习。", "zh"),
        ("使用 Python 的 numpy 库计算矩阵", "zh"),
        ("The word 你好 means hello in the Chinese language", "latin"),
        ("ひらがなと漢字", "ja"),
        ("안녕하세요 세계", "ko"),
        ("Привет, мир", "ru"),
        ("مرحبا بالعالم", "ar"),
        ("γειά σου", "other"),
        ("12 + 3 = 15", ""),
    ],
)
def test_scripts(text: str, language: str) -> None:
    assert quality.script(text) == language


def test_languages_are_kept_by_script_or_by_a_detector() -> None:
    talks = [talk("q", "你好世界"), talk("q", "hello world"), talk("q", "42")]
    assert reasons(quality.language(talks, LanguageStep(kind="language", languages=("zh",)))) == ["", "sft.language", ""]
    own = LanguageStep(kind="language", languages=("h", "4"), detector=f"{HERE}:first_letter")
    assert reasons(quality.language(talks, own)) == ["sft.language", "", ""]


def test_scores_are_held_against_limits_and_kept() -> None:
    step = ScoreStep(kind="score", name="ratio", target=f"{HERE}:longer_than_the_question", min=1, max=3)
    talks = [talk("abc", "a"), talk("abc", "abcdef"), talk("abc", "abc" * 4)]
    found = list(quality.score(talks, step))
    assert reasons(found) == ["sft.ratio", "", "sft.ratio"]
    assert isinstance(found[0], Dropped)
    assert found[0].detail == "0.333333, min = 1.0"
    assert talks[1].metadata == {"ratio": 2.0}


def test_mismatches_are_dropped_and_what_is_not_known_stays() -> None:
    talks = [talk("q", "fits"), talk("q", "does not"), talk("q", "who knows")]
    found = list(quality.mismatch(talks, MismatchStep(kind="mismatch", min_gain=0.1), lambda _: [0.5, -0.25, None]))
    assert reasons(found) == ["", "sft.mismatch", ""]
    assert isinstance(found[1], Dropped)
    assert found[1].detail == "the question helps by -0.250 nats per token, min_gain = 0.1"
    assert [one.metadata["gain"] for one in talks] == [0.5, -0.25, None]


def test_a_mismatch_step_wants_a_judge(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    recipe = SftRecipe.parse({"step": [{"kind": "mismatch", "model": "some"}]})
    with pytest.raises(ConfigError, match="a judge"):
        sft.run([str(tmp_path / "rows.jsonl")], recipe, tmp_path / "out")
    report = sft.run(
        [str(tmp_path / "rows.jsonl")], recipe, tmp_path / "out", lambda model: lambda talks: [-1.0 if model == "some" else 1.0]
    )
    assert report["dropped"] == {"sft.mismatch": 1}


def test_an_error_of_the_function_is_not_hidden() -> None:
    step = ScoreStep(kind="score", name="log", target="math:log", min=0)
    with pytest.raises(TypeError, match="must be real number"):
        list(quality.score([talk("a", "b")], step))


@pytest.mark.parametrize("target", ["nowhere.at_all:f", f"{HERE}:missing", f"{HERE}:NO_FUNCTION"])
def test_a_target_that_is_no_function_says_so(target: str) -> None:
    with pytest.raises(ConfigError, match=target):
        list(quality.score([], ScoreStep(kind="score", name="x", target=target, min=0)))
    with pytest.raises(ConfigError, match="neither min nor max"):
        ScoreStep.parse({"kind": "score", "name": "x", "target": "a:b"})


def test_the_first_of_nearly_equal_instructions_is_kept() -> None:
    base = "请写一篇关于人工智能在医疗领域的应用的文章，并举出三个具体的例子来说明它的优点和缺点"
    english = "Write an essay about the advantages and disadvantages of using artificial intelligence in hospitals today"
    talks = [
        talk(base, "a", "1"),
        talk(english, "b", "2"),
        talk(base + "。", "c", "3"),
        talk(english.replace("today", "now").upper(), "d", "4"),
        talk("完全不同的另外一个问题：如何做西红柿炒鸡蛋", "e", "5"),
    ]
    found = list(quality.near_duplicate(talks, NearDuplicateStep(kind="near_duplicate")))
    assert reasons(found) == ["", "", "sft.near_duplicate", "sft.near_duplicate", ""]
    assert isinstance(found[2], Dropped)
    assert found[2].detail.startswith("of 1: ")
    whole = NearDuplicateStep(kind="near_duplicate", compare="conversation")
    same = [talk(base, "短", "1"), talk(base, "很长的回答，" + "与上面的完全不同，说的是另外一些事情。" * 3, "2")]
    assert reasons(quality.near_duplicate(same, whole)) == ["", ""]


def test_what_is_dropped_can_be_taken_back() -> None:
    [found] = quality.length([talk("学", "习")], LengthStep(kind="length"))
    assert isinstance(found, Dropped)
    assert Conversation.from_json(json.loads(found.document.text)) == talk("学", "习")

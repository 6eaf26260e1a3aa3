"""What is trained is what the server would have to generate: the assistant's tokens and the token that ends its turn, no others."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemel.config.errors import RequestError
from gemel.tokenizer.conversation import Conversation, Message, ToolCall
from gemel.tokenizer.mask import Encoded, encode_conversation, encode_turns
from gemel.tokenizer.tokenizer import Tokenizer
from tests.tokenizer.shapes import NAMED, byte_level_library, tokenizer
from tests.tokenizer.test_conversation import FULL

PLAIN = ("chatml", "llama3", "mistral", "qwen", "phi")
GLUED = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
THINK = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def talk(*contents: str, system: str = "") -> Conversation:
    messages = [Message(("user", "assistant")[index % 2], content) for index, content in enumerate(contents)]
    return Conversation((*([Message("system", system)] if system else []), *messages), "c", "test")


def runs(ours: Tokenizer, encoded: Encoded) -> list[str]:
    """The texts of the trained stretches."""
    found: list[list[int]] = []
    for index, (token, trained) in enumerate(zip(encoded.ids, encoded.trained, strict=True)):
        if trained and (index == 0 or not encoded.trained[index - 1]):
            found.append([])
        if trained:
            found[-1].append(token)
    return [ours.decode(ids, skip_special=False, continues=True) for ids in found]


ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "mistral": "</s>", "qwen": "<|im_end|>", "phi": "<|end|>"}


@pytest.mark.parametrize("kind", ["byte-level", "prepend", "first"])
@pytest.mark.parametrize("shape", PLAIN)
@pytest.mark.parametrize("system", ["", "Be kind <|im_end|>."])
def test_answers_and_their_ends_are_trained(shape: str, kind: str, system: str) -> None:
    ours = tokenizer(shape, kind)
    conversation = talk("Hello 24, 你好?", "Hi there <|im_end|>, 您好!", "and now > ?", "bye", system=system)
    encoded = encode_conversation(ours, conversation)
    before = {"mistral": " ", "phi": "<|assistant|>"}.get(shape, "")  # this phi has no generation prompt, so the header is generated
    # SentencePiece puts a space before each stretch of text that follows a special token
    got = [text.replace(" ", "") if kind == "prepend" else text for text in runs(ours, encoded)]
    want = [before + "Hi there <|im_end|>, 您好!" + ENDS[shape], before + "bye" + ENDS[shape]]
    assert got == [text.replace(" ", "") if kind == "prepend" else text for text in want]
    rendered = ours.render_chat([m.as_chat() for m in conversation.messages], add_generation_prompt=False)
    if (shape, kind) == ("llama3", "byte-level"):
        # two line ends are one token at the end of a prompt, and two where a word follows; the server's prompt counts
        assert ours.decode(encoded.ids, skip_special=False) == ours.decode(rendered, skip_special=False)
    else:
        assert encoded.ids == rendered


@pytest.mark.parametrize("shape", PLAIN)
def test_a_turn_begins_where_the_prompt_of_the_server_ends(shape: str) -> None:
    ours = tokenizer(shape)
    conversation = talk("one", "two\n\n", "three", "\n four")
    encoded = encode_conversation(ours, conversation)
    starts = [i for i, trained in enumerate(encoded.trained) if trained and not encoded.trained[i - 1]]
    assert len(starts) == 2
    for start, index in zip(starts, (1, 3), strict=True):
        prompt = ours.render_chat([m.as_chat() for m in conversation.messages[:index]])
        header = prompt[max(i for i, token in enumerate(prompt) if token in ours.special_ids) :]
        assert encoded.ids[start - len(header) : start] == header
        assert ours.decode(encoded.ids[:start], skip_special=False) == ours.decode(prompt, skip_special=False)
    assert encoded.ids[: starts[0]] == ours.render_chat([conversation.messages[0].as_chat()])


def test_tools_calls_and_reasoning_are_trained_and_results_are_not() -> None:
    ours = tokenizer("qwen")
    both = Conversation(
        (*FULL.messages[:2], Message("assistant", tool_calls=FULL.messages[2].tool_calls), *FULL.messages[3:]), "c", "t", FULL.tools
    )
    assert runs(ours, encode_conversation(ours, both)) == [
        '\n<tool_call>\n{"name": "get_weather", "arguments": {"place": "巴黎"}}\n</tool_call><|im_end|>',
        "21 度。<|im_end|>",
    ]
    reasoned = Conversation((*FULL.messages[:2], Message("assistant", "yes", reasoning="why not")), "c", "t", FULL.tools)
    assert runs(ours, encode_conversation(ours, reasoned)) == ["<think>\nwhy not\n</think>\n\nyes<|im_end|>"]


def test_messages_that_are_not_to_be_trained_are_not() -> None:
    ours = tokenizer("chatml")
    said = (Message("user", "a"), Message("assistant", "b", train=False), Message("user", "c"), Message("assistant", "d"))
    assert runs(ours, encode_conversation(ours, Conversation(said, "c", "t"))) == ["d<|im_end|>"]
    none = encode_conversation(ours, Conversation(said[:3], "c", "t"))
    assert len(none.ids) > 5
    assert not any(none.trained)


def test_a_header_that_goes_on_in_the_generation_prompt_belongs_to_the_prompt() -> None:
    ours = Tokenizer(byte_level_library(), NAMED, {"default": THINK})
    assert runs(ours, encode_conversation(ours, talk("q", "<think>\nhm\n</think>\nyes"))) == ["hm\n</think>\nyes<|im_end|>"]
    assert runs(ours, encode_conversation(ours, talk("q", "yes"))) == ["yes<|im_end|>"]


def test_templates_without_special_tokens() -> None:
    ours = Tokenizer(byte_level_library(), NAMED, {"default": GLUED})
    conversation = talk("one", "two", "three", "four")
    assert runs(ours, encode_conversation(ours, conversation)) == [" two\n", " four\n"]
    bare = tokenizer("bare")
    assert runs(bare, encode_conversation(bare, talk("one ", "two", " three ", "four"))) == ["two", "four"]


def test_a_token_across_the_seam_is_cut_where_the_prompt_ends() -> None:
    ours = tokenizer("bare")
    alone = ours.encode("the")
    assert len(alone) < len(ours.encode("t")) + len(ours.encode("he"))
    encoded = encode_conversation(ours, talk("t", "he quick"))
    assert encoded == Encoded(ours.encode("t") + ours.encode("he quick"), [False] + [True] * len(ours.encode("he quick")))


def test_a_template_that_rewrites_the_past_needs_several_sequences() -> None:
    ours = tokenizer("qwen")
    said = (
        Message("user", "1+1"),
        Message("assistant", "2", reasoning="one and one"),
        Message("user", "sure?"),
        Message("assistant", "yes", reasoning="it is"),
    )
    conversation = Conversation(said, "c7", "t")
    last, first = encode_turns(ours, conversation)
    assert runs(ours, last) == ["<think>\nit is\n</think>\n\nyes<|im_end|>"]
    assert runs(ours, first) == ["<think>\none and one\n</think>\n\n2<|im_end|>"]
    assert "one and one" not in ours.decode(last.ids)
    with pytest.raises(RequestError, match=r"'c7'.*2 sequences"):
        encode_conversation(ours, conversation)
    way_out = Conversation((said[0], Message("assistant", "2", reasoning="one and one", train=False), *said[2:]), "c7", "t")
    assert encode_conversation(ours, way_out) == last


def test_a_conversation_that_the_assistant_starts_says_so() -> None:
    with pytest.raises(RequestError, match="starts with the assistant"):
        encode_conversation(tokenizer("chatml"), Conversation((Message("assistant", "hi"),), "c", "t"))
    start = Conversation((Message("assistant", "hi", train=False), Message("user", "q"), Message("assistant", "a")), "c", "t")
    assert runs(tokenizer("chatml"), encode_conversation(tokenizer("chatml"), start)) == ["a<|im_end|>"]


TEXT = st.text(min_size=1, max_size=12).filter(lambda text: text.strip() == text and text != "")


@pytest.mark.parametrize("shape", ["chatml", "llama3", "mistral", "phi"])
@given(contents=st.lists(TEXT | st.sampled_from(["<|im_end|>", "</s>", "[/INST]", "assistant\n", "the the"]), min_size=2, max_size=6))
@settings(max_examples=25, deadline=None)
def test_whatever_is_said_the_trained_tokens_spell_the_answers(shape: str, contents: list[str]) -> None:
    contents = contents[: len(contents) // 2 * 2]
    ours = tokenizer(shape)
    encoded = encode_conversation(ours, talk(*contents))
    spoken = [text.removeprefix("<|assistant|>").removesuffix(ENDS[shape]).strip() for text in runs(ours, encoded)]
    assert spoken == [text.strip() for text in contents[1::2]]
    whole: list[Any] = [m.as_chat() for m in talk(*contents).messages]
    assert ours.decode(encoded.ids, skip_special=False) == ours.decode(
        ours.render_chat(whole, add_generation_prompt=False), skip_special=False
    )


def test_calls_of_several_tools_end_in_one_end() -> None:
    ours = tokenizer("qwen")
    calls = (ToolCall("a"), ToolCall("b", {"x": [1]}))
    [text] = runs(
        ours, encode_conversation(ours, Conversation((Message("user", "q"), Message("assistant", "well", tool_calls=calls)), "c", "t"))
    )
    assert text.startswith("well\n<tool_call>")
    assert text.endswith("</tool_call><|im_end|>")
    assert text.count("<tool_call>") == 2

"""The preview shows every character once, and marks what is trained."""

from __future__ import annotations

import re

from gemel.data.conversation.preview import preview
from gemel.tokenizer.mask import encode_conversation
from tests.data.conversation.talks import talk
from tests.tokenizer.shapes import tokenizer


def test_brackets_without_colours() -> None:
    ours = tokenizer("chatml")
    encoded = encode_conversation(ours, talk("你好", "您好👋\nfine"))
    shown = preview(ours, encoded, color=False)
    assert shown.startswith(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n⟦您好👋\nfine<|im_end|>⟧"
    )
    assert shown.endswith(f"-- {sum(encoded.trained)} of {len(encoded.ids)} tokens are trained")


def test_colours_hold_line_by_line_and_text_cannot_set_its_own() -> None:
    ours = tokenizer("chatml")
    encoded = encode_conversation(ours, talk("a\x1b[31mred", "two\nlines"))
    shown = preview(ours, encoded, color=True)
    assert re.findall("\x1b\\[30;42m(.*?)\x1b\\[0m", shown) == ["two", "lines<|im_end|>"]
    assert "\\x1b[31mred" in shown
    assert re.sub("\x1b\\[[0-9;]*m", "", shown).replace("\\x1b", "\x1b").startswith(ours.decode(encoded.ids, skip_special=False).rstrip())

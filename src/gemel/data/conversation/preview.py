"""A conversation as the trainer sees it: the rendered text, with what is trained set off from the rest."""

from __future__ import annotations

from itertools import groupby

from gemel.tokenizer.mask import Encoded
from gemel.tokenizer.tokenizer import Tokenizer

TRAINED, REST, END = "\x1b[30;42m", "\x1b[2m", "\x1b[0m"  # black on green, and dim
OPEN, CLOSE = "⟦", "⟧"  # where there are no colours


def preview(tokenizer: Tokenizer, encoded: Encoded, color: bool) -> str:
    """The text of all tokens, special ones too; trained stretches in colour or in brackets, and a line that counts."""
    said = []
    for trained, group in groupby(zip(encoded.ids, encoded.trained, strict=True), key=lambda pair: pair[1]):
        text = b"".join(tokenizer.token_bytes(token) for token, _ in group).decode(errors="replace")
        if color:
            # line by line, because a pager or a terminal forgets the colour at the end of a line
            text = "\n".join(f"{TRAINED if trained else REST}{line}{END}" if line else "" for line in _safe(text).split("\n"))
        elif trained:
            text = OPEN + text + CLOSE
        said.append(text)
    return "".join(said).rstrip("\n") + f"\n-- {sum(encoded.trained)} of {len(encoded.ids)} tokens are trained"


def _safe(text: str) -> str:
    """Without escape sequences of the text's own, which could repaint the terminal."""
    return text.replace("\x1b", "\\x1b")

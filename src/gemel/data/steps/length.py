"""A filter by length in characters, which mean the same in every script; words do not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gemel.config.data.pipeline import LengthConfig
from gemel.data.document import Document, Dropped


class Length:
    """Reasons: `length.short`, `length.long`."""

    def __init__(self, config: LengthConfig):
        self.config = config

    def __call__(self, documents: Sequence[Document]) -> Iterable[Document | Dropped]:
        """As `Step`."""
        least, most = self.config.min_chars, self.config.max_chars
        for document in documents:
            chars = len(document.text)
            if chars < least:
                yield Dropped(document, "length.short", f"{chars} characters, min_chars = {least}")
            elif most is not None and chars > most:
                yield Dropped(document, "length.long", f"{chars} characters, max_chars = {most}")
            else:
                yield document

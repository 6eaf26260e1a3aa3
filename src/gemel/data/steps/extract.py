"""HTML to main text: navigation, captions, comments and notices go, the article stays.

Two libraries, because they fail on different pages: resiliparse (Bevendorff et al. 2018), rules over tags and classes in Rust, and
trafilatura (Barbaresi 2021, ACL demos), slower and more precise. Each is the other's fallback on pages where it finds next to nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from gemel.config.data.rules import ExtractConfig
from gemel.config.errors import UnsupportedError
from gemel.data.document import Document, Dropped
from gemel.data.steps.counts import count

_TAG = re.compile(r"<(?:[a-zA-Z][a-zA-Z0-9-]*[\s/>]|!DOCTYPE|!--)")
_BLANK_LINES = re.compile(r"[^\S\n]*\n(?:[^\S\n]*\n)+")
_CAPTIONS = ("figcaption", "[class*=caption]")


class Extract:
    """Replaces a page's source by its main text."""

    def __init__(self, config: ExtractConfig):
        self.config = config
        extractors = _load_fast(), _load_quality()
        self._first, self._second = extractors if config.extractor == "fast" else reversed(extractors)

    def __call__(self, documents: Sequence[Document]) -> Iterable[Document | Dropped]:
        """One answer per document, in order."""
        return map(self._extract, documents)

    def _extract(self, document: Document) -> Document | Dropped:
        page = document.text
        if not _TAG.search(page):
            return document
        if len(page) > self.config.max_characters:
            return Dropped(document, "extract.too_long", f"{len(page)} characters > {self.config.max_characters}")
        text = self._first(page)
        if len(text) < self.config.min_characters:
            other = self._second(page)
            if len(other) > len(text):
                text = other
                count(document, "extract.fallback")
        if not text:
            return Dropped(document, "extract.empty", "no main text in this page")
        document.text = text
        return document


def _load_fast() -> Callable[[str], str]:
    try:
        from resiliparse.extract.html2text import extract_plain_text
    except ImportError:
        raise UnsupportedError("the fast extractor needs resiliparse: pip install 'gemel[data]'") from None

    def extract(page: str) -> str:
        text = extract_plain_text(page, main_content=True, comments=False, post_meta=False, alt_texts=False, skip_elements=_CAPTIONS)
        return _tidy(text)

    return extract


def _load_quality() -> Callable[[str], str]:
    try:
        from trafilatura import extract as extract_article
    except ImportError:
        raise UnsupportedError("the quality extractor needs trafilatura: pip install 'gemel[data]'") from None

    def extract(page: str) -> str:
        # Its own fallbacks included, trafilatura returns None for pages it cannot read.
        return _tidy(extract_article(page, include_comments=False, favor_precision=True) or "")

    return extract


def _tidy(text: str) -> str:
    """No blank space at line ends, at most one blank line in a row."""
    return _BLANK_LINES.sub("\n\n", text).strip()

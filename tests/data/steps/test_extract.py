"""Articles come out of pages whole and alone, by both extractors, in English and Chinese."""

from __future__ import annotations

import pytest

from gemel.config.data.rules import ExtractConfig
from gemel.data.steps.extract import Extract
from tests.data.steps.prose import chinese, english, kept, reason

PAGE = """<!DOCTYPE html><html><head><title>Title</title><script>var x = "javascript here";</script><style>p {{}}</style></head><body>
<nav><ul><li><a href="/">Home page link</a></li><li><a href="/about">About us link</a></li></ul></nav>
<article><h1>Heading of the article</h1>{paragraphs}<figure><img src="x.png"><figcaption>A caption below</figcaption></figure></article>
<div class="comments" id="comments"><h3>Comments</h3><p class="comment">First! Great post indeed.</p></div>
<footer><p>Copyright 2024 Some Company. All rights reserved.</p></footer></body></html>"""

EXTRACTORS = [Extract(ExtractConfig(extractor="fast")), Extract(ExtractConfig(extractor="quality"))]


def page(text: str) -> str:
    return PAGE.format(paragraphs="".join(f"<p>{line}</p>" for line in text.split("\n")))


@pytest.mark.parametrize("extract", EXTRACTORS, ids=["fast", "quality"])
@pytest.mark.parametrize("text", [english(), chinese()], ids=["english", "chinese"])
def test_the_article_and_nothing_else(extract, text):
    document = kept(extract, page(text))
    lines = [line for line in document.text.split("\n") if line]
    assert [line for line in lines if line in text.split("\n")] == text.split("\n")
    for unwanted in ("javascript", "Home page", "caption", "First!", "Copyright", "<"):
        assert unwanted not in document.text
    assert "\n\n\n" not in document.text


@pytest.mark.parametrize("extract", EXTRACTORS, ids=["fast", "quality"])
def test_pages_without_text_and_pages_that_are_too_long_have_their_reasons(extract):
    assert reason(extract, "<html><body><img src='x.png'></body></html>") == "extract.empty"
    limited = Extract(ExtractConfig(extractor=extract.config.extractor, max_characters=1000))
    assert reason(limited, page(english())) == "extract.too_long"


@pytest.mark.parametrize("extract", EXTRACTORS, ids=["fast", "quality"])
def test_broken_markup_is_read_and_text_without_markup_is_left_alone(extract):
    text = english(8)
    assert text.split("\n")[0] in kept(extract, page(text).replace("</p>", "").replace("</article>", "<div><b>")).text
    plain = "1 < 2 and 3 > 2,\n  as they say"
    assert kept(extract, plain).text == plain


def test_where_one_extractor_finds_nothing_the_other_is_asked(monkeypatch):
    text = english()
    extract = Extract(ExtractConfig(extractor="fast"))
    monkeypatch.setattr(extract, "_first", lambda page: "")
    document = kept(extract, page(text))
    assert text.split("\n")[3] in document.text
    assert document.metadata["counts"] == {"extract.fallback": 1}

"""Words, lines and paragraphs against a regular expression and against hand-made cuts; hashes against equality of spelling."""

from __future__ import annotations

import random
import re
from pydoc_data.topics import topics

import numpy as np
import pytest

from gemel.data.document import Document
from gemel.data.steps.segment import SYMBOL, RunningHash, Segments, Spans, batches, hash_of, sums

# The definition of a word, for ASCII and Han.
REFERENCE = re.compile(r"[\u4e00-\u9fff]|[A-Za-z0-9_]+(?:[.,'’][A-Za-z0-9_]+)*|([^\sA-Za-z0-9_\u4e00-\u9fff])\1*")


def spelled(text: str, spans: Spans) -> list[str]:
    return [text[start:end] for start, end in zip(spans.start.tolist(), spans.end.tolist(), strict=True)]


def test_tokens_are_those_of_the_reference_on_the_documentation_of_python():
    text = "\n\n".join(topics[name] for name in sorted(topics)[:20])
    assert spelled(text, Segments([text]).tokens) == [match[0] for match in REFERENCE.finditer(text)]


@pytest.mark.parametrize("seed", range(20))
def test_tokens_are_those_of_the_reference_on_mixed_noise(seed):
    draw = random.Random(seed)
    text = "".join(draw.choices("ab1 .,'’-#…。，\n\t中文字_", k=300))
    assert spelled(text, Segments([text]).tokens) == [match[0] for match in REFERENCE.finditer(text)]


def test_scripts_without_spaces_are_cut_into_characters_and_marks_stay_with_their_letters():
    text = "naïve e\u0301tude 東京タワー ภาษา 한국어 हिन्दी"
    assert spelled(text, Segments([text]).tokens) == ["naïve", "e\u0301tude", *"東京タワー", *"ภาษา", "한국어", "हिन्दी"]


def test_lines_and_paragraphs():
    text = "one\n  two  \n\n \nthree\nfour"
    segments = Segments([text])
    assert spelled(text, segments.lines) == ["one", "two", "three", "four"]
    assert spelled(text, segments.paragraphs) == ["one\n  two", "three\nfour"]


def test_documents_of_a_batch_do_not_touch():
    texts = ["ab", "", "ab cd\n", "\n\nx"]
    segments = Segments(texts)
    assert segments.tokens.total().tolist() == [1, 0, 2, 1]
    assert segments.lines.total().tolist() == [1, 0, 1, 1]
    assert segments.paragraphs.total().tolist() == [1, 0, 1, 1]
    assert segments.tokens.document.tolist() == [0, 2, 2, 3]


def test_nothing_at_all():
    for texts in ([], [""], ["\n \n"]):
        segments = Segments(texts)
        assert len(segments) == len(texts)
        assert len(segments.words) == len(segments.lines) == len(segments.paragraphs) == 0


def test_words_have_the_same_hash_exactly_where_they_have_the_same_spelling():
    text = topics["compound"] + "\n字典 和 字典"
    segments = Segments(["something before", text])
    lo = segments.bounds[1]
    chosen = segments.words.document == 1
    words = [text[a - lo : b - lo] for a, b in zip(segments.words.start[chosen], segments.words.end[chosen], strict=True)]
    hashes = segments.word_hash[chosen].tolist()
    assert len(set(zip(words, hashes, strict=True))) == len(set(words)) == len(set(hashes))
    assert all(hash_of(word) == number for word, number in zip(words, hashes, strict=True))


def test_windows_of_a_running_hash_are_its_spans():
    values = np.random.default_rng(0).integers(0, 2**63, 200).astype(np.uint64)
    running = RunningHash(values)
    starts = np.arange(len(values) - 4)
    assert (running.windows(5) == running.spans(starts, starts + 5)).all()
    assert (RunningHash(values[7:]).windows(5) == running.windows(5)[7:]).all()
    assert len(running.windows(201)) == 0


def test_pairs_of_words_have_the_same_hash_only_if_the_words_are_the_same():
    words = [f"w{number}" for number in range(200)]
    hashes = np.array([hash_of(word) for word in words], np.uint64)
    pairs = np.stack(np.meshgrid(hashes, hashes), axis=-1).reshape(-1)
    starts = np.arange(0, len(pairs), 2)
    assert len(np.unique(RunningHash(pairs).spans(starts, starts + 2))) == 200 * 200


def test_sentence_ends():
    text = 'He said "go." Then v1.2 came... Why?! 好。真的？“是的。”走\nno end'
    at = Segments([text]).sentence_ends
    assert [text[i - 1 : i + 1] for i in at] == ["o.", "..", "?!", "好。", "的？", "的。"]


def test_symbols_in_a_row_are_one_token_only_if_they_are_the_same():
    segments = Segments(["--- ###! a"])
    assert (segments.token_kind == SYMBOL).tolist() == [True, True, True, False]


def test_lone_surrogates_and_characters_beyond_the_table_are_taken():
    assert len(Segments(["a\ud800b \U0010ffff"]).tokens) > 0


def test_sums_of_ranges_of_which_some_are_empty():
    assert sums(np.array([1, 2, 3]), np.array([0, 0, 2, 2, 3, 3])).tolist() == [0, 3, 0, 3, 0]


def test_batches_keep_order_and_let_large_documents_be_alone():
    documents = [Document("x" * size, str(size), "") for size in (3, 4, 50, 5, 5, 1)]
    assert [[len(d.text) for d in batch] for batch in batches(documents, 10)] == [[3, 4], [50], [5, 5], [1]]

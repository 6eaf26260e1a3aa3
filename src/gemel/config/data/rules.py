"""The steps that look at one document at a time, as a recipe writes them: what each does, its thresholds, and where they come from.

Thresholds are those of the publications named. A rule is switched off by its name, the same name under which it is counted and reported:
`off = ["gopher.stop_words", "c4"]` (a family name stands for all of its rules), so that no threshold needs a value that means "none".
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator

from gemel.config.base import Config

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]

QUALITY_RULES = (
    "gopher.long",
    "gopher.short",
    "gopher.word_length",
    "gopher.hashes",
    "gopher.ellipses",
    "gopher.bullet_lines",
    "gopher.ellipsis_lines",
    "gopher.alphabetic_words",
    "gopher.stop_words",
    "gopher.duplicate_lines",
    "gopher.duplicate_line_characters",
    "gopher.duplicate_paragraphs",
    "gopher.duplicate_paragraph_characters",
    "gopher.top_2_gram",
    "gopher.top_3_gram",
    "gopher.top_4_gram",
    "gopher.duplicate_5_gram",
    "gopher.duplicate_6_gram",
    "gopher.duplicate_7_gram",
    "gopher.duplicate_8_gram",
    "gopher.duplicate_9_gram",
    "gopher.duplicate_10_gram",
    "c4.lorem_ipsum",
    "c4.curly_bracket",
    "c4.long_word",
    "c4.citation",
    "c4.line_punctuation",
    "c4.line_words",
    "c4.javascript",
    "c4.policy",
    "c4.sentences",
    "fineweb.line_punctuation",
    "fineweb.short_lines",
    "fineweb.duplicate_line_characters",
    "fineweb.newlines",
)


class Gopher(Config):
    """Gopher (Rae et al. 2021, arXiv 2112.11446, appendix A.1.1): which documents are prose at all, and which repeat themselves.

    min_words, max_words             `gopher.short`, `gopher.long`
    min_word_length, max_word_length `gopher.word_length`: mean letters of a word; asked only where most words stand between spaces
    max_hashes, max_ellipses         `gopher.hashes`, `gopher.ellipses`: per word
    max_bullet_lines                 `gopher.bullet_lines`: share of lines that start with a bullet
    max_ellipsis_lines               `gopher.ellipsis_lines`: share of lines that end with an ellipsis
    min_alphabetic_words             `gopher.alphabetic_words`: share of words with a letter; a free-standing symbol counts as a word
    min_stop_words                   `gopher.stop_words`: so many different ones of the document's language
    max_duplicate_lines, ...         shares of lines, of paragraphs, and of the characters in them, that stood before in the document
    max_top_n_gram                   for n = 2, 3, 4: share of the characters that the most frequent sequence of n words makes up
    max_duplicate_n_gram             for n = 5 ... 10: share of the characters in sequences of n words that stood before
    """

    min_words: NonNegativeInt = 50
    max_words: PositiveInt = 100_000
    min_word_length: Positive = 3.0
    max_word_length: Positive = 10.0
    max_hashes: Share = 0.1
    max_ellipses: Share = 0.1
    max_bullet_lines: Share = 0.9
    max_ellipsis_lines: Share = 0.3
    min_alphabetic_words: Share = 0.8
    min_stop_words: NonNegativeInt = 2
    max_duplicate_lines: Share = 0.3
    max_duplicate_line_characters: Share = 0.2
    max_duplicate_paragraphs: Share = 0.3
    max_duplicate_paragraph_characters: Share = 0.2
    max_top_n_gram: tuple[Share, Share, Share] = (0.20, 0.18, 0.16)
    max_duplicate_n_gram: tuple[Share, Share, Share, Share, Share, Share] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)


class C4(Config):
    """C4 (Raffel et al. 2020, arXiv 1910.10683, section 2.2): lines that are no sentences go, and pages with too few sentences.

    Lines are removed from the text and counted under `c4.long_word`, `c4.line_punctuation`, `c4.line_words`, `c4.javascript`, `c4.policy`;
    `c4.citation` counts marks such as [12] taken out of lines. `c4.lorem_ipsum`, `c4.curly_bracket` and `c4.sentences` drop documents.

    max_word_length     characters between two spaces
    min_line_words      words in a line
    min_sentences       in the lines that are left
    policy_phrases      a line with one of them, in any case, is a notice and not text
    """

    max_word_length: PositiveInt = 1000
    min_line_words: NonNegativeInt = 3
    min_sentences: NonNegativeInt = 5
    policy_phrases: tuple[Annotated[str, Field(min_length=1)], ...] = (
        "terms of use",
        "privacy policy",
        "cookie policy",
        "uses cookies",
        "use of cookies",
        "use cookies",
        "隐私政策",
        "隱私政策",
        "使用条款",
        "使用條款",
    )


class FineWeb(Config):
    """FineWeb (Penedo et al. 2024, arXiv 2406.17557, section 3.6): pages that are lists rather than text. Asked of the lines C4 left.

    min_line_punctuation           share of lines that end like a sentence
    max_short_lines                share of lines of at most `short_line` characters
    max_duplicate_line_characters  share of the characters in lines that stood before
    max_newlines                   line ends per word
    """

    min_line_punctuation: Share = 0.12
    short_line: PositiveInt = 30
    max_short_lines: Share = 0.67
    max_duplicate_line_characters: Share = 0.01
    max_newlines: Positive = 0.3


class QualityConfig(Config):
    """The rules of Gopher, C4 and FineWeb, in one pass over the text; a document keeps the first rule that it breaks as its reason.

    off                  rules, or families of rules, that are not asked. FineWeb's recipe leaves C4's demand that every line ends like a
                         sentence out, because it removes a third of the text for no gain (section 3.5); so do we
    characters_per_word  how many characters of a script without spaces make a word, wherever a rule counts words. 1.6 is what jieba finds
                         in Chinese Wikipedia
    stop_words           by language code; a document without `language` in its metadata may use those of any, one in a language that is
                         not listed is not asked
    max_characters       longer documents are `gopher.long` at once: 100,000 words of at most 10 letters are far fewer
    """

    kind: Literal["quality"] = "quality"
    gopher: Gopher = Gopher()
    c4: C4 = C4()
    fineweb: FineWeb = FineWeb()
    off: tuple[str, ...] = ("c4.line_punctuation",)
    characters_per_word: Annotated[float, Field(ge=1.0, le=10.0)] = 1.6
    stop_words: dict[str, tuple[str, ...]] = Field(
        default_factory=lambda: {
            "en": ("the", "be", "to", "of", "and", "that", "have", "with"),
            "zh": ("的", "是", "在", "了", "和", "不", "有", "为", "這", "这", "也", "之", "與", "与"),
        }
    )
    max_characters: PositiveInt = 10_000_000

    @field_validator("off")
    @classmethod
    def _known(cls, off: tuple[str, ...]) -> tuple[str, ...]:
        families = {rule.split(".")[0] for rule in QUALITY_RULES}
        for name in off:
            if name not in QUALITY_RULES and name not in families:
                raise ValueError(f"there is no rule {name!r}; families: {', '.join(sorted(families))}; rules: {', '.join(QUALITY_RULES)}")
        return off

    def asks(self, rule: str) -> bool:
        """Whether this rule is on."""
        assert rule in QUALITY_RULES, rule
        return rule not in self.off and rule.split(".")[0] not in self.off

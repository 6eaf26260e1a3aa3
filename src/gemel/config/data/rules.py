"""The steps that look at one document at a time, as a recipe writes them: what each does, its thresholds, and where they come from.

Thresholds are those of the publications named. A rule is switched off by its name, the same name under which it is counted and reported:
`off = ["gopher.stop_words", "c4"]` (a family name stands for all of its rules), so that no threshold needs a value that means "none".
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, field_validator, model_validator

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


PiiRule = Literal["email", "china_id", "bank_card", "ipv6", "ipv4", "phone"]
PII_RULES: tuple[PiiRule, ...] = ("email", "china_id", "bank_card", "ipv6", "ipv4", "phone")
# Values of the same form that belong to nobody, so that the text still reads like text: RFC 2606, RFC 3849, RFC 5737. Numbers of people and
# of cards have no reserved range everywhere, so theirs are names.
PII_REPLACEMENTS: dict[PiiRule, str] = {
    "email": "email@example.com",
    "china_id": "<ID_NUMBER>",
    "bank_card": "<CARD_NUMBER>",
    "ipv6": "2001:db8::1",
    "ipv4": "192.0.2.1",
    "phone": "<PHONE_NUMBER>",
}


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
    characters_per_word  how many characters of a script without spaces make a word, wherever a rule counts words. 1.8 is what jieba finds
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
    characters_per_word: Annotated[float, Field(ge=1.0, le=10.0)] = 1.8
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


class UrlConfig(Config):
    """Drops documents by where they come from: metadata `url`, or the id where that is a URL. Documents without a URL pass.

    domains       with all their subdomains: `example.com` also means `www.example.com`; dropped as `url.domain`
    domain_files  more of them, one a line; `#` starts a comment; lines of hosts files (`0.0.0.0 example.com`) work too
    url_files     single addresses, one a line, compared without scheme, `www.` and fragment; dropped as `url.listed`
    patterns      regular expressions looked for anywhere in the address, in any case; dropped as `url.pattern`
    """

    kind: Literal["url"] = "url"
    domains: tuple[str, ...] = ()
    domain_files: tuple[Path, ...] = ()
    url_files: tuple[Path, ...] = ()
    patterns: tuple[str, ...] = ()


class ExtractConfig(Config):
    """Turns HTML into its main text. Documents without a single tag pass as they are.

    extractor       "fast" (resiliparse, some 400 pages a second) or "quality" (trafilatura, some 30)
    min_characters  where the extractor finds less than this, the other one is asked too, and the longer answer is taken; a page with less
                    than this in both keeps what there is, one with nothing is dropped as `extract.empty`
    max_characters  longer pages are dropped as `extract.too_long`, because time and memory grow with the tree
    """

    kind: Literal["extract"] = "extract"
    extractor: Literal["fast", "quality"] = "fast"
    min_characters: NonNegativeInt = 100
    max_characters: PositiveInt = 10_000_000


class RepairConfig(Config):
    """Repairs what encodings broke. What was repaired is counted, nothing is dropped but what is not text.

    mojibake             undo decoding with the wrong charset (ftfy): `â€™` becomes `’`; counted as `repair.mojibake`
    normalise            to Unicode NFC: one code point where there is one; counted as `repair.normalised`. Full-width forms stay
    control_characters   remove them, and zero-width spaces and byte order marks; counted as `repair.control_characters`
    max_replacements     share of U+FFFD, the mark of bytes that could not be decoded, above which a document is `repair.undecodable`
    """

    kind: Literal["repair"] = "repair"
    mojibake: bool = True
    normalise: bool = True
    control_characters: bool = True
    max_replacements: Share = 0.01


class LanguageConfig(Config):
    """Says which language a document is in, and keeps those asked for. Writes `language` and `language_score` into the metadata.

    keep        language codes of lid.176 (mostly two letters: en, zh, ja); empty keeps all. Others are dropped as `language.other`
    drop        codes to drop as `language.other` when all others are kept
    min_score   less certain documents are dropped as `language.uncertain` (FineWeb: 0.65, arXiv 2406.17557, section 3.3)
    second_opinion  ask py3langid where the text is short or the first answer is uncertain
    """

    kind: Literal["language"] = "language"
    keep: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    min_score: Share = 0.65
    second_opinion: bool = True

    @model_validator(mode="after")
    def _one_list(self) -> LanguageConfig:
        if self.keep and self.drop:
            raise ValueError(f"keep = {list(self.keep)} and drop = {list(self.drop)} exclude each other: give one of them")
        return self


class PiiConfig(Config):
    """Replaces personal data. Each replacement is counted under `pii.` and the rule's name; no document is dropped.

    rules        which; the order is fixed, from the strictest form to the loosest
    replacements the text that takes the place of a match, by rule
    public_only  leave private, loopback and documentation addresses (10.0.0.1, 127.0.0.1, ::1) as they are, as FineWeb does
    """

    kind: Literal["pii"] = "pii"
    rules: tuple[PiiRule, ...] = PII_RULES
    replacements: dict[PiiRule, str] = Field(default_factory=dict)
    public_only: bool = True

    def replacement(self, rule: PiiRule) -> str:
        """What stands where a match stood."""
        return self.replacements.get(rule, PII_REPLACEMENTS[rule])


class SampleConfig(Config):
    """Keeps a share of the documents; the others are dropped as `sample.left_out`.

    Which ones depends on nothing but their ids and the seed, so the same document is in every sample that is as large or larger.
    """

    kind: Literal["sample"] = "sample"
    share: Share
    seed: NonNegativeInt = 0


class PerplexityConfig(Config):
    """Asks an n-gram model how surprising a document is. Writes `perplexity` into the metadata.

    model           a file: our own (.safetensors, from `gemel data ngram`), ARPA (also .gz), or KenLM's binary
    language        only documents with this `language` in their metadata are asked, others pass; empty asks all
    max_perplexity  more surprising documents are dropped as `perplexity.high`
    min_perplexity  less surprising ones as `perplexity.low`: repetitive or template text
    buckets         bounds between buckets, ascending: the number of those passed goes into the metadata as `perplexity_bucket`
    unit, fold      what a token is, and whether text is read in lower case; our own files say that themselves, these are for the others
    """

    kind: Literal["perplexity"] = "perplexity"
    model: Path
    language: str = ""
    max_perplexity: Annotated[float, Field(gt=0.0, allow_inf_nan=True)] = float("inf")
    min_perplexity: NonNegativeFloat = 0.0
    buckets: tuple[Positive, ...] = ()
    unit: Literal["words", "spaces", "characters"] = "spaces"
    fold: bool = False

    @field_validator("buckets")
    @classmethod
    def _ascending(cls, buckets: tuple[float, ...]) -> tuple[float, ...]:
        if list(buckets) != sorted(set(buckets)):
            raise ValueError(f"buckets {list(buckets)} do not ascend")
        return buckets


class ClassifyConfig(Config):
    """Asks a small classifier how good a document is. Writes its score, from 0 to 1, into the metadata under `name`.

    model      a file made by `gemel data classify`
    name       of what it judges, so that several can be asked
    min_score  documents below are dropped as `classify.low`; 0 only notes the score
    """

    kind: Literal["classify"] = "classify"
    model: Path
    name: Annotated[str, Field(min_length=1)] = "quality_score"
    min_score: Share = 0.5


PROMPT = """Judge how useful the following extract of a document is for teaching, on a scale from 0 to {most}. Start at 0 and add points:
- 1 if it holds some facts or explanations, even among advertising or navigation;
- 1 if most of it is about one subject and written in whole sentences;
- 1 if somebody who wants to learn about that subject would find it helpful and correct;
- 1 if it is clear and complete enough for a lesson or a textbook;
- 1 if it is outstanding: precise, well ordered, with reasons or examples, and nothing beside the subject.

Extract:
{text}

Give the reasons in one or two sentences. Then write, on a line of its own, "Score: " and the number of points."""


class LabelConfig(Config):
    """Has a large language model label texts, from which the small classifier is trained (`gemel data label`).

    endpoint        base URL of an OpenAI-compatible API
    model           the model's name there
    prompt          {text} stands for the text, {most} for the highest score; the answer must name a whole number
    most            the highest score
    max_characters  of a text that are shown, from its beginning
    max_tokens      of an answer
    concurrency     requests at once
    batch           texts asked about before their labels are written
    timeout_s       for one request
    """

    endpoint: str = "http://127.0.0.1:8000/v1"
    model: str = ""
    prompt: str = PROMPT
    most: Annotated[int, Field(ge=1, le=100)] = 5
    max_characters: PositiveInt = 4000
    max_tokens: PositiveInt = 200
    concurrency: Annotated[int, Field(ge=1, le=256)] = 8
    batch: PositiveInt = 64
    timeout_s: Positive = 120.0

    @field_validator("prompt")
    @classmethod
    def _shows_the_text(cls, prompt: str) -> str:
        if "{text}" not in prompt:
            raise ValueError("it must say with {text} where the text goes")
        return prompt

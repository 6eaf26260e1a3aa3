"""Settings of the steps that compare documents: with each other, with evaluation data, or source with source.

What counts as the same text is said by `Normalize`, which every comparing step holds under the key `normalize`, so that a report can state
it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from gemel.config.base import Config
from gemel.config.errors import ConfigError

Fraction = Annotated[float, Field(gt=0, le=1)]


class Normalize(Config):
    """Differences that do not count when texts are compared. The text itself is never changed.

    Beyond these, runs of white space always count as one space, format characters (soft hyphen, zero-width space) as nothing, and
    compatibility forms of one character (full-width letters and digits) as that character.
    """

    case: bool = False  # upper and lower case are the same
    punctuation: bool = False  # punctuation and symbols count as white space
    numbers: bool = False  # every run of decimal digits, of any script, is the same number
    accents: bool = False  # Latin, Greek and Cyrillic letters count without their marks, composed or not


EVERYTHING = Normalize(case=True, punctuation=True, numbers=True, accents=True)


class ExactConfig(Config):
    """Of documents that are the same, the first in the order of the input is kept."""

    kind: Literal["exact"] = "exact"
    by: Literal["document", "url"] = "document"  # url: `metadata.url`, else an id that is a URL; a document without one is kept
    normalize: Normalize = Normalize()  # of the text

    @model_validator(mode="after")
    def _refuse_ignored(self) -> Self:
        if self.by == "url" and self.normalize != Normalize():
            raise ConfigError("normalize has no effect on by = 'url', which compares addresses; remove it, or set by = 'document'")
        return self


class ExactPartsConfig(Config):
    """Of lines or paragraphs that are the same, anywhere in the corpus, the first is kept; a document that lost too much is dropped.

    The same line may be right in many places (a brace, a heading, a verse), hence `min_part_chars`.
    """

    kind: Literal["exact_parts"] = "exact_parts"
    by: Literal["paragraph", "line"] = "paragraph"  # paragraphs are separated by empty lines
    min_part_chars: int = Field(default=40, ge=1)  # shorter parts are not compared; characters after normalization
    min_chars: int = Field(default=100, ge=0)  # a document that lost parts and has fewer characters left is dropped
    normalize: Normalize = Normalize()


class MinHashConfig(Config):
    """Near-duplicates by MinHash signatures cut into bands (Broder 1997; Leskovec et al., Mining of Massive Datasets, chapter 3).

    Two documents whose n-grams have Jaccard similarity J meet with probability 1 - (1 - J^rows)^bands; what meets, directly or through
    others, is one cluster, and its first document in the order of the input is kept. The defaults are FineWeb's (Penedo et al. 2024),
    with an even chance of meeting at J = 0.69.
    """

    kind: Literal["minhash"] = "minhash"
    ngram: int = Field(default=5, ge=1, le=64)  # words; a character of a script without word spaces is a word
    bands: int = Field(default=14, ge=1, le=256)
    rows: int = Field(default=8, ge=1, le=64)
    seed: int = Field(default=0, ge=0)
    normalize: Normalize = EVERYTHING


class LinesConfig(Config):
    """Removes lines that stand in many documents: menus, licences, cookie notices (after CCNet, Wenzek et al. 2020)."""

    kind: Literal["lines"] = "lines"
    min_documents: int = Field(default=10, ge=2)  # a line in so many documents is removed from all of them
    min_line_chars: int = Field(default=1, ge=1)  # shorter lines stay; characters after normalization, without white space
    min_chars: int = Field(default=100, ge=0)  # a document that lost lines and has fewer characters left is dropped
    normalize: Normalize = EVERYTHING


class DecontaminateConfig(Config):
    """Drops documents that share n-grams with evaluation data (Brown et al. 2020, appendix C)."""

    kind: Literal["decontaminate"] = "decontaminate"
    files: tuple[Path, ...] = Field(min_length=1)  # .jsonl: every string in it, or those under `fields`; else text, an item per paragraph
    fields: tuple[str, ...] = ()  # keys of the JSON objects whose strings are compared; none: all
    ngram: int = Field(default=13, ge=2, le=64)  # words
    ngram_chars: int = Field(default=24, ge=2, le=64)  # characters, for items written without word spaces
    min_matches: int = Field(default=1, ge=1)  # distinct n-grams that a document must share
    normalize: Normalize = Normalize(case=True, punctuation=True, accents=True)


class MixConfig(Config):
    """Samples documents so that the sources have given shares of the whole.

    A source's share is its weight, or, where no weights are given, its size^(1/temperature) (Lample & Conneau 2019), normalized. Which
    documents are taken is decided by a hash of id and text, so it changes neither with the order of files nor with other sources.
    """

    kind: Literal["mix"] = "mix"
    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default={}
    )  # by source; a source of the corpus must be named, 0 to leave it out
    temperature: float = Field(default=1.0, ge=1.0)  # 1: as the sources are; towards infinity: all alike
    unit: Literal["documents", "characters", "bytes"] = "characters"  # what shares and budget count
    budget: int | None = Field(default=None, ge=1)  # units in all; none: the most that `epochs` allows
    epochs: float = Field(default=1.0, gt=0)  # how often a source may be repeated at most; repeats are written to `metadata.repeat`
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _one_rule_for_shares(self) -> Self:
        if self.weights and self.temperature != 1.0:
            raise ConfigError("weights and temperature both set the shares of the sources; give one of them")
        if self.weights and not any(self.weights.values()):
            raise ConfigError("all weights are 0, which takes nothing; give at least one source a weight above 0")
        return self

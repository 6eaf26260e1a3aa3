"""A recipe for fine-tuning data: how columns are called in each data set, and which steps its conversations go through.

Names that are common need not be given, in English or Chinese; see `gemel.data.conversation.columns`.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from gemel.config.base import Config
from gemel.config.data.dedup import MinHashConfig
from gemel.config.errors import ConfigError

Target = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
Share = Annotated[float, Field(gt=0, le=1)]


class Columns(Config):
    """What the columns of a data set are called there; those that have a common name may be left out.

    instruction, input, output  a question, what it is about, and the answer
    history, system             earlier turns as pairs, and the system prompt
    messages, tools             whole conversations, and the tools on offer
    chosen, rejected, label     a better and a worse answer; whether an answer is good
    id                          the row's name
    role, content               within a message: who says it, and what
    """

    instruction: str | None = None
    input: str | None = None
    output: str | None = None
    history: str | None = None
    system: str | None = None
    messages: str | None = None
    tools: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    label: str | None = None
    id: str | None = None
    role: str | None = None
    content: str | None = None


class DataSet(Config):
    """Files that are read alike.

    files    which files this is about: a pattern for their names, such as "shop_*.jsonl"; the first table that fits counts
    source   name of the collection; empty takes the file's name
    columns  see `Columns`
    roles    what speakers are called there, for instance {"客服": "assistant"}
    system   a system prompt for conversations that have none
    """

    files: str
    source: str = ""
    columns: Columns = Columns()
    roles: dict[str, Literal["system", "user", "assistant", "tool"]] = Field(default={})
    system: str = ""


class LengthStep(Config):
    """Drops conversations that are too short or too long, in characters.

    min_instruction_chars, min_answer_chars  of the first question and of the last answer
    max_chars                                of all messages together
    """

    kind: Literal["length"]
    min_instruction_chars: NonNegativeInt = 2
    min_answer_chars: NonNegativeInt = 1
    max_chars: PositiveInt = 100_000


class RefusalStep(Config):
    """Drops conversations whose last answer is a refusal or speaks of being a language model, in English or Chinese.

    patterns  further regular expressions, looked for at the start of the answer
    chars     how much of the answer's start is looked at
    """

    kind: Literal["refusal"]
    patterns: tuple[str, ...] = ()
    chars: PositiveInt = 200


class LanguageStep(Config):
    """Keeps conversations whose answers are in certain languages.

    languages  codes as the detector gives them
    detector   a function text -> code, as module:name; empty tells only zh, ja, ko, ru, ar and "latin" apart, by their script
    """

    kind: Literal["language"]
    languages: Annotated[tuple[str, ...], Field(min_length=1)]
    detector: Target | None = None


class MismatchStep(Config):
    """Drops conversations whose answer is not one to the question: it is hardly likelier behind it than behind no question at all.

    model     that judges, with a chat template: directory, .gguf file, or name
    min_gain  nats per token that the question must help with; what could not be measured is kept, and counted
    """

    kind: Literal["mismatch"]
    model: str = "smollm2-135m-instruct"
    min_gain: float = 0.0


class ScoreStep(Config):
    """Keeps conversations with a score between limits: similarity of question and answer, a reward model's.

    name    how reports call it; the reason of what is dropped is `sft.NAME`
    target  a function (question, answer) -> number, as module:name
    """

    kind: Literal["score"]
    name: Annotated[str, Field(pattern=r"^\w+$")]
    target: Target
    min: float | None = None
    max: float | None = None

    @model_validator(mode="after")
    def _limits_something(self) -> Self:
        if self.min is None and self.max is None:
            raise ValueError(f"score {self.name!r} has neither min nor max, so it would drop nothing; give one")
        return self


class NearDuplicateStep(Config):
    """Of conversations with nearly the same instruction, the first is kept (MinHash, see `minhash`).

    compare  the instruction alone, or the whole conversation
    """

    kind: Literal["near_duplicate"]
    compare: Literal["instruction", "conversation"] = "instruction"
    minhash: MinHashConfig = MinHashConfig(ngram=3, bands=20, rows=5)


class ParaphraseStep(Config):
    """Adds copies whose instruction is said in another way, by templates with {instruction}. English and Chinese have their own.

    share      of the conversations, so many get a copy; which ones follows from `seed` and their names
    templates  instead of the built-in ones
    """

    kind: Literal["paraphrase"]
    share: Share = 0.1
    seed: int = 0
    templates: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _templates_say_it(self) -> Self:
        if wrong := [template for template in self.templates if "{instruction}" not in template]:
            raise ValueError(f"templates {wrong!r} do not contain {{instruction}}, so the question would be lost")
        return self


class FewShotStep(Config):
    """Adds copies that begin with examples: other single-turn conversations of the same source and language.

    examples  so many before the question
    """

    kind: Literal["few_shot"]
    share: Share = 0.1
    seed: int = 0
    examples: PositiveInt = 2


class ChainOfThoughtStep(Config):
    """Adds copies that ask for the reasoning and say it, of answers that have one: in `reasoning`, or before GSM8K's `####`."""

    kind: Literal["chain_of_thought"]
    share: Share = 1.0
    seed: int = 0


ConversationStep = Annotated[
    LengthStep
    | RefusalStep
    | LanguageStep
    | MismatchStep
    | ScoreStep
    | NearDuplicateStep
    | ParaphraseStep
    | FewShotStep
    | ChainOfThoughtStep,
    Field(discriminator="kind"),
]


class SftRecipe(Config):
    """A whole recipe: [[dataset]] tables in the order in which they are tried, [[step]] tables in the order in which they act."""

    dataset: tuple[DataSet, ...] = ()
    step: tuple[ConversationStep, ...] = ()


def load(path: Path) -> SftRecipe:
    """The recipe in a TOML file. Errors: `ConfigError`."""
    try:
        return SftRecipe.parse(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None

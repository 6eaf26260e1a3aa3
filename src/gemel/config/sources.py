"""What a run learns from: the model and the tokenizer that it begins with, texts and where they come from, and how much of them at once.

[model]
kind = "pretrained"
path = "models/smol"

[[data.train]]
kind = "shards"
path = "tokens"
weight = 2.0

[batch]
tokens = 65536
sequence = 2048
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from gemel.config.base import Config
from gemel.config.model import ModelConfig
from gemel.config.tokenizer import TrainConfig


class PretrainedModel(Config):
    """A model to go on from.

    path  Hugging Face directory or .gguf file
    """

    kind: Literal["pretrained"]
    path: Path


class NewModel(Config):
    """A model with random weights: normal with standard deviation `std`, matrices that write into the residual stream with less, by
    1 / sqrt(2 layers), so that the stream does not grow with depth (GPT-2).
    """

    kind: Literal["new"]
    config: ModelConfig
    std: PositiveFloat = 0.02


Model = Annotated[PretrainedModel | NewModel, Field(discriminator="kind")]


class LoadedTokenizer(Config):
    """A tokenizer that exists.

    path  folder with a tokenizer.json, or a .gguf file
    """

    kind: Literal["pretrained"]
    path: Path


class LearntTokenizer(Config):
    """A tokenizer that is learnt first, from all sources of kind `documents`.

    config           see `TrainConfig`
    end_of_document  which of its special tokens ends a document
    """

    kind: Literal["learnt"]
    config: TrainConfig = TrainConfig()
    end_of_document: str = "<|endoftext|>"

    @model_validator(mode="after")
    def _ends(self) -> Self:
        if self.end_of_document not in self.config.special_tokens:
            raise ValueError(f"end_of_document = {self.end_of_document!r} is not among special_tokens = {self.config.special_tokens!r}")
        return self


TokenizerSource = Annotated[LoadedTokenizer | LearntTokenizer, Field(discriminator="kind")]
Packing = Literal["cut", "best_fit"]


class Source(Config):
    """What all sources share.

    name    what metrics call it; empty takes the last part of its path
    weight  its share of what is trained, relative to the other sources' weights
    """

    name: str = ""
    weight: PositiveFloat = 1.0


class ShardSource(Source):
    """Token shards, as `gemel data` writes them with output.kind = "tokens".

    path     folder of them
    packing  cut: documents run on from one sequence into the next; best_fit: those that fit into a sequence stay whole
    """

    kind: Literal["shards"]
    path: Path
    packing: Packing = "cut"


class DocumentSource(Source):
    """Text, through a data recipe whose output is JSON lines, tokenized when the run begins.

    recipe           the data recipe
    packing          see `ShardSource`
    end_of_document  special token that ends each of them; None takes the tokenizer's EOS
    """

    kind: Literal["documents"]
    recipe: Path
    packing: Packing = "cut"
    end_of_document: str | None = None


class ConversationSource(Source):
    """Conversations, as `gemel data sft` writes them. Trained is what the assistant says, and the token that ends it.

    They are packed whole.

    paths     files of JSON lines
    too_long  what becomes of conversations longer than a sequence: drop them, or cut off their end; either is reported
    """

    kind: Literal["conversations"]
    paths: Annotated[tuple[Path, ...], Field(min_length=1)]
    too_long: Literal["drop", "cut"] = "drop"


AnySource = Annotated[ShardSource | DocumentSource | ConversationSource, Field(discriminator="kind")]


class DataConfig(Config):
    """What is learnt from, and what is only looked at.

    train       sources, mixed by weight
    validation  sources that are not trained
    holdout     share of each training source's documents that is kept for validation instead
    """

    train: Annotated[tuple[AnySource, ...], Field(min_length=1)]
    validation: tuple[AnySource, ...] = ()
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.0


class BatchConfig(Config):
    """How much is learnt at once, in tokens.

    tokens        of one step of the optimizer
    micro_tokens  the most that goes through the model at once: memory grows with it, results do not depend on it. None takes all that a
                  rank has of `tokens`
    sequence      the most that a document may see of itself; no more than the model has positions
    """

    tokens: PositiveInt
    sequence: PositiveInt
    micro_tokens: PositiveInt | None = None

    @property
    def sequences(self) -> int:
        """In a step."""
        return self.tokens // self.sequence

    @property
    def micro_sequences(self) -> int:
        """In a micro-batch."""
        return (self.micro_tokens or self.tokens) // self.sequence

    @model_validator(mode="after")
    def _divides(self) -> Self:
        micro_tokens = self.micro_tokens or self.tokens
        if micro_tokens % self.sequence:
            near = max(micro_tokens // self.sequence, 1) * self.sequence
            name = "tokens" if self.micro_tokens is None else "micro_tokens"
            raise ValueError(f"{name} = {micro_tokens} is not a multiple of sequence = {self.sequence}; {near} is")
        if self.tokens % micro_tokens:
            near = -(-self.tokens // micro_tokens) * micro_tokens
            raise ValueError(f"tokens = {self.tokens} is not a multiple of micro_tokens = {micro_tokens}; {near} is")
        return self

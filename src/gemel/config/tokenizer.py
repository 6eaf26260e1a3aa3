"""How a tokenizer is trained, and how one that exists is extended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from gemel.config.base import Config

NUM_BYTES = 256  # a byte-level vocabulary holds every byte, so no text is unknown to it

# The split of Llama 3: contractions, a run of letters with the one character before it, up to three digits, punctuation with the line ends
# after it, white space. A clause of Chinese is one run of letters, so that its words are learnt from frequency alone. Encoders know this
# very regular expression and have machine code for it, which is why it is the default.
LLAMA3_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class TrainConfig(Config):
    """Byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909; bytes as in GPT-2).

    vocab_size      tokens in all: 256 bytes, the merges, the special tokens
    pattern         what a token never reaches beyond: texts are split into matches of this regular expression first
    special_tokens  get the last ids, in this order; text never becomes one of them
    named           which of them plays which role, named as in tokenizer_config.json
    chat_template   Jinja source, or None
    """

    vocab_size: PositiveInt = 32_768
    pattern: str = LLAMA3_PATTERN
    special_tokens: tuple[str, ...] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    named: Mapping[str, str] = Field(default={"eos_token": "<|endoftext|>"})
    chat_template: str | None = None

    @property
    def num_merges(self) -> int:
        """What is left of the vocabulary for learnt tokens."""
        return self.vocab_size - NUM_BYTES - len(self.special_tokens)

    @model_validator(mode="after")
    def _room_for_everything(self) -> TrainConfig:
        if self.num_merges < 0:
            needed = NUM_BYTES + len(self.special_tokens)
            raise ValueError(f"vocab_size = {self.vocab_size} is less than {needed}, the bytes and special tokens alone; raise it")
        if len(set(self.special_tokens)) != len(self.special_tokens) or "" in self.special_tokens:
            raise ValueError(f"special_tokens = {self.special_tokens!r} must be different and not empty")
        if unknown := sorted(set(self.named.values()) - set(self.special_tokens)):
            raise ValueError(f"named uses {unknown!r}, which special_tokens does not list; add them there")
        return self


class ExtendConfig(Config):
    """What is added to a tokenizer that exists.

    tokens            texts that become one token each, wherever they occur, inside of words too
    whole_words       only where no letter or digit stands beside them (of no use for Chinese, which puts nothing between words)
    learn             so many tokens learnt from text of the domain, by going on with the tokenizer's own merges
    min_count         a learnt token must have been seen so often
    special_tokens    new special tokens
    pad_to_multiple   rows of a model's embedding are padded to a multiple of this
    """

    tokens: tuple[str, ...] = ()
    whole_words: bool = False
    learn: NonNegativeInt = 0
    min_count: Annotated[int, Field(ge=1)] = 10
    special_tokens: tuple[str, ...] = ()
    pad_to_multiple: PositiveInt = 64

    @model_validator(mode="after")
    def _adds_something(self) -> ExtendConfig:
        if not (self.tokens or self.special_tokens or self.learn):
            raise ValueError("nothing to add: give tokens, special_tokens, or a number of tokens to learn")
        if "" in (*self.tokens, *self.special_tokens):
            raise ValueError("a token cannot be empty")
        return self

"""How one request wants its tokens chosen.

All fields work or the request is refused; none is accepted and dropped. Bounds here are those that hold for any model; what depends on the
vocabulary or the context is checked by the engine when the request is added.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from gemel.config.base import Config

MAX_LOGPROBS = 20
MAX_SEQUENCES = 64
MAX_STOPS = 16
MAX_LOGIT_BIAS = 1024

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]
Bias = Annotated[float, Field(ge=-100.0, le=100.0)]


class SamplingParams(Config):
    """Sampling of one request. The defaults sample from the model's own distribution.

    temperature         0 means greedy; otherwise logits are divided by it
    top_k               keep the k likeliest tokens; 0 keeps all
    top_p               keep the smallest set of likeliest tokens whose probability reaches top_p (Holtzman et al. 2019, arXiv 1904.09751)
    min_p               keep tokens at least min_p times as likely as the likeliest (Nguyen et al. 2024, arXiv 2407.01082)
    repetition_penalty  divides positive, multiplies negative logits of tokens in prompt or output (Keskar et al. 2019, arXiv 1909.05858)
    presence_penalty    subtracted from the logit of every token in the output so far
    frequency_penalty   subtracted once per occurrence in the output so far
    logit_bias          added to single tokens' logits, by token id
    seed                same seed, same text, whatever else is in the batch; None draws one
    stop                strings that end the text (checked by the text layer above the engine)
    stop_token_ids      tokens that end the output
    ignore_eos          the model's own end tokens do not end the output
    max_tokens          at most so many output tokens; None means to the end of the context
    min_tokens          end tokens and stops are impossible before so many output tokens
    logprobs            None: none; k: log-probabilities of the chosen and of the k likeliest tokens under the model itself
    n                   so many independent outputs that share the prompt's key/value blocks
    beam_width          None: sample; k: beam search with k beams, of which the best n are returned
    length_penalty      beam score = log-probability / length ** length_penalty
    """

    temperature: Annotated[float, Field(ge=0.0, le=100.0)] = 1.0
    top_k: NonNegativeInt = 0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    min_p: Probability = 0.0
    repetition_penalty: Annotated[float, Field(gt=0.0, le=10.0)] = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: Annotated[dict[NonNegativeInt, Bias], Field(max_length=MAX_LOGIT_BIAS)] = Field(default_factory=dict)
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Annotated[tuple[Annotated[str, Field(min_length=1, max_length=1000)], ...], Field(max_length=MAX_STOPS)] = ()
    stop_token_ids: Annotated[tuple[NonNegativeInt, ...], Field(max_length=MAX_STOPS)] = ()
    ignore_eos: bool = False
    max_tokens: PositiveInt | None = None
    min_tokens: NonNegativeInt = 0
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_SEQUENCES)] = 1
    beam_width: Annotated[int, Field(ge=1, le=MAX_SEQUENCES)] | None = None
    length_penalty: float = 1.0

    @model_validator(mode="after")
    def _agree(self) -> SamplingParams:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens = {self.min_tokens} is more than max_tokens = {self.max_tokens}")
        if self.beam_width is not None:
            if self.n > self.beam_width:
                raise ValueError(f"n = {self.n} outputs asked of beam_width = {self.beam_width} beams; raise beam_width or lower n")
            chosen = {"temperature", "top_k", "top_p", "min_p", "seed", "logprobs"} & self.model_fields_set
            if chosen - ({"temperature"} if self.temperature == 0 else set()):
                raise ValueError(f"beam search does not sample: remove {', '.join(sorted(chosen))} or beam_width")
        return self

    @property
    def greedy(self) -> bool:
        """True when the likeliest token is always taken."""
        return self.temperature == 0.0 and self.beam_width is None

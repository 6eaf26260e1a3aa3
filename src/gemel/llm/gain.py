"""How much a question helps to say its answer: the measure by which questions and answers that do not belong together are found.

    gain = mean log p(answer token | question, answer so far) - mean log p(answer token | no question, answer so far)

in nats per token, over all that the assistant says. An answer to another question is no likelier behind this one than behind none, or less
so; its gain is about zero or negative. The quotient of the two perplexities, exp(-gain), is known as the difficulty of following an
instruction (Li et al. 2023, "From Quantity to Quality", arXiv 2308.12032).

T tokens, S of them scored, V vocabulary, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch

from gemel.config.errors import RequestError
from gemel.model import build
from gemel.model.attend import PackedAttend
from gemel.tokenizer.conversation import Conversation
from gemel.tokenizer.mask import Encoded, encode_turns
from gemel.tokenizer.tokenizer import Tokenizer

BATCH_TOKENS = 4096  # that go through the model at once
SLICE_TOKENS = 512  # whose logits are there at once


class Gain:
    """A model that measures it. Conversations are rendered by the model's own chat template; "no question" is one that says nothing."""

    def __init__(self, model: Path):
        self._tokenizer = Tokenizer.load(model)
        self._loaded = build.load(model)

    def __call__(self, conversations: Sequence[Conversation]) -> list[float | None]:
        """Of each conversation; None where the template refuses it, nothing is said in it, or it is longer than the model can read."""
        asked, unasked = ([self._encoded(version(talk)) for talk in conversations] for version in (_answered, _unasked))
        whole = [there is not None and bare is not None for there, bare in zip(asked, unasked, strict=True)]
        sequences = [one for pair, fits in zip(zip(asked, unasked, strict=True), whole, strict=True) if fits for one in pair if one]
        means = self._means(sequences)
        return [next(means) - next(means) if fits else None for fits in whole]

    def _encoded(self, conversation: Conversation) -> Encoded | None:
        try:
            encoded = encode_turns(self._tokenizer, conversation)[0]
        except RequestError:
            return None
        return encoded if any(encoded.trained[1:]) and len(encoded.ids) <= self._loaded.config.max_positions else None

    def _means(self, sequences: Sequence[Encoded]) -> Iterator[float]:
        """Mean log-probability of each sequence's trained tokens, many sequences at a time, none seeing another."""
        group: list[Encoded] = []
        for sequence in sequences:
            if group and sum(len(one.ids) for one in group) + len(sequence.ids) > BATCH_TOKENS:
                yield from self._forward(group)
                group = []
            group.append(sequence)
        if group:
            yield from self._forward(group)

    @torch.inference_mode()
    def _forward(self, group: Sequence[Encoded]) -> Iterator[float]:
        model, starts = self._loaded.model, [0]
        for one in group:
            starts.append(starts[-1] + len(one.ids))
        tokens_T = torch.tensor([token for one in group for token in one.ids])
        positions_T = torch.cat([torch.arange(len(one.ids)) for one in group])
        hidden_TD = model(tokens_T, positions_T, PackedAttend(self._loaded.config, tuple(starts)))
        said_T = torch.tensor([trained and place > 0 for one in group for place, trained in enumerate(one.trained)])
        places_S = said_T.nonzero()[:, 0]
        logprobs = [
            torch.log_softmax(model.head(hidden_TD[places - 1]).float(), -1).gather(1, tokens_T[places, None])[:, 0]
            for places in torch.split(places_S, SLICE_TOKENS)
        ]
        sums_T = torch.zeros(len(tokens_T), dtype=torch.float64).index_put((places_S,), torch.cat(logprobs).double())
        for start, end in pairwise(starts):
            yield float(sums_T[start:end].sum() / said_T[start:end].sum())


def _answered(conversation: Conversation) -> Conversation:
    """Of a pair, with the chosen answer."""
    return conversation.ending(conversation.chosen) if conversation.chosen else conversation


def _unasked(conversation: Conversation) -> Conversation:
    """The same with nothing said by the user."""
    answered = _answered(conversation)
    return replace(answered, messages=tuple(replace(m, content="") if m.role == "user" else m for m in answered.messages))

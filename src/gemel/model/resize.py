"""Giving a model more tokens: rows added to its embedding and its head, in such a way that it computes what it did for all old tokens.

A new token starts as the mean of the tokens that its text had before (Sachidananda et al. 2021, arXiv 2109.12474), so that it means from
the first step on roughly what its text meant. Rows that no token uses, because sizes are padded, are the mean of all (Hewitt 2021,
"Initializing New Word Embeddings for Pretrained Language Models"): such a row is no likelier than tokens are on average. Nothing else
changes: an old token's logit is the product of the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from gemel.config.errors import ConfigError, UnsupportedError
from gemel.model.build import LoadedModel
from gemel.model.leaves.linear import Linear


def resize(loaded: LoadedModel, num_tokens: int, pieces: Mapping[int, Sequence[int]], pad_to_multiple: int = 1) -> LoadedModel:
    """The model with rows for ids below `num_tokens`, as many as are a multiple of `pad_to_multiple`; in place. It never gets fewer rows.

    `pieces` gives, for each new id, the old ids to start from; an id that is a padding row already is set too. Raises ConfigError for ids
    that do not fit, and UnsupportedError for a head of few bits.
    """
    model, config = loaded.model, loaded.config
    if type(model.head) is not Linear:
        raise UnsupportedError("the head is a matrix of few bits; resize the model that it was made from, then quantize again")
    old_rows = config.vocab_size
    num_rows = -(-max(num_tokens, old_rows) // pad_to_multiple) * pad_to_multiple
    for index, parts in pieces.items():
        if not 0 <= index < num_rows or not parts or any(not 0 <= part < old_rows or part in pieces for part in parts):
            raise ConfigError(
                f"new token {index} cannot start from {list(parts)}: give old ids below {old_rows}, and new ids below {num_rows}"
            )
    weight = _grown(model.embed.weight, num_rows, pieces)
    model.embed = nn.Embedding(num_rows, config.width, _weight=weight)
    if config.tied_head:
        model.head.weight = model.embed.weight
    else:
        model.head.weight = nn.Parameter(_grown(model.head.weight, num_rows, pieces))
    model.embed.requires_grad_(model.norm.weight.requires_grad)
    model.head.requires_grad_(model.norm.weight.requires_grad)
    model.head.out_features, model.head.sections = num_rows, (num_rows,)
    resized = config.model_copy(update={"vocab_size": num_rows})
    model.config = resized
    return LoadedModel(model, resized, loaded.path, loaded.eos_token_ids, loaded.bos_token_id, loaded.stored)


def _grown(weight: Tensor, num_rows: int, pieces: Mapping[int, Sequence[int]]) -> Tensor:
    """The old rows as they are, then means in fp32, rounded once."""
    old = weight.detach()
    grown = old.new_empty((num_rows, old.shape[1]))
    grown[: len(old)] = old
    grown[len(old) :] = old.mean(0, dtype=torch.float32).to(old.dtype)
    for index, parts in pieces.items():
        grown[index] = old[list(parts)].mean(0, dtype=torch.float32).to(old.dtype)
    return grown

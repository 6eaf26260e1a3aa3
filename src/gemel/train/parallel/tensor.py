"""Tensor parallel: each rank computes some heads, some of the feed-forward's width and some rows of the vocabulary.

Leaves are cut as the table beside the model says, and exchanges are put around them as hooks. The model's definition does not know of it,
parameters keep their names, and what a rank holds are plain tensors, with which every operation works.

With sequence parallel the ranks divide the tokens between the products, too: norms and the residual stream are computed once, not once per
rank, and activations take less memory by as much.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from gemel.config.errors import ConfigError
from gemel.config.model import Alibi
from gemel.model import shard
from gemel.model.leaves.linear import Leaf
from gemel.model.model import Model
from gemel.train.batch import Batch
from gemel.train.parallel import vocabulary
from gemel.train.parallel.collectives import enter, keep_own, leave
from gemel.train.parallel.mesh import Axis


def cut(model: Model, axis: Axis, sequence: bool) -> frozenset[str]:
    """Keep what this rank has of a whole model, and let the ranks speak where they must.

    Returns the names of the parameters that all ranks have and of whose gradients each rank computes a part. Raises `ConfigError` if the
    model cannot be divided so.
    """
    shard.check(model.config, axis.size)
    if isinstance(model.config.positions, Alibi):
        raise ConfigError(f"parallel.tensor = {axis.size}: attention with linear biases is not divided; set tensor = 1")
    styles = {name: shard.style_of(name) for name, _ in model.named_modules()}
    for name, module in model.named_modules():
        if isinstance(module, Leaf) and styles[name] in ("column", "row"):
            _cut_leaf(module, styles[name] == "column", axis, sequence)
    _cut_vocabulary(model, axis, sequence)
    own_tokens = ("norm", "embed_norm", "attn_norm", "mlp_norm", "positions") if sequence else ()
    return frozenset(name for name, _ in model.named_parameters() if name.split(".")[-2] in (*own_tokens, "q_norm", "k_norm"))


def _cut_leaf(leaf: Leaf, column: bool, axis: Axis, sequence: bool) -> None:
    assert isinstance(leaf, nn.Module)
    leaf.shard("column" if column else "row", axis.rank, axis.size)
    if column:
        leaf.register_forward_pre_hook(lambda _, inputs: (enter(inputs[0], axis, sequence),))
    else:
        leaf.register_forward_hook(lambda _, __, out_TD: leave(out_TD, axis, sequence))


def _cut_vocabulary(model: Model, axis: Axis, sequence: bool) -> None:
    num_rows = model.config.vocab_size
    start, stop = shard.rows_of(num_rows, axis.rank, axis.size)
    tied = model.head.weight is model.embed.weight
    for module in (model.embed, model.head):
        whole = module.weight
        module.weight = nn.Parameter(whole.detach()[start:stop].clone(), requires_grad=whole.requires_grad)
    if tied:
        model.head.weight = model.embed.weight
    model.head.out_features, model.head.sections = stop - start, (stop - start,)
    model.embed.num_embeddings = stop - start
    model.embed.forward = partial(_embed, model.embed, num_rows, axis, sequence)  # type: ignore[method-assign]
    if model.positions is not None and sequence:
        model.positions.register_forward_hook(lambda _, __, out_TD: keep_own(out_TD, axis))


def _embed(embed: nn.Embedding, num_rows: int, axis: Axis, sequence: bool, tokens_T: Tensor) -> Tensor:
    return leave(vocabulary.embedding(embed.weight, tokens_T, num_rows, axis), axis, sequence)


def padded(batch: Batch, unit: int) -> Batch:
    """The batch with a few tokens more, as a document of their own that is not trained, so that they are a multiple of `unit`."""
    missing = -batch.num_tokens % unit
    if not missing:
        return batch

    def pad(x: Tensor) -> Tensor:
        return torch.cat((x, x.new_zeros((missing, *x.shape[1:]))))

    more = torch.arange(missing, device=batch.positions_T.device)
    return Batch(
        pad(batch.tokens_T),
        torch.cat((batch.positions_T, more)),
        pad(batch.targets_T),
        pad(batch.weights_T),
        (*batch.starts, batch.num_tokens + missing),
        {name: pad(stream) for name, stream in batch.streams.items()},
    )

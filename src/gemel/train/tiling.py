"""Large products in parts, so that what they need besides their factors and results is there for one part at a time.

| cut along | what falls | what it costs |
|---|---|---|
| outputs | copies of weights in the type of the products, which autocast would keep from the forward to the backward pass | casting twice |
| tokens | the inner activations of feed-forwards, forwards and backwards | their forward products twice |

Sums over tiles are in another order than sums over the whole; everything else is the same arithmetic. T tokens, D and E widths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gemel.config.compute import TileOutputs, TileTokens, Tiling, Untiled
from gemel.model.leaves.linear import Linear, replace
from gemel.model.model import Model
from gemel.ops.train import product


def apply(config: Tiling, model: Model) -> None:
    """Cut the products of a model as the configuration says. `ConfigError` if it names none."""
    match config:
        case Untiled():
            return
        case TileOutputs():
            replace(model, config.match, partial(_tiled, config.tiles))
        case TileTokens():
            for block in model.layers:
                mlp = block.get_submodule("mlp")
                mlp.forward = partial(_by_tokens, config.tokens, mlp.forward)


def _by_tokens(num_tokens: int, forward: Callable[[Tensor], Tensor], x_TD: Tensor) -> Tensor:
    tiles: list[Tensor] = [checkpoint(forward, tile_TD, use_reentrant=False) for tile_TD in torch.split(x_TD, num_tokens)]
    return tiles[0] if len(tiles) == 1 else torch.cat(tiles)


class TiledLinear(Linear):
    """A leaf with the parameters of another, whose outputs are computed in `num_tiles` parts."""

    def __init__(self, leaf: Linear, num_tiles: int):
        with torch.device("meta"):
            super().__init__(leaf.in_features, leaf.out_features, leaf.bias is not None, leaf.sections)
        self.weight, self.bias, self.num_tiles = leaf.weight, leaf.bias, num_tiles

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] to [T, E]."""
        kind = x_TD.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_TD.dtype
        out_TE: Tensor = _Product.apply(x_TD.to(dtype), self.weight, self.bias, self.num_tiles)  # type: ignore[no-untyped-call]
        return out_TE


def _tiled(num_tiles: int, leaf: nn.Module) -> nn.Module:
    assert isinstance(leaf, Linear)
    return TiledLinear(leaf, num_tiles)


class _Product(torch.autograd.Function):
    """x W^T + b in the type of x, which need not be that of the weight."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None, num_tiles: int) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        ctx.num_tiles, ctx.bias_dtype = num_tiles, None if bias_E is None else bias_E.dtype
        out_TE = x_TD.new_empty(len(x_TD), len(weight_ED))
        with torch.autocast(x_TD.device.type, enabled=False):
            for rows in _rows(len(weight_ED), num_tiles):
                product(x_TD, weight_ED[rows].to(x_TD.dtype).t(), out_TE[:, rows])
        return out_TE if bias_E is None else out_TE.add_(bias_E)

    @staticmethod
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_ED = ctx.saved_tensors
        for_x, for_weight, for_bias, _ = ctx.needs_input_grad
        grad_TD = torch.zeros(x_TD.shape, dtype=torch.promote_types(x_TD.dtype, torch.float32), device=x_TD.device) if for_x else None
        grad_ED = torch.empty_like(weight_ED) if for_weight else None
        for rows in _rows(len(weight_ED), ctx.num_tiles):
            part_TE = grad_TE[:, rows]
            if grad_TD is not None:
                product(part_TE, weight_ED[rows].to(x_TD.dtype), grad_TD, add=True)
            if grad_ED is not None:
                product(part_TE.t(), x_TD, grad_ED[rows])
        grad_E = grad_TE.sum(0, dtype=torch.promote_types(grad_TE.dtype, torch.float32)).to(ctx.bias_dtype) if for_bias else None
        return None if grad_TD is None else grad_TD.to(x_TD.dtype), grad_ED, grad_E, None


def _rows(num: int, num_tiles: int) -> Iterator[slice]:
    """About equal parts of `num` rows, none of them empty."""
    size = -(-num // num_tiles)
    return (slice(start, min(start + size, num)) for start in range(0, num, size))

"""The leaf that every matrix product goes through, and the surgery that swaps leaves.

A leaf has four duties: `forward`, `plain` (its weight as an ordinary matrix), `shard` (keep one part of it) and its widths. A new kind of
leaf that has them can be put into any model by `replace`.
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from gemel import ops
from gemel.config.errors import ConfigError

ShardStyle = Literal["column", "row"]


@runtime_checkable
class Leaf(Protocol):
    """What a matrix product must know about itself."""

    in_features: int
    out_features: int
    sections: tuple[int, ...]
    bias: Tensor | None

    def plain(self) -> Tensor:
        """The weight as an ordinary [out_features, in_features] matrix."""
        ...

    def shard(self, style: ShardStyle, rank: int, size: int) -> None:
        """Keep part `rank` of `size` and forget the others."""
        ...


class Linear(nn.Linear):
    """x W^T + b.

    `sections` are the widths of outputs that lie fused in one matrix (queries, keys and values; gate and up): cutting by columns must cut
    each of them, or one part would get all the queries and another all the values.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False, sections: tuple[int, ...] = ()):
        super().__init__(in_features, out_features, bias)
        self.sections = sections or (out_features,)
        assert sum(self.sections) == out_features

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, in_features] to [T, out_features]."""
        return ops.linear(x_TD, self.weight, self.bias)

    def plain(self) -> Tensor:
        """The weight itself."""
        return self.weight

    def shard(self, style: ShardStyle, rank: int, size: int) -> None:
        """Keep part `rank` of `size`: of every output section ("column") or of the input ("row").

        The parts' outputs are concatenated in the first case and summed in the second, so there the bias stays with part 0 alone.
        """
        weight, bias = shard_weight(self.weight, self.bias, self.sections, style, rank, size)
        self.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        if self.bias is not None:
            self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=self.bias.requires_grad))
        self.out_features, self.in_features = weight.shape
        self.sections = shard_sections(self.sections, style, size)


def shard_weight(
    weight: Tensor, bias: Tensor | None, sections: tuple[int, ...], style: ShardStyle, rank: int, size: int
) -> tuple[Tensor, Tensor | None]:
    """Part `rank` of a plain weight and its bias, as copies that let the whole be freed."""
    if style == "row":
        _check_divides(weight.shape[1], size)
        kept = weight.detach().chunk(size, 1)[rank].clone()
        return kept, bias.detach().clone() if bias is not None and rank == 0 else None
    for width in sections:
        _check_divides(width, size)

    def cut(whole: Tensor) -> Tensor:
        return torch.cat([section.chunk(size)[rank] for section in torch.split(whole.detach(), list(sections))])

    return cut(weight), None if bias is None else cut(bias)


def shard_sections(sections: tuple[int, ...], style: ShardStyle, size: int) -> tuple[int, ...]:
    """The output sections of one part."""
    return sections if style == "row" else tuple(width // size for width in sections)


def _check_divides(width: int, size: int) -> None:
    if width % size:
        fits = [n for n in range(1, size) if width % n == 0]
        raise ConfigError(f"a width of {width} does not divide into {size} parts; sizes that do: {', '.join(map(str, fits))}")


def replace(model: nn.Module, pattern: str, make: Callable[[nn.Module], nn.Module]) -> int:
    """Put `make(leaf)` in the place of every leaf whose name matches the shell pattern, and return how many there were.

    `replace(model, "layers.*.mlp.*", LowRank)` reaches every feed-forward matrix. No match is an error: a technique that was asked for and
    applied to nothing would be a silent failure.
    """
    leaves = [name for name, module in model.named_modules() if isinstance(module, Leaf)]
    hits = [name for name in leaves if fnmatchcase(name, pattern)]
    if not hits:
        known = sorted({".".join("*" if part.isdigit() else part for part in name.split(".")) for name in leaves})
        raise ConfigError(f"no matrix is named like {pattern!r}; there are: {', '.join(known)}")
    for name in hits:
        model.set_submodule(name, make(model.get_submodule(name)))
    return len(hits)

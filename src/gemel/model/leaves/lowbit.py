"""Weights of 8 or 4 bits: what their numbers mean, how a matrix is rounded to them, and the leaf that multiplies with them.

Decoding reads every weight once per token, so fewer bits are more tokens per second. The products here are the reference that says what is
right: dequantize, then `F.linear`. Fast ones are made elsewhere from the same numbers.

N output rows, K inputs along a row, G groups of a row that share a scale, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemel.config.errors import ConfigError
from gemel.model.leaves.linear import ShardStyle, shard_sections

Activations = Literal["int8", "full"]
INT4_GROUPS = (32, 64, 128)  # elements of a row that can share a scale
INT8_GROUP = 32
ACTIVATION_GROUP = 32
_BLOCK_ELEMENTS = 2**20  # what is worked on at a time, so that fp32 copies stay small and in the cache


@dataclass(frozen=True)
class LowBit:
    """A matrix [N, K] of whole numbers with scales.

    q        8 bits: int8 [N, K], from -127 to 127. 4 bits: uint8 [N, K/2], two numbers from 0 to 15 per byte, the one of even k in the
             lower half
    scale    per row: fp32 [N] (8 bits only). Per group along a row: fp16 [N, G], groups of 32 (8 bits) or 32, 64 or 128 (4 bits)
    minimum  4 bits only: fp16 [N, G], or None if the numbers lie around their middle

    The weight is scale * q with 8 bits; scale * q + minimum with 4 bits, or scale * (q - 8) without minimum.
    """

    q: Tensor
    scale: Tensor
    minimum: Tensor | None = None

    def __post_init__(self) -> None:
        num_rows, width = self.shape
        assert self.q.dtype in (torch.int8, torch.uint8)
        assert self.minimum is None or (self.bits == 4 and self.minimum.shape == self.scale.shape and self.minimum.dtype == torch.float16)
        if self.scale.dim() == 1:
            assert self.bits == 8 and self.scale.shape == (num_rows,) and self.scale.dtype == torch.float32
        else:
            assert self.scale.shape == (num_rows, width // self.group) and self.scale.dtype == torch.float16
            assert self.group in (INT4_GROUPS if self.bits == 4 else (INT8_GROUP,)) and width % self.group == 0

    @property
    def bits(self) -> int:
        """8 or 4."""
        return 8 if self.q.dtype == torch.int8 else 4

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and width of the weight, whatever its packing."""
        return self.q.shape[0], self.q.shape[1] * 8 // self.bits

    @property
    def group(self) -> int:
        """Elements of a row that share a scale; 0 if the whole row does."""
        return 0 if self.scale.dim() == 1 else self.shape[1] // self.scale.shape[1]

    def alike(self, other: LowBit) -> bool:
        """Whether rows of both can lie in one matrix."""
        return (self.bits, self.group, self.minimum is None) == (other.bits, other.group, other.minimum is None)

    def map(self, change: Callable[[Tensor], Tensor]) -> LowBit:
        """The same change to every tensor of the matrix, such as a choice of rows."""
        return LowBit(change(self.q), change(self.scale), None if self.minimum is None else change(self.minimum))

    def is_finite(self) -> bool:
        """Whether every weight is a number."""
        return all(bool(x.isfinite().all()) for x in (self.scale, self.minimum) if x is not None)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K], computed in fp32 and rounded to `dtype`."""
        out_NK = torch.empty(self.shape, dtype=dtype, device=self.q.device)
        for rows in _blocks(*self.shape):
            out_NK[rows] = self.map(lambda x, rows=rows: x[rows])._expand()  # type: ignore[misc]
        return out_NK

    def _expand(self) -> Tensor:
        num_rows, width = self.shape
        q_NK = self.q if self.bits == 8 else torch.stack((self.q & 15, self.q >> 4), -1).view(num_rows, width)
        q_NGg = q_NK.view(num_rows, -1, self.group or width).float()
        if self.bits == 4 and self.minimum is None:
            q_NGg -= 8
        q_NGg *= self.scale.float().view(num_rows, -1, 1)
        if self.minimum is not None:
            q_NGg += self.minimum.float()[..., None]
        return q_NGg.view(num_rows, width)


def quantize(weight_NK: Tensor, bits: Literal[8, 4], group: int = 0) -> LowBit:
    """Round a matrix to nearest.

    8 bits: scale = max|w| / 127 of a row (group 0) or of a group of 32. 4 bits: scale = m / -8 of a group, where m is its element of
    largest size with its sign, as in GGUF's Q4_0: the side on which m lies gets the longer arm of -8..7. On SmolLM2-135M that leaves an
    error 12 to 14% smaller than max|w| / 7. Scales of groups are rounded to fp16 before anything is divided by them. A weight that is not
    finite, or too large for its scale, makes that scale infinite or NaN: see `is_finite`.
    """
    num_rows, width = weight_NK.shape
    _check_divides(width, bits, group)
    where = weight_NK.device
    q = torch.empty((num_rows, width * bits // 8), dtype=torch.int8 if bits == 8 else torch.uint8, device=where)
    scale = torch.empty((num_rows, width // group), dtype=torch.float16, device=where) if group else torch.empty(num_rows, device=where)
    for rows in _blocks(num_rows, width):
        w_NGg = weight_NK[rows].float().reshape(-1, width // (group or width), group or width)
        low_NG1, high_NG1 = w_NGg.amin(-1, keepdim=True), w_NGg.amax(-1, keepdim=True)
        top_NG1 = torch.maximum(high_NG1, -low_NG1)
        peak_NG1 = top_NG1 / 127 if bits == 8 else torch.where(high_NG1 > -low_NG1, -top_NG1, top_NG1) / 8
        scale[rows] = peak_NG1.view(scale[rows].shape)
        scale_NG1 = scale[rows].float().view(peak_NG1.shape)
        w_NGg /= scale_NG1.masked_fill(scale_NG1 == 0, torch.inf)
        if bits == 8:
            q[rows] = w_NGg.round_().clamp_(-127, 127).view(-1, width)
        else:
            q_NK = w_NGg.round_().add_(8).clamp_(0, 15).to(torch.uint8).view(-1, width)
            q[rows] = q_NK[:, ::2] | q_NK[:, 1::2] << 4
    return LowBit(q, scale)


def _check_divides(width: int, bits: int, group: int) -> None:
    """Refuse a group that does not divide the width of the rows, naming those that do."""
    groups = INT4_GROUPS if bits == 4 else (0, INT8_GROUP)
    if group not in groups:
        raise ConfigError(f"{bits}-bit weights cannot have groups of {group}; {', '.join(map(str, groups))} are built")
    if group and width % group:
        fits = [str(n) for n in INT4_GROUPS if width % n == 0]
        way_out = f"groups that do: {', '.join(fits)}" if fits and bits == 4 else "no group does: use int8 weights with one scale per row"
        raise ConfigError(f"rows of {width} elements do not divide into groups of {group}; {way_out}")


def round_activations(x_TK: Tensor) -> Tensor:
    """What remains of activations that are rounded to int8: one fp32 scale (max|x| / 127) per 32 along K, to nearest even. fp32 [T, K]."""
    width = x_TK.shape[-1]
    padded_TK = F.pad(x_TK.float(), (0, -width % ACTIVATION_GROUP))
    x_TGg = padded_TK.view(*x_TK.shape[:-1], -1, ACTIVATION_GROUP)
    scale_TG1 = x_TGg.abs().amax(-1, keepdim=True) / 127
    rounded_TGg = (x_TGg / scale_TG1.masked_fill(scale_TG1 == 0, torch.inf)).round_() * scale_TG1
    return rounded_TGg.view(padded_TK.shape)[..., :width]


class LowBitLinear(nn.Module):
    """x W^T + b with W of 8 or 4 bits; see `LowBit` for `q`, `scale` and `minimum`, which are buffers: nothing here trains.

    `activations` "int8" rounds the input first, as the integer kernels do; "full" leaves it as it is.
    """

    q: Tensor
    scale: Tensor
    minimum: Tensor | None
    bias: Tensor | None

    def __init__(self, matrix: LowBit, bias: Tensor | None = None, sections: tuple[int, ...] = (), activations: Activations = "int8"):
        super().__init__()
        self.activations = activations
        self._hold(matrix, bias, sections or (matrix.shape[0],))

    def _hold(self, matrix: LowBit, bias: Tensor | None, sections: tuple[int, ...]) -> None:
        self.out_features, self.in_features = matrix.shape
        self.bits, self.group, self.sections = matrix.bits, matrix.group, sections
        assert sum(sections) == self.out_features
        for name, tensor in (("q", matrix.q), ("scale", matrix.scale), ("minimum", matrix.minimum), ("bias", bias)):
            self.register_buffer(name, None if tensor is None else tensor.detach())

    @property
    def matrix(self) -> LowBit:
        """The weight with its scales."""
        return LowBit(self.q, self.scale, self.minimum)

    def plain(self) -> Tensor:
        """The weight as fp32 [out_features, in_features], as a new tensor."""
        return self.matrix.dense()

    def forward(self, x_TK: Tensor) -> Tensor:
        """[T, in_features] to [T, out_features] of the same type, computed in fp32."""
        rounded_TK = round_activations(x_TK) if self.activations == "int8" else x_TK.float()
        return F.linear(rounded_TK, self.plain(), None if self.bias is None else self.bias.float()).to(x_TK.dtype)

    def shard(self, style: ShardStyle, rank: int, size: int) -> None:
        """Keep part `rank` of `size`, as plain leaves do. By rows, no group of weights or of rounded activations may be cut."""
        unit = max(self.group, ACTIVATION_GROUP if self.activations == "int8" else 1) if style == "row" else 1
        for width in (self.in_features,) if style == "row" else self.sections:
            if width % (unit * size):
                fits = ", ".join(str(n) for n in range(1, size) if width % (unit * n) == 0) or "none"
                groups = f" of whole groups of {unit}" if unit > 1 else ""
                raise ConfigError(f"a width of {width} does not divide into {size} parts{groups}; sizes that do: {fits}")

        def part(x: Tensor) -> Tensor:
            if style == "row":
                return x.clone() if x.dim() == 1 else x.chunk(size, 1)[rank].clone()
            return torch.cat([section.chunk(size)[rank] for section in torch.split(x, list(self.sections))])

        bias = self.bias
        if bias is not None:
            bias = part(bias) if style == "column" or rank == 0 else None
        self._hold(self.matrix.map(part), bias, shard_sections(self.sections, style, size))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LowBitLinear:
        """Moves to another device, but never to another type: scales rounded once more would be other weights."""
        before = {name: tensor for name, tensor in self._buffers.items() if tensor is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in before.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        return self

    def extra_repr(self) -> str:
        """Widths as `nn.Linear` prints them, and the format."""
        kind = f"bits={self.bits}, group={self.group}, minimum={self.minimum is not None}, activations={self.activations}"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {kind}"


def _blocks(num_rows: int, width: int) -> Iterator[slice]:
    step = max(1, _BLOCK_ELEMENTS // max(width, 1))
    for first in range(0, num_rows, step):
        yield slice(first, first + step)

"""Inference on CPU: a weight reordered once into the blocks that oneDNN's kernels read.

Plain `F.linear` reorders on every call or runs a kernel that does not need it; with a packed weight the reordering is paid once. In fp32 it
is the faster route from 4 to 64 rows, and unlike the plain one its rows are bitwise independent of how many rows are in the call, so a
request's numbers do not depend on its neighbours in the batch. No gradient flows through it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gemel.config.errors import UnsupportedError
from gemel.model.leaves.linear import Linear, ShardStyle, replace, shard_sections, shard_weight


class PrepackedLinear(nn.Module):
    """x W^T + b with W in oneDNN's layout. The packed weight is not a parameter: it neither trains nor moves with `.to`."""

    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, sections: tuple[int, ...]):
        super().__init__()
        self.sections = sections
        self._pack(weight, bias)

    def _pack(self, weight: Tensor, bias: Tensor | None) -> None:
        self.out_features, self.in_features = weight.shape
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, in_features] to [T, out_features]."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x_TD, self._packed, self.bias, "none", [], "")
        return out

    def plain(self) -> Tensor:
        """The weight as it was before packing, bit by bit, as a new tensor."""
        return self._packed.to_dense()

    def shard(self, style: ShardStyle, rank: int, size: int) -> None:
        """Keep part `rank` of `size`, packed anew."""
        self._pack(*shard_weight(self.plain(), self.bias, self.sections, style, rank, size))
        self.sections = shard_sections(self.sections, style, size)

    def extra_repr(self) -> str:
        """Widths, as `nn.Linear` prints them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def can_prepack(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies that type natively through oneDNN; where it does not, packing would be slower than leaving it alone."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def prepack(model: nn.Module) -> int:
    """Replace every plain leaf, the head included, by its packed form, and return how many there were: 0 where `can_prepack` says no.

    The plain weights are freed, except an embedding that a tied head shares. To be done last: packed weights can still be saved and
    sharded, but not trained.
    """
    weight = next(model.parameters())
    if weight.device.type != "cpu":
        raise UnsupportedError(f"prepacking is for CPU, and the model is on {weight.device}; leave it out there")
    if not can_prepack(weight.dtype):
        return 0

    def pack(leaf: nn.Module) -> nn.Module:
        return PrepackedLinear(leaf.weight, leaf.bias, leaf.sections) if type(leaf) is Linear else leaf

    return replace(model, "*", pack)

"""Parameters that are there whole only while they are needed (ZeRO stage 3), through torch's `fully_shard`.

Each rank keeps some rows of every parameter, with their gradients and optimizer states. A block's parameters are gathered before it runs,
forward and backward, and forgotten behind it, while the next block's are on their way; gradients go back as sums over ranks, row by row
(Zhao et al. 2023, arXiv 2304.11277). With `parallel.replicate` the rows are shared within a copy and summed between copies (hybrid).

While a block computes it has plain tensors, so every operation works; between blocks nobody may look at parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from gemel.config.compute import Activations, RecomputeBlocks
from gemel.model import build
from gemel.model.model import Model
from gemel.train.parallel.data import Write
from gemel.train.parallel.layout import Piece
from gemel.train.parallel.mesh import Mesh


class Sharded:
    """See `data.Gradients`. The blocks that are recomputed together are gathered together."""

    def __init__(
        self,
        model: Model,
        named: Mapping[str, nn.Parameter],
        mesh: Mesh,
        speaks: Mapping[str, bool],
        activations: Activations,
        device: torch.device,
    ):
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        self._model, axis = model, mesh.shards
        shapes = {name: p.shape for name, p in named.items()}
        devices, policy = mesh.hybrid(), MixedPrecisionPolicy(reduce_dtype=torch.float32)
        for group in _groups(list(model.layers), activations):
            for block in group:
                build.allocate(block, device)
            fully_shard(group, mesh=devices, mp_policy=policy)
        build.allocate(model, device)
        fully_shard(model, mesh=devices, mp_policy=policy)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
                module.set_all_reduce_hook(self._came)
        self._sums, self._taken = torch.empty(0), 0
        self.pieces = {}
        for name, shape in shapes.items():
            rows = -(-shape[0] // axis.size)
            start = min(axis.rank * rows, shape[0]) * shape[1:].numel()
            parameter = self._parameter(name)
            own = _local(parameter.detach()).requires_grad_()
            own.grad_dtype = torch.float32
            self.pieces[name] = Piece(own, start, speaks[name] and mesh.replicate.rank == 0)
            if parameter.dtype != torch.float32:
                parameter.register_post_accumulate_grad_hook(partial(self._take, own, rows * shape[1:].numel()))  # type: ignore[no-untyped-call]

    def _parameter(self, name: str) -> Tensor:
        return self._model.get_parameter(name)

    def _came(self, sums: Tensor) -> None:
        """The gradients of parameters that are gathered together, in fp32, each filled up to as many rows as all ranks have."""
        self._sums, self._taken = sums, 0

    @torch.no_grad()
    def _take(self, own: Tensor, num: int, parameter: Tensor) -> None:
        """Add to a piece's gradient before it is rounded to the type of its parameter, as torch does behind the sum over ranks."""
        grad = self._sums[self._taken : self._taken + own.numel()].view(own.shape)
        own.grad, parameter.grad = grad if own.grad is None else own.grad.add_(grad), None
        self._taken += num

    def backward(self, last: bool) -> AbstractContextManager[None]:  # noqa: ARG002
        """See `data.Gradients.backward`. Sums are torch's affair."""
        return nullcontext()

    def collect(self) -> dict[str, Tensor]:
        """See `data.Gradients.collect`."""
        for name, piece in self.pieces.items():
            if (grad := self._parameter(name).grad) is not None:
                piece.tensor.grad = _local(grad)
        return {name: piece.tensor.grad for name, piece in self.pieces.items() if piece.tensor.grad is not None}

    def spread(self) -> None:
        """See `data.Gradients.spread`. The next to gather a parameter gets it from all."""
        for name, piece in self.pieces.items():
            self._parameter(name).grad = piece.tensor.grad = None

    def weights(self) -> Mapping[str, Piece]:
        """See `data.Gradients.weights`. What was gathered of them would not know of changes, and is forgotten."""
        self._model.reshard()  # type: ignore[operator]
        return self.pieces

    def refresh(self, write: Write) -> None:
        """Nothing."""


def _local(tensor: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor)
    return tensor.to_local()


def _groups(blocks: list[nn.Module], activations: Activations) -> Sequence[list[nn.Module]]:
    """What runs as one."""
    size = activations.size(len(blocks)) if isinstance(activations, RecomputeBlocks) else 1
    return [blocks[first : first + size] for first in range(0, len(blocks), size)]

"""Parameters that are there whole only while they are needed (ZeRO stage 3), through torch's `fully_shard`.

Each rank keeps some rows of every parameter, with their gradients and optimizer states. A block's parameters are gathered before it runs,
forward and backward, and forgotten behind it, while the next block's are on their way; gradients go back as sums over ranks, row by row
(Zhao et al. 2023, arXiv 2304.11277). With `parallel.replicate` the rows are shared within a copy and summed between copies (hybrid).

While a block computes it has plain tensors, so every operation works; between blocks nobody may look at parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from gemel.config.errors import ConfigError
from gemel.config.optim import OptimConfig
from gemel.config.train import Activations, RecomputeBlocks
from gemel.model import build
from gemel.model.model import Model
from gemel.train.parallel.layout import Piece
from gemel.train.parallel.mesh import Mesh


def check(config: OptimConfig) -> None:
    """Refuse what needs more of a parameter than some rows."""
    way_out = "or share less: parallel.zero = 'gradients'"
    if config.method.kind in ("muon", "adafactor"):
        raise ConfigError(
            f"optim.method {config.method.kind!r} looks at matrices as a whole, of which parallel.zero = 'parameters' leaves each rank "
            f"some rows; take adamw, lion or sgd, {way_out}"
        )
    if config.weights != "fp32":
        raise ConfigError(
            f"optim.weights = {config.weights!r} is not built for parallel.zero = 'parameters'; set weights = 'fp32', {way_out}"
        )
    if config.state == "int8":
        raise ConfigError(f"optim.state = 'int8' has blocks that parallel.zero = 'parameters' would cut; set state = 'bf16', {way_out}")


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
        from torch.distributed.fsdp import FSDPModule, fully_shard

        self._model, self._names, self._axis = model, list(named), mesh.shards
        shapes = {name: p.shape for name, p in named.items()}
        devices = mesh.hybrid()
        for group in _groups(list(model.layers), activations):
            for block in group:
                build.allocate(block, device)
            fully_shard(group, mesh=devices)
        build.allocate(model, device)
        fully_shard(model, mesh=devices)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        self.pieces = {}
        for name, shape in shapes.items():
            rows = -(-shape[0] // self._axis.size)
            start = min(self._axis.rank * rows, shape[0]) * shape[1:].numel()
            own = _local(self._parameter(name).detach()).requires_grad_()
            self.pieces[name] = Piece(own, start, speaks[name] and mesh.replicate.rank == 0)

    def _parameter(self, name: str) -> Tensor:
        return self._model.get_parameter(name)

    def backward(self, last: bool) -> AbstractContextManager[None]:  # noqa: ARG002
        """See `data.Gradients.backward`. Sums are torch's affair."""
        return nullcontext()

    def collect(self) -> dict[str, Tensor]:
        """See `data.Gradients.collect`."""
        grads = {}
        for name in self._names:
            if (grad := self._parameter(name).grad) is not None:
                self.pieces[name].tensor.grad = grads[name] = _local(grad)
        return grads

    def spread(self) -> None:
        """See `data.Gradients.spread`. The next to gather a parameter gets it from all."""
        for name, piece in self.pieces.items():
            self._parameter(name).grad = piece.tensor.grad = None

    def weights(self) -> Mapping[str, Piece]:
        """See `data.Gradients.weights`. What was gathered of them would not know of changes, and is forgotten."""
        self._model.reshard()  # type: ignore[operator]
        return self.pieces


def _local(tensor: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor)
    return tensor.to_local()


def _groups(blocks: list[nn.Module], activations: Activations) -> Sequence[list[nn.Module]]:
    """What runs as one."""
    size = activations.size(len(blocks)) if isinstance(activations, RecomputeBlocks) else 1
    return [blocks[first : first + size] for first in range(0, len(blocks), size)]

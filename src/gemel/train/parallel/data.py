"""Data parallel: ranks that learn from different sequences, and what each of them keeps of gradients and optimizer states.

    Everything      all ranks have all gradients. Alone, a rank has them anyway
    OwnedStates     each rank moves its share of the weights, keeps the optimizer's states of these alone, and tells the others what they
                    are now (ZeRO stage 1, Rajbhandari et al. 2019, arXiv 1910.02054)
    OwnedGradients  besides, the gradients of a share go to its owner with every micro-batch, and nobody else keeps them (stage 2)
    `sharded`       has stage 3

A share is a run of whole stretches of the optimizer: what an optimizer does with a share is, bit by bit, what it does with the whole.
Methods that look at a matrix as a whole get it whole; where ranks have parts of it, through `matrices`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gemel.train.offload import Homes
from gemel.train.optim.optimizer import STRETCH
from gemel.train.parallel.layout import Piece
from gemel.train.parallel.mesh import Axis, Mesh
from gemel.train.parallel.sums import Bucket, Slice, Sums, add_up, buckets, unpack

Named = Mapping[str, nn.Parameter]
Write = Callable[[Tensor, Tensor], None]  # a tensor, and what it becomes


class Gradients(Protocol):
    """From backward passes to the gradients that this rank's optimizer needs, and from the weights that it moved to everybody's."""

    @property
    def pieces(self) -> Mapping[str, Piece]:
        """What this rank moves."""
        ...

    def backward(self, last: bool) -> AbstractContextManager[None]:
        """Around the backward pass of a micro-batch, `last` of the step or not. Who cannot say leaves it out."""
        ...

    def collect(self) -> dict[str, Tensor]:
        """Behind all of them: the gradients of `pieces`, summed over all ranks with other tokens; they are the pieces' `grad`, too."""
        ...

    def spread(self) -> None:
        """Behind the optimizer, whether it moved or not: everybody has the weights, nobody has gradients."""
        ...

    def weights(self) -> Mapping[str, Piece]:
        """What this rank has of the parameters, moved by it or not: to be saved, or changed in place."""
        ...

    def refresh(self, write: Write) -> None:
        """Behind such a change: who has copies takes them anew, by `write`, which changes a tensor."""
        ...


class Everything:
    """Every rank has every gradient, and moves every weight."""

    def __init__(self, named: Named, mesh: Mesh, speaks: Mapping[str, bool]):
        self._named = named
        self._sums = _to_all(named, mesh) if mesh.tokens.size > 1 else None
        self.pieces = {name: Piece(p, 0, speaks[name] and mesh.tokens.rank == 0) for name, p in named.items()}

    def backward(self, last: bool) -> AbstractContextManager[None]:
        """See `Gradients.backward`."""
        return self._sums.sending() if last and self._sums is not None else nullcontext()

    def collect(self) -> dict[str, Tensor]:
        """See `Gradients.collect`."""
        if self._sums is not None:
            self._sums.finish()
        return {name: p.grad for name, p in self._named.items() if p.grad is not None}

    def spread(self) -> None:
        """See `Gradients.spread`."""
        for parameter in self._named.values():
            parameter.grad = None

    def weights(self) -> Mapping[str, Piece]:
        """See `Gradients.weights`."""
        return self.pieces

    def refresh(self, write: Write) -> None:
        """Nothing."""


class _Owned:
    """Each of the ranks of `mesh.shards` moves a share of the weights."""

    def __init__(self, named: Named, mesh: Mesh, homes: Homes, speaks: Mapping[str, bool], slices: Mapping[int, list[Slice]]):
        self._named, self._mesh, self._homes, self._speaks, self._slices = named, mesh, homes, speaks, slices
        self._buckets = [bucket for owner in sorted(slices, reverse=True) for bucket in buckets(slices[owner], owner)]
        self.pieces: dict[str, Piece] = {}
        for one in slices[mesh.shards.rank]:
            whole = one.stop - one.start == one.parameter.numel()
            tensor = one.parameter.detach() if whole else one.parameter.detach().view(-1)[one.start : one.stop]
            tensor.requires_grad_()
            tensor.grad_dtype = torch.float32
            self.pieces[one.name] = Piece(tensor, one.start, speaks[one.name] and mesh.replicate.rank == 0)

    @torch.no_grad()
    def spread(self) -> None:
        """See `Gradients.spread`."""
        for parameter in (*self._named.values(), *(piece.tensor for piece in self.pieces.values())):
            parameter.grad = None
        axis = self._mesh.shards
        for bucket in self._buckets:
            with self._homes.visiting([one.parameter.detach() for one in bucket.slices]):
                _tell(bucket, axis)

    def weights(self) -> Mapping[str, Piece]:
        """See `Gradients.weights`."""
        return {name: Piece(p, 0, self._speaks[name] and self._mesh.tokens.rank == 0) for name, p in self._named.items()}

    def refresh(self, write: Write) -> None:
        """Nothing."""


class OwnedStates(_Owned):
    """All ranks have all gradients, and each has the optimizer's states of its share."""

    def __init__(self, named: Named, mesh: Mesh, homes: Homes, speaks: Mapping[str, bool], slices: Mapping[int, list[Slice]]):
        super().__init__(named, mesh, homes, speaks, slices)
        self._sums = _to_all(named, mesh)

    def backward(self, last: bool) -> AbstractContextManager[None]:
        """See `Gradients.backward`."""
        return self._sums.sending() if last else nullcontext()

    def collect(self) -> dict[str, Tensor]:
        """See `Gradients.collect`."""
        self._sums.finish()
        for one in self._slices[self._mesh.shards.rank]:
            piece, grad = self.pieces[one.name].tensor, one.parameter.grad
            assert grad is not None
            piece.grad = grad.view(-1)[one.start : one.stop].view(piece.shape)
        return {name: piece.tensor.grad for name, piece in self.pieces.items() if piece.tensor.grad is not None}


class OwnedGradients(_Owned):
    """Each rank has the gradients and the optimizer's states of its share."""

    def __init__(self, named: Named, mesh: Mesh, homes: Homes, speaks: Mapping[str, bool], slices: Mapping[int, list[Slice]]):
        super().__init__(named, mesh, homes, speaks, slices)
        self._sums = Sums(self._buckets, mesh.shards, self._add, free=True)
        self._pending = True  # whether gradients may lie here that have not gone to their owners

    @contextmanager
    def backward(self, last: bool) -> Iterator[None]:  # noqa: ARG002
        """See `Gradients.backward`."""
        with self._sums.sending():
            yield
        self._sums.finish()
        self._pending = False

    def _add(self, bucket: Bucket, flat: Tensor) -> None:
        for one, grad in unpack(bucket, flat):
            piece = self.pieces[one.name].tensor
            piece.grad = grad.view(piece.shape) if piece.grad is None else piece.grad.add_(grad.view(piece.shape))

    def collect(self) -> dict[str, Tensor]:
        """See `Gradients.collect`."""
        if self._pending:
            self._sums.finish()
        self._pending = True
        grads = {name: piece.tensor.grad for name, piece in self.pieces.items() if piece.tensor.grad is not None}
        if self._mesh.replicate.size > 1 and grads:
            add_up(list(grads.values()), self._mesh.replicate)
        return grads


def _tell(bucket: Bucket, axis: Axis) -> None:
    """What an owner has now, everywhere."""
    parts = [one.parameter.detach().view(-1)[one.start : one.stop] for one in bucket.slices]
    flat = torch.cat(parts)
    dist.broadcast(flat, group=axis.group, group_src=bucket.owner)
    if bucket.owner != axis.rank:
        torch._foreach_copy_(parts, list(torch.split(flat, [len(part) for part in parts])))


def _to_all(named: Named, mesh: Mesh) -> Sums:
    def arrived(bucket: Bucket, flat: Tensor) -> None:
        for one, grad in unpack(bucket, flat):
            one.parameter.grad = grad.view(one.parameter.shape)

    return Sums(buckets([Slice(name, p, 0, p.numel()) for name, p in named.items()]), mesh.tokens, arrived, free=False)


def shares(named: Named, sizes: Mapping[str, int], indivisible: Collection[str], num_ranks: int) -> dict[int, list[Slice]]:
    """Who moves what: of all parameters in their order about equal numbers of elements each.

    `sizes` are of the parameters, on all ranks the same, whatever lies here: what is here may be a little less, or nothing.
    """
    total, position = sum(sizes.values()), 0
    found: dict[int, list[Slice]] = {owner: [] for owner in range(num_ranks)}

    def owner_of(middle: float) -> int:
        return min(int(middle * num_ranks / total), num_ranks - 1)

    for name, size in sizes.items():
        num_units = 1 if name in indivisible else max(size // STRETCH, 1)
        owners = [owner_of(position + (unit + 0.5) * size / num_units) for unit in range(num_units)]
        for owner in dict.fromkeys(owners):
            first, behind = owners.index(owner), owners.index(owner) + owners.count(owner)
            if (parameter := named.get(name)) is not None:
                stop = parameter.numel() if behind == num_units else behind * STRETCH
                found[owner].append(Slice(name, parameter, first * STRETCH, stop))
        position += size
    return found

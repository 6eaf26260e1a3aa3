"""What has to be whole where it is moved, and is divided among ranks: each such tensor has an owner, who puts it together, and gives back.

Muon looks at the singular values of a matrix, Adafactor at its rows and columns, and eight bits of state have blocks that no rank's part
respects. Behind the backward pass the parts of their gradients go to the owners, and behind the optimizer what the owners moved comes back:
one exchange each way, in which every rank gives, and owns about as many elements as any other. So all owners work at the same time, on what
one process would have worked on, and their state is the state of one process.

What it costs beside the exchange: an owner keeps the weights of what it owns once more, and while it moves them their gradients.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor

from gemel.model.shard import Cut
from gemel.train.parallel.data import Gradients, Write
from gemel.train.parallel.layout import Piece
from gemel.train.parallel.mesh import Axis, Mesh
from gemel.train.parallel.sums import BUCKET


def put_together(parts: Gradients, names: Collection[str], cuts: Mapping[str, Cut], mesh: Mesh, by_rows: bool) -> Gradients:
    """Of `names`, the same on all ranks, what the tensor ranks divide, and with `by_rows` what the ranks of `mesh.shards` do."""
    size = mesh.tensor.size
    cut = {name for name in names if size > 1 and cuts[name].shape_of(0, size) != cuts[name].shape}
    if by_rows and (others := {name: cuts[name] for name in names if name not in cut}):
        parts = Matrices(parts, others, mesh.shards)
    if here := {name: cuts[name] for name in names if name in cut and name in parts.pieces}:
        parts = Matrices(parts, here, mesh.joined("shard", "context", "tensor") if by_rows else mesh.tensor, size)
    return parts


class Matrices:
    """See `data.Gradients`. `parts` has what this rank has of each tensor, some rows of one of the parts that `cuts` say."""

    def __init__(self, parts: Gradients, cuts: Mapping[str, Cut], axis: Axis, num_parts: int = 1):
        """The ranks of `axis` have parts one after the other, and again the next rows of each. All get the same `cuts`."""
        self._parts, self._axis, self._num_parts = parts, axis, num_parts
        self._cuts = {name: cut for name, cut in cuts.items() if name in parts.pieces}
        self._owners = _owners({name: cut.shape.numel() for name, cut in cuts.items()}, axis.size)
        self.pieces = {name: piece for name, piece in parts.pieces.items() if name not in cuts}
        for names in self._rounds():
            for name, whole in self._bring(names, self._held()).items():
                whole.requires_grad_()
                whole.grad_dtype = torch.float32
                self.pieces[name] = Piece(whole, 0, parts.pieces[name].speaks)

    def backward(self, last: bool) -> AbstractContextManager[None]:
        """See `data.Gradients.backward`."""
        return self._parts.backward(last)

    def collect(self) -> dict[str, Tensor]:
        """See `data.Gradients.collect`."""
        grads = self._parts.collect()
        found = {name: grad for name, grad in grads.items() if name not in self._cuts}
        for names in self._rounds():
            unseen = {name: torch.zeros_like(self._parts.pieces[name].tensor, dtype=torch.float32) for name in names if name not in grads}
            for name, whole in self._bring(names, grads | unseen).items():
                self.pieces[name].tensor.grad = found[name] = whole
        return found

    @torch.no_grad()
    def spread(self) -> None:
        """See `data.Gradients.spread`."""
        for names in self._rounds():
            self._give_back(names)
        for piece in self.pieces.values():
            piece.tensor.grad = None
        self._parts.spread()

    def weights(self) -> Mapping[str, Piece]:
        """See `data.Gradients.weights`."""
        return self._parts.weights()

    @torch.no_grad()
    def refresh(self, write: Write) -> None:
        """See `data.Gradients.refresh`."""
        self._parts.refresh(write)
        for names in self._rounds():
            for name, whole in self._bring(names, self._held()).items():
                write(self.pieces[name].tensor, whole)

    def _held(self) -> dict[str, Tensor]:
        return {name: piece.tensor.detach() for name, piece in self._parts.pieces.items()}

    def _rounds(self) -> Iterator[list[str]]:
        """Names in turn, as many at once as are a few messages' worth for each rank: what travels needs memory twice."""
        names: list[str] = []
        size = 0
        for name, cut in self._cuts.items():
            names, size = [*names, name], size + cut.shape.numel()
            if size >= BUCKET * self._axis.size:
                yield names
                names, size = [], 0
        if names:
            yield names

    def _bring(self, names: Sequence[str], held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The whole tensors of this rank, from what all have of them."""
        by_owner = self._by_owner(names)
        mine = by_owner[self._axis.rank]
        given = [[held[name].reshape(-1) for name in owned] for owned in by_owner]
        lengths = [[self._span(name, giver)[1] for name in mine] for giver in range(self._axis.size)]
        came = self._traded(given, lengths, held[names[0]])
        return {name: self._joined(name, [parts[number] for parts in came]) for number, name in enumerate(mine)}

    def _give_back(self, names: Sequence[str]) -> None:
        """What the owners have, to those who have the parts."""
        by_owner = self._by_owner(names)
        given = [[self._part(name, rank) for name in by_owner[self._axis.rank]] for rank in range(self._axis.size)]
        lengths = [[self._parts.pieces[name].tensor.numel() for name in owned] for owned in by_owner]
        came = self._traded(given, lengths, self._parts.pieces[names[0]].tensor)
        for owned, parts in zip(by_owner, came, strict=True):
            for name, part in zip(owned, parts, strict=True):
                own = self._parts.pieces[name].tensor
                own.copy_(part.view(own.shape))

    def _by_owner(self, names: Sequence[str]) -> list[list[str]]:
        return [[name for name in names if self._owners[name] == rank] for rank in range(self._axis.size)]

    def _traded(self, given: Sequence[Sequence[Tensor]], lengths: Sequence[Sequence[int]], like: Tensor) -> list[Sequence[Tensor]]:
        """What each rank gives this one, of these lengths, for what this one gives each."""
        out = torch.cat([like.new_empty(0), *(x for parts in given for x in parts)])
        come, go = list(map(sum, lengths)), [sum(x.numel() for x in parts) for parts in given]
        into = out.new_empty(sum(come))
        dist.all_to_all_single(into, out, come, go, group=self._axis.group)
        return [torch.split(x, list(each)) for x, each in zip(torch.split(into, come), lengths, strict=True)]

    def _span(self, name: str, rank: int) -> tuple[int, int]:
        """Of a rank's part, where the rows begin that it has, and of how many elements they are."""
        rows, number = divmod(rank, self._num_parts)
        shape = self._cuts[name].shape_of(number, self._num_parts)
        assert shape is not None
        most, width = -(-shape[0] // (self._axis.size // self._num_parts)), shape[1:].numel()
        first = min(rows * most, shape[0])
        return first * width, (min(first + most, shape[0]) - first) * width

    def _joined(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        cut, num = self._cuts[name], self._num_parts
        whole = parts[0].new_empty(cut.shape)
        for number in range(num):
            boxes = cut.boxes(number, num)
            part = torch.cat(list(parts[number::num])).view(-1, *whole[boxes[0]].shape[1:])
            for box, rows in zip(boxes, torch.split(part, [along.stop - along.start for along, *_ in boxes]), strict=True):
                whole[box] = rows
        return whole

    def _part(self, name: str, rank: int) -> Tensor:
        whole = self.pieces[name].tensor.detach()
        part = torch.cat([whole[box] for box in self._cuts[name].boxes(rank % self._num_parts, self._num_parts)])
        start, length = self._span(name, rank)
        return part.reshape(-1)[start : start + length]


def _owners(sizes: Mapping[str, int], num_ranks: int) -> dict[str, int]:
    """Of each tensor a rank: the largest first, to whom has least (Graham 1969)."""
    loads, found = [0] * num_ranks, {}
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        found[name] = loads.index(min(loads))
        loads[found[name]] += sizes[name]
    return found

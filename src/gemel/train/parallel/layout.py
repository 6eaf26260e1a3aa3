"""What each rank holds of every parameter, and how wholes are cut into that and put together from it.

A parameter is cut at most twice: by its `Cut` among the tensor ranks, and what is left of it, flat, in ranges among the ranks that share
optimizer states or parameters. A checkpoint knows only whole tensors by name. So it fits every mesh, and holds the same bytes whatever mesh
it comes from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gemel.model.shard import Cut
from gemel.train.optim.dynamic import BLOCK
from gemel.train.parallel.mesh import Axis, Mesh


@dataclass(frozen=True)
class Piece:
    """What a rank moves of a parameter: the elements from `start` on of its part, in memory that the two share; or, as an owner (see
    `matrices`), all of it, whatever its part is.

    `speaks` is true on one of the ranks that have these elements: the one whose norm is counted and whose numbers are saved.
    """

    tensor: Tensor
    start: int
    speaks: bool


@dataclass(frozen=True)
class Held:
    """A tensor `name` that belongs to a parameter: of which tensor rank, and which elements of it, from `start` on."""

    name: str
    parameter: str
    part: int
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def gather(held: Iterable[tuple[Held, Tensor]], cuts: Mapping[str, Cut], mesh: Mesh) -> dict[str, Tensor]:
    """On rank 0 the whole tensors by name, on the CPU; elsewhere nothing. All ranks must call it."""
    import torch.distributed as dist

    mine = list(held)
    if not mesh.first:
        dist.gather_object([about for about, _ in mine], dst=0)
        for _, tensor in mine:
            if tensor.numel():
                dist.send(_bytes(tensor), dst=0)
        return {}
    messages: list[list[Held]] = [[] for _ in range(mesh.num_ranks)]
    dist.gather_object([about for about, _ in mine], messages, dst=0)
    found = [(about, tensor.detach().cpu()) for about, tensor in mine]
    for rank, abouts in enumerate(messages[1:], 1):
        found += [(about, _receive(about, rank)) for about in abouts]
    return dict(_joined(found, cuts, mesh.tensor))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)


def _receive(about: Held, rank: int) -> Tensor:
    import torch.distributed as dist

    tensor = torch.empty(about.shape, dtype=about.dtype)
    if tensor.numel():
        dist.recv(tensor.view(-1).view(torch.uint8), src=rank)
    return tensor


def _joined(found: Sequence[tuple[Held, Tensor]], cuts: Mapping[str, Cut], axis: Axis) -> Iterator[tuple[str, Tensor]]:
    by_name: dict[str, dict[int, list[tuple[Held, Tensor]]]] = {}
    for about, tensor in found:
        by_name.setdefault(about.name, {}).setdefault(about.part, []).append((about, tensor))
    for name, parts in by_name.items():
        cut = cuts[next(iter(parts.values()))[0][0].parameter]
        flat = {part: _in_row([tensor for _, tensor in sorted(pieces, key=lambda x: x[0].start)]) for part, pieces in parts.items()}
        shapes = {part: cut.shape_of(part, axis.size) for part in flat}
        if any(shape is None or x.numel() != shape.numel() for shape, x in zip(shapes.values(), flat.values(), strict=True)):
            yield name, flat[min(flat)]  # a count, or a tensor of another shape than its parameter, of which there is one
        else:
            yield name, cut.join([flat[part].view(shapes[part]) for part in sorted(flat)])  # type: ignore[arg-type]


def _in_row(pieces: Sequence[Tensor]) -> Tensor:
    if len(pieces) == 1 or pieces[0].dim() == 0:
        return pieces[0]
    return torch.cat([piece.view(-1) for piece in pieces])


def share(whole: Tensor, like: Tensor, cut: Cut, start: int, axis: Axis) -> Tensor:
    """What a rank keeps of a whole tensor of a checkpoint: `like` has its shape, and `start` is where its piece begins."""
    if whole.shape == like.shape:
        return whole
    part = cut.part(whole, axis.rank, axis.size) if whole.numel() == cut.shape.numel() else whole
    assert part is not None
    if part.shape == like.shape:
        return part
    begin = start if whole.numel() == cut.shape.numel() else start // BLOCK
    return part.reshape(-1)[begin : begin + like.numel()].view(like.shape)

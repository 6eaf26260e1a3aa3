"""Tensors in pieces: boxes of a whole, which may lie in memory or in files, and are put together to whatever boxes somebody needs.

A rank knows of a tensor which elements it has; a file of a checkpoint, which elements were written to it; a Hugging Face directory, that
queries, keys and values are three tensors where we have one. All three are `Pieces`, and to load a checkpoint on another mesh than the one
that wrote it is `read`. What is not asked for is not read.

    with several ranks:   each writes its pieces to a file of its own (`write`), and finds what it needs in those of all (`find`)
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol, Self

import safetensors
import torch
from torch import Tensor

from gemel.config.errors import CheckpointError
from gemel.model.shard import Box
from gemel.model.tensor_file import CODES, Entry, TensorFile, in_order

_DTYPES = {code: dtype for dtype, code in CODES.items()}
_SHAPES = "shapes"


class Source(Protocol):
    """What gives parts of a box: a tensor, or what reads from a file."""

    def __getitem__(self, part: Box, /) -> Tensor: ...


@dataclass(frozen=True)
class Pieces:
    """A tensor of `shape`, or what is there of it: boxes that do not overlap, with what gives them."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    found: tuple[tuple[Box, Source], ...]

    @classmethod
    def of(cls, tensor: Tensor, shape: Sequence[int] | None = None, boxes: Iterable[Box] | None = None) -> Self:
        """A whole tensor; or, of one with a shape, boxes whose elements lie one behind the other in `tensor`."""
        if shape is None or boxes is None:
            return cls(tuple(tensor.shape), tensor.dtype, ((everything(tensor.shape), tensor),))
        boxes = list(boxes)
        flat = torch.split(tensor.reshape(-1), [size(box) for box in boxes])
        return cls(tuple(shape), tensor.dtype, tuple((box, x.view(extent(box))) for box, x in zip(boxes, flat, strict=True)))

    def copy(self) -> Self:
        """The same in memory of its own, on the CPU. Only of what lies in memory."""
        copied = []
        for box, tensor in self.found:
            assert isinstance(tensor, Tensor)
            copied.append((box, tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)))
        return replace(self, found=tuple(copied))

    @property
    def num_elements(self) -> int:
        """That are there."""
        return sum(size(box) for box, _ in self.found)

    def whole(self) -> Tensor:
        """All of it. May be the memory that it comes from: copy what is kept."""
        return self.read([everything(self.shape)]).view(self.shape)

    def read(self, boxes: Sequence[Box]) -> Tensor:
        """The elements of some boxes, one behind the other, flat. May be the memory that they come from: copy what is kept.

        Raises `CheckpointError` if some of them are not there.
        """
        if len(boxes) == 1 and (around := [(box, source) for box, source in self.found if _contains(box, boxes[0])]):
            ((box, source),) = around
            return source[_within(boxes[0], box)].reshape(-1)
        out = torch.empty(sum(map(size, boxes)), dtype=self.dtype)
        missing, place = out.numel(), 0
        for wanted in boxes:
            into, place = out[place : place + size(wanted)].view(extent(wanted)), place + size(wanted)
            for box, source in self.found:
                if (both := _common(box, wanted)) is not None:
                    into[_within(both, wanted)] = source[_within(both, box)]
                    missing -= size(both)
        if missing:
            raise CheckpointError(f"{missing} elements of a tensor of {list(self.shape)} are not there")
        return out


class Share(dict[str, Pieces]):
    """Of tensors by name, what somebody has."""

    def copy(self) -> Share:
        """In memory of its own, see `Pieces.copy`."""
        return Share({name: pieces.copy() for name, pieces in self.items()})

    def join(self, other: Share) -> Share:
        """What two have together."""
        both = {name: replace(self[name], found=self[name].found + other[name].found) for name in self.keys() & other.keys()}
        return Share({**self, **other, **both})

    def check(self) -> None:
        """Raises `CheckpointError` if some element of a tensor is not there, or there twice."""
        for name, pieces in self.items():
            if pieces.num_elements != math.prod(pieces.shape):
                raise CheckpointError(f"{name} has {math.prod(pieces.shape)} elements, and the ranks have {pieces.num_elements} of it")


# --- boxes --------------------------------------------------------------------------------------------------------------------------------


def everything(shape: Sequence[int]) -> Box:
    """The box of a whole."""
    return tuple(slice(0, length) for length in shape)


def extent(box: Box) -> tuple[int, ...]:
    """Its shape."""
    return tuple(along.stop - along.start for along in box)


def size(box: Box) -> int:
    """Its elements."""
    return math.prod(extent(box))


def _contains(outer: Box, inner: Box) -> bool:
    """Whether all of one lies in the other."""
    return all(a.start <= b.start and b.stop <= a.stop for a, b in zip(outer, inner, strict=True))


def _common(left: Box, right: Box) -> Box | None:
    """What two boxes of one tensor have both; None if nothing."""
    both = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(left, right, strict=True))
    return both if all(along.start < along.stop for along in both) else None


def _within(inner: Box, outer: Box) -> Box:
    """A box as the outer one, in which it lies, counts."""
    return tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(inner, outer, strict=True))


def run(boxes: Iterable[Box], start: int, stop: int) -> Iterator[Box]:
    """Of the elements of some boxes, one behind the other, those from `start` to before `stop`, again as boxes in that order.

    A run through a matrix is at most three boxes: the rest of a row, whole rows, and the beginning of one.
    """
    begin = 0
    for box in boxes:
        first, last = max(start - begin, 0), min(stop - begin, size(box))
        begin += size(box)
        if first < last:
            yield from _run(box, first, last)


def _run(box: Box, start: int, stop: int) -> Iterator[Box]:
    if not box:
        yield box
        return
    rows, rest = box[0], box[1:]
    width = size(rest)
    first, last = -(-start // width), stop // width
    if first > last:  # within one row
        row = slice(rows.start + last, rows.start + last + 1)
        yield from ((row, *inner) for inner in _run(rest, start - last * width, stop - last * width))
        return
    if start < first * width:
        row = slice(rows.start + first - 1, rows.start + first)
        yield from ((row, *inner) for inner in _run(rest, start - (first - 1) * width, width))
    if first < last:
        yield (slice(rows.start + first, rows.start + last), *rest)
    if last * width < stop:
        row = slice(rows.start + last, rows.start + last + 1)
        yield from ((row, *inner) for inner in _run(rest, 0, stop - last * width))


# --- files --------------------------------------------------------------------------------------------------------------------------------


def write(path: Path, share: Share) -> None:
    """A safetensors file of what is there: a tensor for each box, named `NAME@ROW,COLUMN` after where it begins, one written at a time."""
    boxes = {_key(name, box): source for name, pieces in share.items() for box, source in pieces.found}
    tensors = {key: source for key, source in boxes.items() if isinstance(source, Tensor)}
    assert len(tensors) == sum(len(pieces.found) for pieces in share.values()), "what is written lies in memory, each box once"
    shapes = json.dumps({name: pieces.shape for name, pieces in share.items()})
    entries = in_order(Entry.of(key, tensor) for key, tensor in tensors.items())
    with TensorFile(path, entries, {_SHAPES: shapes}) as file:
        for entry in entries:
            file.put(entry.name, tensors[entry.name])


def _key(name: str, box: Box) -> str:
    return f"{name}@{','.join(str(along.start) for along in box)}"


def index(folder: Path, files: Iterable[str]) -> dict[str, Any]:
    """What files of `write` have together, for `find`: plain numbers and texts. Reads nothing but where things are."""
    found: dict[str, Any] = {}
    for file in files:
        with safetensors.safe_open(folder / file, "pt") as opened:
            shapes = json.loads(opened.metadata()[_SHAPES])
            for key in opened.keys():  # noqa: SIM118
                name, _, starts = key.rpartition("@")
                header = opened.get_slice(key)
                about = found.setdefault(name, {"shape": shapes[name], "dtype": header.get_dtype(), "boxes": []})
                about["boxes"].append([file, [int(start) for start in starts.split(",") if start], header.get_shape()])
    return found


def find(folder: Path, indexed: Mapping[str, Any]) -> Share:
    """What an index names, read where and when it is needed."""
    opened = cache(lambda file: safetensors.safe_open(folder / file, "pt"))
    share = Share()
    for name, about in indexed.items():
        boxes = []
        for file, starts, lengths in about["boxes"]:
            box = tuple(slice(start, start + length) for start, length in zip(starts, lengths, strict=True))
            boxes.append((box, _Stored(opened, file, _key(name, box))))
        share[name] = Pieces(tuple(about["shape"]), _DTYPES[about["dtype"]], tuple(boxes))
    return share


@dataclass(frozen=True)
class _Stored:
    """A tensor of a file."""

    opened: Any  # by the name of a file, safetensors' handle of it
    file: str
    key: str

    def __getitem__(self, part: Box, /) -> Tensor:
        opened = self.opened(self.file)
        tensor: Tensor = opened.get_slice(self.key)[part] if part else opened.get_tensor(self.key)
        return tensor

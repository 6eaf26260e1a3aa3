"""How a model is cut for tensor parallel: a table beside the model, and what each entry means for a tensor.

    column      outputs are divided: each part computes some heads, or some of the feed-forward's width (of every fused section its share)
    row         inputs are divided: each part takes what the columns before it gave, and the parts' results are summed. The bias is added
                once, so it stays with part 0
    vocabulary  rows are divided as evenly as they can be, whatever their number
    whole       every part has all of it

A column product followed by a row product needs one exchange for both (Shoeybi et al. 2019, arXiv 1909.08053). Nothing here communicates:
this is what lies where, for whoever cuts a model, and for whoever puts the parts together again.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import Literal

import torch

from gemel.config.errors import ConfigError
from gemel.config.model import ModelConfig
from gemel.model.leaves.linear import Leaf
from gemel.model.model import Model

Box = tuple[slice, ...]  # of a tensor: from where to where along each of its axes
Style = Literal["column", "row", "vocabulary", "whole"]

TABLE: dict[str, Style] = {
    "embed": "vocabulary",
    "layers.*.attn.qkv": "column",
    "layers.*.attn.out": "row",
    "layers.*.mlp.gate_up": "column",
    "layers.*.mlp.up": "column",
    "layers.*.mlp.down": "row",
    "head": "vocabulary",
}


def style_of(module: str) -> Style:
    """Of the module with that name."""
    return next((style for pattern, style in TABLE.items() if fnmatchcase(module, pattern)), "whole")


@dataclass(frozen=True)
class Cut:
    """How one parameter of `shape` is divided. `sections` are the heights of matrices that lie fused in it."""

    shape: torch.Size
    style: Style
    sections: tuple[int, ...]

    def boxes(self, rank: int, size: int) -> tuple[Box, ...]:
        """What part `rank` of `size` has: boxes of the whole that lie below each other in the part. None of them if nothing."""
        everything = tuple(slice(0, length) for length in self.shape)
        if self.style == "whole" or size == 1:
            return (everything,)
        if self.style == "vocabulary":
            return ((slice(*rows_of(self.shape[0], rank, size)), *everything[1:]),)
        if self.style == "column":
            starts = (end - height + height // size * rank for height, end in zip(self.sections, accumulate(self.sections), strict=True))
            rows = (slice(start, start + height // size) for start, height in zip(starts, self.sections, strict=True))
            return tuple((along, *everything[1:]) for along in rows)
        if len(self.shape) == 1:
            return (everything,) if rank == 0 else ()
        width = self.shape[1] // size
        return ((everything[0], slice(width * rank, width * (rank + 1))),)

    def shape_of(self, rank: int, size: int) -> torch.Size | None:
        """Of a part."""
        boxes = self.boxes(rank, size)
        rows = sum(box[0].stop - box[0].start for box in boxes)
        return torch.Size((rows, *(along.stop - along.start for along in boxes[0][1:]))) if boxes else None


def cuts(model: Model) -> dict[str, Cut]:
    """Of every parameter of a whole model."""
    found = {}
    for name, parameter in model.named_parameters():
        module = name.rpartition(".")[0]
        owner = model.get_submodule(module)
        sections = owner.sections if isinstance(owner, Leaf) else (parameter.shape[0],)
        found[name] = Cut(parameter.shape, style_of(module), sections)
    return found


def rows_of(num_rows: int, rank: int, size: int) -> tuple[int, int]:
    """The rows of a vocabulary that a part has: the first parts have one more where they do not divide."""
    least, more = divmod(num_rows, size)
    start = rank * least + min(rank, more)
    return start, start + least + (rank < more)


def check(config: ModelConfig, size: int) -> None:
    """Refuse a number of parts that would cut through a head or through a column."""
    for what, width in (
        ("key/value heads", config.num_kv_heads),
        ("query heads", config.num_heads),
        ("columns in its feed-forward", config.ffn_width),
    ):
        if width % size:
            fits = [str(n) for n in range(1, size) if all(x % n == 0 for x in (config.num_kv_heads, config.num_heads, config.ffn_width))]
            raise ConfigError(
                f"parallel.tensor = {size}, but the model has {width} {what}, which do not divide among so many ranks; sizes that do: "
                f"{', '.join(fits)}. More ranks can go to parallel.replicate"
            )

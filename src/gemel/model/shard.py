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

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor

from gemel.config.errors import ConfigError
from gemel.config.model import ModelConfig
from gemel.model.leaves.linear import Leaf
from gemel.model.model import Model

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

    def part(self, whole: Tensor, rank: int, size: int) -> Tensor | None:
        """What part `rank` of `size` has of a tensor of this shape; None if nothing."""
        if self.style == "whole" or size == 1:
            return whole
        if self.style == "row":
            if whole.dim() == 1:
                return whole if rank == 0 else None
            return whole.chunk(size, 1)[rank]
        if self.style == "vocabulary":
            start, stop = rows_of(len(whole), rank, size)
            return whole[start:stop]
        return torch.cat([section.chunk(size)[rank] for section in torch.split(whole, list(self.sections))])

    def shape_of(self, rank: int, size: int) -> torch.Size | None:
        """Of a part."""
        part = self.part(torch.empty(self.shape, device="meta"), rank, size)
        return None if part is None else part.shape

    def join(self, parts: Sequence[Tensor | None]) -> Tensor:
        """The parts of all ranks, in their order, to the whole."""
        found = [part for part in parts if part is not None]
        if self.style == "whole" or len(found) == 1:
            return found[0]
        if self.style == "row":
            return torch.cat(found, 1)
        if self.style == "vocabulary":
            return torch.cat(found)
        by_part = [torch.split(part, [height // len(found) for height in self.sections]) for part in found]
        return torch.cat([piece for section in zip(*by_part, strict=True) for piece in section])


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

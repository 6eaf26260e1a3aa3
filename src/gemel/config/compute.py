"""How a step is computed: in which numbers, what is kept for the backward pass, what is compiled or tiled, and where things live.

Only precision decides what comes out. All else trades memory for time, and a run may go on with other choices.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from gemel.config.base import Config


class FP32(Config):
    """Everything in fp32."""

    kind: Literal["fp32"] = "fp32"


class BF16(Config):
    """Products in bf16, sums over them, norms and the loss in fp32."""

    kind: Literal["bf16"]


class FP16(Config):
    """As bf16 with fp16, whose range is small: the loss is scaled so that gradients stay within it (Micikevicius et al. 2018,
    arXiv 1710.03740).

    initial_scale   of the loss; halved whenever a gradient overflows, whose step is left out
    growth_steps    doubled after so many steps without an overflow
    """

    kind: Literal["fp16"]
    initial_scale: PositiveFloat = 2.0**16
    growth_steps: PositiveInt = 2000


class FP8(Config):
    """As bf16, with products of the blocks in fp8, forwards and backwards, which needs the package torchao and a GPU that has such products
    (Micikevicius et al. 2022, arXiv 2209.05433). Worth it for large matrices, and only together with `compile`.

    scaling  one scale for a whole tensor, or one for each of its rows, which loses less and costs more
    """

    kind: Literal["fp8"]
    scaling: Literal["tensorwise", "rowwise"] = "tensorwise"


Precision = Annotated[FP32 | BF16 | FP16 | FP8, Field(discriminator="kind")]


class KeepActivations(Config):
    """All activations are kept for the backward pass."""

    kind: Literal["none"] = "none"


class RecomputeBlocks(Config):
    """Only the input of every `blocks` blocks is kept, the rest is computed again (Chen et al. 2016, arXiv 1604.06174).

    blocks  1 recomputes each block on its own; more keep fewer inputs, and hold more at once while going back; "sqrt" takes the square
            root of their number, where both are least
    """

    kind: Literal["recompute"]
    blocks: PositiveInt | Literal["sqrt"] = 1

    def size(self, num_blocks: int) -> int:
        """Of each group, but perhaps the last."""
        return round(math.sqrt(num_blocks)) if self.blocks == "sqrt" else min(self.blocks, num_blocks)


class SelectiveRecompute(Config):
    """Results of norms and of what lies between the two products of a feed-forward are computed again, which is quick; all else is kept.

    That goes for RMSNorm and SwiGLU where they are native or Triton's, and for GELU.
    """

    kind: Literal["selective"]


Activations = Annotated[KeepActivations | RecomputeBlocks | SelectiveRecompute, Field(discriminator="kind")]


Heap = Literal["keep", "return"]


class NoCompile(Config):
    """The model runs as it is written."""

    kind: Literal["none"] = "none"


class CompileBlocks(Config):
    """Blocks are compiled by torch (Ansel et al. 2024), attention apart: about a minute on a CPU, which needs a C++ compiler, for the first
    run of its kind on a machine, seconds after that, for what was compiled is kept in the cache folder. Sums may be in another order.
    """

    kind: Literal["blocks"]


Compile = Annotated[NoCompile | CompileBlocks, Field(discriminator="kind")]


class Untiled(Config):
    """Products as they are."""

    kind: Literal["none"] = "none"


class TileOutputs(Config):
    """Large products are done in parts of their outputs, so that what is made of a weight besides itself, such as its copy in bf16, exists
    for one part at a time (memory-centric tiling, Rajbhandari et al. 2021, arXiv 2104.07857).

    match  shell pattern of the names of matrices
    tiles  parts of each
    """

    kind: Literal["outputs"]
    match: Annotated[str, Field(min_length=1)] = "layers.*"
    tiles: Annotated[int, Field(ge=2)] = 4


class TileTokens(Config):
    """Feed-forwards take so many tokens at a time, and their inner activations, the widest of a block, are computed again for the backward
    pass: they are there for one tile at a time (Bekman et al. 2025, arXiv 2506.13996).
    """

    kind: Literal["tokens"]
    tokens: PositiveInt = 1024


Tiling = Annotated[Untiled | TileOutputs | TileTokens, Field(discriminator="kind")]


class Resident(Config):
    """Where it is used: in the device's memory."""

    kind: Literal["none"] = "none"


class ToMemory(Config):
    """In the CPU's memory, for devices that have less of their own."""

    kind: Literal["cpu"]


class ToDisk(Config):
    """In files, which should lie on a fast disk. They need no care: a run that was killed leaves none behind.

    folder  of these files; None takes work/offload in the run's folder
    """

    kind: Literal["disk"]
    folder: Path | None = None


Where = Annotated[Resident | ToMemory | ToDisk, Field(discriminator="kind")]


class OffloadConfig(Config):
    """What lives elsewhere and comes when it is needed, the next while one is worked on. No bit of the result depends on it.

    optimizer   what the optimizer keeps
    parameters  those of the blocks
    """

    optimizer: Where = Resident()
    parameters: Where = Resident()

    @property
    def to_disk(self) -> bool:
        """Whether anything lives in files."""
        return isinstance(self.optimizer, ToDisk) or isinstance(self.parameters, ToDisk)

"""What a recipe changes about how a model computes, in the one order that works. The model's definition knows of none of it.

First leaves are swapped, then what is inside of blocks is changed, and last their forwards are wrapped, from the inside out: what is
recomputed includes fetching parameters, and that surrounds compiled code, which can do neither.
"""

from __future__ import annotations

import torch

from gemel.config.compute import FP8
from gemel.config.train import TrainRecipe
from gemel.model.model import Model
from gemel.train import compile as compiling
from gemel.train import dropout, offload, precision, recompute, tiling
from gemel.train.offload import Homes
from gemel.train.parallel.mesh import Mesh


def apply(recipe: TrainRecipe, model: Model, device: torch.device, homes: Homes, mesh: Mesh) -> None:
    """Change a model in place, on the device where it will be trained. Its parameters stay, under their names.

    Layers that are divided among ranks are recomputed by whoever has them, so a pipeline sees to that itself.
    """
    if isinstance(recipe.precision, FP8):
        precision.in_fp8(recipe.precision, model, device)
    tiling.apply(recipe.tiling, model)
    dropout.apply(recipe.dropout, model)
    compiling.apply(recipe.compile, model, device)
    offload.apply(homes, model)
    if mesh.pipeline.size == 1:
        recompute.apply(recipe.activations, list(model.layers))

"""Dropout (Srivastava et al. 2014, JMLR 15): numbers that are zero at random, so that none can be relied upon.

Hooks do it, where the model's parts meet. They act where gradients are wanted, so validation needs no switch; random numbers are torch's,
which a checkpoint holds, and blocks that are recomputed draw the same ones again.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemel.config.train import DropoutConfig
from gemel.model.model import Model


def apply(config: DropoutConfig, model: Model) -> None:
    """Hook into a model what the configuration asks for."""
    if config.embedding:
        model.layers[0].register_forward_pre_hook(partial(_before, config.embedding))
    if config.residual:
        for block in model.layers:
            for part in ("attn", "mlp"):
                block.get_submodule(part).register_forward_hook(partial(_behind, config.residual))


def _before(share: float, _block: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    x_TD, *others = arguments
    return _drop(x_TD, share), *others


def _behind(share: float, _part: Any, _arguments: Any, out_TD: Tensor) -> Tensor:
    return _drop(out_TD, share)


def _drop(x_TD: Tensor, share: float) -> Tensor:
    return F.dropout(x_TD, share) if torch.is_grad_enabled() else x_TD

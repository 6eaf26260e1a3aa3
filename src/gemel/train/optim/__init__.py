"""Optimizers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from gemel.config.optim import AdamW, OptimConfig


class Optimizer:
    """AdamW alone, for now."""

    def __init__(self, config: OptimConfig, named: Iterable[tuple[str, nn.Parameter]]):
        assert isinstance(config.method, AdamW)
        self._named = list(named)
        decay = [p for _, p in self._named if p.dim() > 1]
        rest = [p for _, p in self._named if p.dim() <= 1]
        groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        self._inner = torch.optim.AdamW(groups, lr=0.0, betas=config.method.betas, eps=config.method.eps)

    def step(self, lr: float) -> None:
        """Move the weights."""
        for group in self._inner.param_groups:
            group["lr"] = lr
        self._inner.step()

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors."""
        return {f"{name}.{key}": value for name, p in self._named for key, value in self._inner.state.get(p, {}).items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The way back."""
        for name, p in self._named:
            found = {key: state[f"{name}.{key}"].clone() for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{key}" in state}
            if found:
                self._inner.state[p] = found


def build(config: OptimConfig, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> Optimizer:
    """The optimizer that the configuration asks for."""
    return Optimizer(config, named_parameters)

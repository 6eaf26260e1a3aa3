"""A small problem for every optimizer: a model's parameters by name, and gradients that are a function of the weights and the step."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gemel.config.optim import SGD, Adafactor, AdamW, Lion, Method, Muon, OptimConfig, Precision, WeightStorage
from gemel.train.offload import Homes
from gemel.train.optim import Optimizer, build

METHODS: dict[str, Method] = {
    "adamw": AdamW(),
    "adafactor": Adafactor(),
    "adafactor_momentum": Adafactor(beta1=0.9),
    "lion": Lion(),
    "sgd": SGD(),
    "sgd_plain": SGD(momentum=0.0),
    "sgd_nesterov": SGD(nesterov=True),
    "muon": Muon(),
}
SHAPES = {  # a matrix of several blocks of 256 that does not end with one, and tensors below the least size for 8 bits
    "embed.weight": (80, 65),
    "layers.0.mlp.up.weight": (96, 65),
    "layers.0.mlp.up.bias": (96,),
    "layers.0.mlp_norm.weight": (65,),
}


def combinations() -> Iterator[tuple[str, Precision, WeightStorage]]:
    """Every method with every way to store its state and the weights."""
    states: tuple[Precision, ...] = ("fp32", "bf16", "int8")
    storages: tuple[WeightStorage, ...] = ("fp32", "master", "stochastic")
    for name, method in METHODS.items():
        for state in states if method.has_state else states[:1]:
            for weights in storages:
                yield name, state, weights


class Problem:
    """Weights on their way to `targets`, with gradients that are noisy, of different sizes in different rows, and reproducible."""

    def __init__(self, config: OptimConfig, seed: int = 0, sections: dict[str, list[int]] | None = None, homes: Homes | None = None):
        generator = torch.Generator().manual_seed(seed)
        dtype = torch.float32 if config.weights == "fp32" else torch.bfloat16
        self.parameters = {name: torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for name, s in SHAPES.items()}
        self.targets = {name: torch.randn(s, generator=generator) for name, s in SHAPES.items()}
        self.optimizer: Optimizer = build(config, self.parameters.items(), sections, homes=homes)

    def set_grads(self, step: int) -> None:
        generator = torch.Generator().manual_seed(1000 + step)
        for name, parameter in self.parameters.items():
            sizes = torch.logspace(-3, 0, parameter.shape[0]).view(-1, *[1] * (parameter.dim() - 1))
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.grad = (sizes * (parameter.detach().float() - self.targets[name] + noise)).to(parameter.dtype)

    def run(self, first: int, last: int, lr: float = 1e-2) -> None:
        for step in range(first, last):
            self.set_grads(step)
            self.optimizer.step(lr / (1 + step))

    def weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}


def config(method: str = "adamw", **changes: object) -> OptimConfig:
    """That method with decay and L1 on, so that they are part of whatever is compared."""
    return OptimConfig.parse({"method": METHODS[method], "weight_decay": 0.1, "l1": 1e-3, **changes})

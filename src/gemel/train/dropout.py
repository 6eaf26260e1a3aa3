"""Dropout (Srivastava et al. 2014, JMLR 15): numbers that are zero at random, so that none can be relied upon.

Hooks do it, where the model's parts meet. They act where gradients are wanted, so validation needs no switch.

What is dropped of a token is a function of the seed, the step, which token of the step it is, and where in the model: two words are hashed
from these (the end of splitmix64, Steele et al. 2014), and mixed with one of a table for each of its numbers, as in `optim.noise`. So no
generator has a state that would have to be saved, what is recomputed is dropped again, and how a step is cut into micro-batches, or a mesh
cuts tokens among ranks, makes no difference: wherever a token is, it loses the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gemel.config.train import DropoutConfig
from gemel.model.attend import Attend
from gemel.model.attention import Rotation
from gemel.model.model import Model
from gemel.train.optim import noise

Forward = Callable[[Tensor, Rotation | None, Attend], Tensor]
Words = tuple[Tensor, Tensor]  # int32 [T, 1] each, the second one odd
_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


class Placed:
    """An `Attend` that knows, too, which tokens these are of a step: so that every block learns it, whenever it is run."""

    def __init__(self, attend: Attend, places_T: Tensor, seed: int, step: int):
        self._attend, self._places_T, self._seed, self._step = attend, places_T, seed, step

    def __call__(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        """See `Attend`."""
        return self._attend(layer, q_TNH, k_TKH, v_TKH)

    def words(self, site: str, layer: int) -> Words:
        """Random ones of every token, for a place in the model."""
        key = noise.key("dropout", self._seed, self._step, site, layer)
        hashed_T = _hashed(self._places_T * _GOLDEN + (key - ((key >> 63) << 64)))
        return (hashed_T >> 32).to(torch.int32)[:, None], (hashed_T | 1).to(torch.int32)[:, None]


class Dropout:
    """What a configuration asks for, hooked into a model. `follow` must come when all that is inside of blocks is in its place."""

    def __init__(self, config: DropoutConfig, model: Model):
        self._config = config
        self._table_D = torch.empty(0, dtype=torch.int32)
        self._words: dict[str, Words] = {}  # of the block that is run
        if config.embedding:
            model.layers[0].register_forward_pre_hook(self._before)
        if config.residual:
            for block in model.layers:
                for part in ("attn", "mlp"):
                    block.get_submodule(part).register_forward_hook(partial(self._behind, part))

    def follow(self, model: Model) -> None:
        """Let every block say what its tokens are before it is run, or run again. What is compiled need not see how."""
        if self._config.residual:
            for layer, block in enumerate(model.layers):
                block.forward = partial(self._through, layer, block.forward)

    def _through(self, layer: int, forward: Forward, x_TD: Tensor, rotation: Rotation | None, attend: Attend) -> Tensor:
        if torch.is_grad_enabled():
            self._begin(x_TD, attend, layer, ("attn", "mlp"))
        return forward(x_TD, rotation, attend)

    def _begin(self, x_TD: Tensor, attend: Any, layer: int, sites: tuple[str, ...]) -> None:
        assert isinstance(attend, Placed), "dropout has to know which tokens these are"
        self._words = {site: attend.words(site, layer) for site in sites}
        self._table_D = noise.table(x_TD.device)[: x_TD.shape[1]]

    def _before(self, _block: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x_TD, rotation, attend = arguments
        if torch.is_grad_enabled():
            self._begin(x_TD, attend, 0, ("embedding",))
        return self._drop(x_TD, self._config.embedding, "embedding"), rotation, attend

    def _behind(self, site: str, _part: nn.Module, _arguments: Any, out_TD: Tensor) -> Tensor:
        return self._drop(out_TD, self._config.residual, site)

    def _drop(self, x_TD: Tensor, share: float, site: str) -> Tensor:
        if not torch.is_grad_enabled():
            return x_TD
        first_T1, second_T1 = self._words[site]
        drawn_TD = self._table_D.bitwise_xor(first_T1).mul_(second_T1)
        border = min(round(share * 2**32), 2**32 - 1) - 2**31
        return (x_TD * (1 / (1 - share))).masked_fill_(drawn_TD < border, 0.0)


def _hashed(x: Tensor) -> Tensor:
    """64 bits of which each depends on all of those that came in."""
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """To the right, bringing in zeros."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)

"""One step of training: from its batches to moved weights.

The loss of a step is the sum over all its trained tokens, of all micro-batches and all ranks, divided by the sum of their weights. The
denominator is known before the first forward pass, because a step's batches come together; so every micro-batch divides by it, gradients
add up to those of the whole, and how a step is cut into micro-batches makes no difference. A mean of means would.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemel.config.train import TrainRecipe
from gemel.model.attend import PackedAttend
from gemel.model.build import LoadedModel
from gemel.train import optim, schedule
from gemel.train.batch import Batch
from gemel.train.loader import Step
from gemel.train.loss import head_cross_entropy
from gemel.train.precision import Numbers

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Report:
    """What became of a step. `loss` is the cross-entropy per trained token, without what is minimized beside it (`z`)."""

    step: int
    loss: float
    z: float
    norm: float
    lr: float
    num_tokens: int
    num_trained: float
    skipped: bool


class Trainer:
    """A model that learns: its optimizer, its numbers, and how many steps it has done."""

    def __init__(self, recipe: TrainRecipe, loaded: LoadedModel, device: torch.device):
        self._recipe, self.loaded, self._device = recipe, loaded, device
        self._model = loaded.model
        self._named = [(name, p) for name, p in self._model.named_parameters() if p.requires_grad]
        self._optimizer = optim.build(recipe.optim, self._named)
        self._numbers = Numbers(recipe.precision, device)
        self.step = 0
        self.num_skipped = 0

    def learn(self, work: Step) -> Report:
        """One step of the optimizer, left out if it would not be finite."""
        weight = sum(batch.weight for batch in work.batches)
        loss, z = self._gradients(work.batches, weight)
        norm = self._clip()
        lr = schedule.rate(self._recipe.optim, self.step, self._recipe.steps)
        finite = math.isfinite(loss) and math.isfinite(norm)
        self._numbers.observe(finite)
        if finite:
            self._optimizer.step(lr)
        else:
            self.num_skipped += 1
        for _, parameter in self._named:
            parameter.grad = None
        self.step += 1
        return Report(self.step, loss, z, norm, lr, work.num_tokens, weight, not finite)

    def _gradients(self, batches: Iterable[Batch], weight: float) -> tuple[float, float]:
        loss, z = (torch.zeros((), dtype=torch.float64, device=self._device) for _ in range(2))
        for batch in batches:
            batch_loss, batch_z = self._loss(batch)
            (batch_loss * (self._numbers.scale / weight)).backward()  # type: ignore[no-untyped-call]
            loss += batch_loss.detach()
            z += batch_z
        if self._numbers.scale != 1:
            for _, parameter in self._named:
                if parameter.grad is not None:
                    parameter.grad.div_(self._numbers.scale)
        return (loss - z).item() / weight, z.item() / weight

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """As sums over tokens."""
        batch = batch.to(self._device)
        with self._numbers.cast():
            hidden_TD = self._model(batch.tokens_T, batch.positions_T, PackedAttend(self._model.config, batch.starts))
            head = self._model.head.weight
            config = self._recipe.loss
            return head_cross_entropy(hidden_TD, head, batch.targets_T, batch.weights_T, config.z_loss, config.label_smoothing)

    def _clip(self) -> float:
        norm: float
        gradients = [parameter.grad for _, parameter in self._named if parameter.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(gradient.float()) for gradient in gradients])).item()
        factor = min(1.0, 1.0 / max(norm, 1e-12))
        if factor < 1:
            for gradient in gradients:
                gradient.mul_(factor)
        return norm

    def validate(self, batches: Iterable[Batch]) -> float:
        """The mean cross-entropy per trained token."""
        loss = weight = 0.0
        with torch.inference_mode():
            for batch in batches:
                batch_loss, batch_z = self._loss(batch)
                loss += (batch_loss - batch_z).item()
                weight += batch.weight
        return loss / weight

    def state_dict(self) -> Json:
        """All that the next step depends on, but for the weights."""
        return {
            "step": self.step,
            "num_skipped": self.num_skipped,
            "optimizer": self._optimizer.state_dict(),
            "numbers": self._numbers.state_dict(),
            "rng": {"cpu": torch.get_rng_state()},
        }

    def load_state_dict(self, state: Json) -> None:
        """The way back."""
        self.step, self.num_skipped = state["step"], state["num_skipped"]
        self._optimizer.load_state_dict(state["optimizer"])
        self._numbers.load_state_dict(state["numbers"])
        torch.set_rng_state(state["rng"]["cpu"])

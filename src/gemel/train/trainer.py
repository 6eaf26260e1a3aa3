"""One step of training: from its batches to moved weights.

The loss of a step is the sum over all its trained tokens, of all micro-batches and all ranks, divided by the sum of their weights. The
denominator is known before the first forward pass, because a step's batches come together; so every micro-batch divides by it, gradients
add up to those of the whole, and how a step is cut into micro-batches makes no difference. A mean of means would.

A step whose loss or gradients are not finite, or that the spike detector takes for an accident, does not reach the weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from gemel.config.train import TrainRecipe
from gemel.model.attend import PackedAttend
from gemel.model.build import LoadedModel
from gemel.train import optim, precision, rewrite, schedule, stability
from gemel.train.batch import Batch
from gemel.train.flops import Flops
from gemel.train.loader import Step
from gemel.train.loss import head_cross_entropy
from gemel.train.offload import Homes

Json = dict[str, Any]
Action = Literal["ok", "skip", "overflow", "rollback"]


@dataclass(frozen=True, slots=True)
class Report:
    """What became of a step.

    loss         cross-entropy per trained token, without what is minimized beside it
    z            what is
    norm         of all gradients, before they were clipped
    factor       the least that a gradient was multiplied with
    num_trained  the denominator of the loss
    flops        that the step needed
    action       what was done with it, and `reason` why, unless it was ok
    """

    step: int
    loss: float
    z: float
    norm: float
    factor: float
    lr: float
    num_tokens: int
    num_trained: float
    flops: float
    action: Action
    reason: str


class Trainer:
    """A model that learns, with its optimizer and its guards. `step` counts steps that were done, left out or not."""

    def __init__(self, recipe: TrainRecipe, loaded: LoadedModel, device: torch.device):
        self._recipe, self.loaded, self._device = recipe, loaded, device
        self._flops = Flops(loaded.model)
        self._homes = Homes.of(recipe.offload, device, recipe.out / "work" / "offload")
        self._model = self._homes.place(loaded.model, device)
        rewrite.apply(recipe, self._model, device, self._homes)
        self._named = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        sections = {f"{name}.weight": x.sections for name, x in self._model.named_modules() if hasattr(x, "sections")}
        self._optimizer = optim.build(recipe.optim, self._named.items(), sections, self._homes)
        if recipe.batch.micro_sequences < recipe.batch.sequences:
            precision.add_up_in_fp32(self._named.values())
        self.dtype = precision.parameter_dtype(recipe.optim)
        self._numbers = precision.Numbers(recipe.precision, self.dtype, device)
        self._clip = stability.ClipState()
        self._detector = stability.SpikeDetector(recipe.stability)
        self.step = 0

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._device

    def learn(self, work: Step) -> Report:
        """One step of the optimizer. A rollback is left to the caller, who has the checkpoints."""
        weight = sum(batch.weight for batch in work.batches)
        assert weight > 0, "nothing of this step is trained"
        loss, z = self._gradients(work.batches, weight)
        grads = {name: p.grad for name, p in self._named.items() if p.grad is not None}
        clipped = stability.clip(self._recipe.optim.clip, grads, self._clip)
        lr = schedule.rate(self._recipe.optim, self.step, self._recipe.steps)
        action, reason = self._judge(loss + z, clipped)
        if action == "ok":
            self._optimizer.step(lr)
        for parameter in self._named.values():
            parameter.grad = None
        self.step += 1
        flops = sum(map(self._flops.of, work.batches))
        return Report(self.step, loss, z, clipped.norm, clipped.factor, lr, work.num_tokens, weight, flops, action, reason)

    def _judge(self, loss: float, clipped: stability.Clipped) -> tuple[Action, str]:
        if self._numbers.overflowed(clipped.finite):
            return "overflow", f"gradients overflow fp16; the loss is scaled by {self._numbers.scale:g} from now on"
        verdict = self._detector.observe(self.step, loss, clipped.norm)
        named = f" ({', '.join(clipped.bad[:3])})" if clipped.bad else ""
        return verdict.action, verdict.reason + named

    def _gradients(self, batches: Iterable[Batch], weight: float) -> tuple[float, float]:
        """Backward through all micro-batches; the loss and the part of it that is not cross-entropy, per trained token."""
        loss, z = (torch.zeros((), dtype=torch.float64, device=self._device) for _ in range(2))
        scale = self._numbers.scale
        for batch in batches:
            batch_loss, batch_z = self._loss(batch, scale / weight, self._recipe.loss.label_smoothing)
            batch_loss.backward()  # type: ignore[no-untyped-call]
            loss += batch_loss.detach()
            z += batch_z
        if scale != 1:
            for parameter in self._named.values():
                if parameter.grad is not None:
                    parameter.grad.div_(scale)
        return (loss - z).item() / scale, z.item() / scale

    def _loss(self, batch: Batch, factor: float, label_smoothing: float) -> tuple[Tensor, Tensor]:
        """As sums over tokens, times `factor`: in the weights, it is there before anything is rounded, and costs nothing."""
        batch, z_loss = batch.to(self._device), self._recipe.loss.z_loss
        with self._numbers.cast():
            hidden_TD = self._model(batch.tokens_T, batch.positions_T, PackedAttend(self._model.config, batch.starts))
            weights_T = batch.weights_T * factor
            return head_cross_entropy(hidden_TD, self._model.head.weight, batch.targets_T, weights_T, z_loss, label_smoothing)

    def validate(self, batches: Iterable[Batch]) -> tuple[float, float]:
        """The sum of the cross-entropy over all tokens that would be trained, without label smoothing, and of their weights."""
        loss = weight = 0.0
        with torch.inference_mode():
            for batch in batches:
                batch_loss, batch_z = self._loss(batch, 1.0, 0.0)
                loss += (batch_loss - batch_z).item()
                weight += batch.weight
        return loss, weight

    def whole(self) -> LoadedModel:
        """The model to be saved, wherever its parts live."""
        return self._homes.whole(self.loaded)

    def state_dict(self) -> Json:
        """All that the next step depends on, but for the weights."""
        rng = {"cpu": torch.get_rng_state()} | ({"cuda": torch.cuda.get_rng_state(self._device)} if self._device.type == "cuda" else {})
        return {
            "step": self.step,
            "optimizer": self._optimizer.state_dict(),
            "numbers": self._numbers.state_dict(),
            "clip": self._clip.state_dict(),
            "detector": self._detector.state_dict(),
            "rng": rng,
        }

    def load_state_dict(self, state: Json) -> None:
        """The way back."""
        self.step = state["step"]
        self._optimizer.load_state_dict(state["optimizer"])
        self._numbers.load_state_dict(state["numbers"])
        self._clip = stability.ClipState.load(state["clip"])
        self._detector = stability.SpikeDetector(self._recipe.stability)
        self._detector.load_state_dict(state["detector"])
        torch.set_rng_state(state["rng"]["cpu"])
        if "cuda" in state["rng"] and self._device.type == "cuda":
            torch.cuda.set_rng_state(state["rng"]["cuda"], self._device)

    def roll_back(self, state: Json, weights: LoadedModel) -> None:
        """Be again what a checkpoint says. Only the detector keeps what it has seen, or it would never give up."""
        detector = self._detector
        self.load_state_dict(state)
        self._detector = detector
        self._detector.rolled_back(self.step)
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                self._homes.write(parameter, weights.model.get_parameter(name))

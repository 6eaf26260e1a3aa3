"""One step of training: from its batches to moved weights.

The loss of a step is the sum over all its trained tokens, of all micro-batches and all ranks, divided by the sum of their weights. The
denominator is known before the first forward pass, because a step's batches come together; so every micro-batch divides by it, gradients
add up to those of the whole, and how a step is cut into micro-batches makes no difference. A mean of means would.

A step whose loss or gradients are not finite, or that the spike detector takes for an accident, does not reach the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor

from gemel.config.train import DropoutConfig, TrainRecipe
from gemel.model.attend import Attend
from gemel.model.build import LoadedModel
from gemel.model.pieces import Share
from gemel.train import heap, optim, precision, rewrite, schedule, stability
from gemel.train.batch import PLACE, Batch
from gemel.train.dropout import Placed
from gemel.train.flops import Flops
from gemel.train.loader import Step
from gemel.train.offload import Homes
from gemel.train.parallel.mesh import Mesh
from gemel.train.parallel.ranks import Ranks

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
    """A model that learns, with its optimizer and its guards. `step` counts steps that were done, left out or not.

    On a mesh of several processes each has a trainer for its part (`loaded` is what is here), and all do the same at the same time.
    """

    def __init__(
        self,
        recipe: TrainRecipe,
        loaded: LoadedModel,
        device: torch.device,
        mesh: Mesh | None = None,
        weights: Share | None = None,
    ):
        """The weights are those that the model has, or `weights`, of which only what is needed here is read: see `build.lay_out`."""
        self._recipe, self.loaded, self._device = recipe, loaded, device
        heap.apply(recipe.heap)
        mesh = mesh or Mesh()
        self._homes = Homes.of(recipe.offload, device, recipe.out / "work" / "offload")
        gathered = recipe.parallel.zero == "parameters"  # moves what it keeps itself, a block at a time: the whole need not fit there
        self._model = loaded.model if gathered or weights is not None else self._homes.place(loaded.model, device)
        self._flops = Flops(self._model)
        rewrite.apply(recipe, self._model, device, self._homes, mesh)
        sections = {f"{name}.weight": x.sections for name, x in self._model.named_modules() if hasattr(x, "sections")}
        if recipe.batch.micro_sequences < recipe.batch.sequences:
            precision.add_up_in_fp32(p for p in self._model.parameters() if p.requires_grad)
        self._ranks = Ranks(recipe, loaded, mesh, device, self._homes)
        if weights is not None:
            self._ranks.load_weights(weights)
        pieces = self._ranks.gradients.pieces
        moved, starts = {name: x.tensor for name, x in pieces.items()}, {name: x.start for name, x in pieces.items()}
        self._optimizer = optim.build(recipe.optim, moved.items(), sections, self._ranks.parameters, starts, self._homes)
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
        here = (sum(batch.weight for batch in work.batches), sum(map(self._flops.of, work.batches)))
        weight, flops = self._ranks.total(of_tokens=here)
        assert weight > 0, "nothing of this step is trained"
        loss, z = self._gradients(work.batches, weight)
        grads = self._ranks.collect(self._numbers.scale)
        loss, z, norms = self._ranks.norms(grads, loss, z)
        clipped = stability.clip(self._recipe.optim.clip, grads, self._clip, norms)
        lr = schedule.rate(self._recipe.optim, self.step, self._recipe.steps)
        action, reason = self._judge(loss + z, clipped)
        if action == "ok":
            self._optimizer.step(lr)
        self._ranks.gradients.spread()
        self.step += 1
        return Report(self.step, loss, z, clipped.norm, clipped.factor, lr, work.num_tokens, weight, flops, action, reason)

    def _judge(self, loss: float, clipped: stability.Clipped) -> tuple[Action, str]:
        if self._numbers.overflowed(clipped.finite):
            return "overflow", f"gradients overflow fp16; the loss is scaled by {self._numbers.scale:g} from now on"
        verdict = self._detector.observe(self.step, loss, clipped.norm)
        named = f" ({', '.join(clipped.bad[:3])})" if clipped.bad else ""
        return verdict.action, verdict.reason + named

    def _gradients(self, batches: Sequence[Batch], weight: float) -> tuple[float, float]:
        """Backward through all micro-batches, with gradients that are still scaled; the loss and the part of it that is not cross-entropy,
        per trained token of the step.
        """
        loss, z = (torch.zeros((), dtype=torch.float64, device=self._device) for _ in range(2))
        scale, pipeline = self._numbers.scale, self._ranks.pipeline
        if pipeline is not None:
            loss_of = partial(self._head_loss, factor=scale / weight, label_smoothing=self._recipe.loss.label_smoothing)
            loss, z = pipeline.learn([self._here(batch) for batch in batches], loss_of, self._numbers.cast)
            batches = ()
        for number, batch in enumerate(batches, 1):
            batch_loss, batch_z = self._loss(batch, scale / weight, self._recipe.loss.label_smoothing)
            with self._ranks.gradients.backward(last=number == len(batches)):
                batch_loss.backward()  # type: ignore[no-untyped-call]
            loss += batch_loss.detach()
            z += batch_z
        return (loss - z).item() / scale, z.item() / scale

    def _loss(self, batch: Batch, factor: float, label_smoothing: float) -> tuple[Tensor, Tensor]:
        """As sums over tokens, times `factor`: in the weights, it is there before anything is rounded, and costs nothing."""
        batch, attend = self._here(batch)
        with self._numbers.cast():
            hidden_TD = self._model(batch.tokens_T, batch.positions_T, attend)
            return self._head_loss(hidden_TD, batch, factor, label_smoothing)

    def _here(self, batch: Batch) -> tuple[Batch, Attend]:
        """What is here of a micro-batch, and all that its tokens have to know."""
        batch, attend = self._ranks.here(batch.to(self._device))
        if self._recipe.dropout != DropoutConfig() and torch.is_grad_enabled():
            attend = Placed(attend, self._ranks.between(batch.streams[PLACE]), self._recipe.seed, self.step)
        return batch, attend

    def _head_loss(self, hidden_TD: Tensor, batch: Batch, factor: float, label_smoothing: float) -> tuple[Tensor, Tensor]:
        return self._ranks.head_loss(hidden_TD, batch, batch.weights_T * factor, self._recipe.loss.z_loss, label_smoothing)

    def _look(self, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
        """The loss of batches that go through together, as a sum over tokens."""
        if self._ranks.pipeline is None:
            return self._loss(batches[0], 1.0, 0.0)
        loss_of = partial(self._head_loss, factor=1.0, label_smoothing=0.0)
        return self._ranks.pipeline.look([self._here(batch) for batch in batches], loss_of, self._numbers.cast)

    def validate(self, batches: Iterable[Batch]) -> tuple[float, float]:
        """The sum of the cross-entropy over all tokens that would be trained, without label smoothing, and of their weights."""
        loss = weight = 0.0
        with torch.no_grad():  # inference mode would leave tensors that a backward pass refuses where parameters are gathered
            own = self._ranks.own(batches)
            while group := list(islice(own, self._ranks.num_micros)):
                group_loss, group_z = self._look(group)
                loss += (group_loss - group_z).item()
                weight += sum(batch.weight for batch in group)
        weight, loss = self._ranks.total(of_tokens=(weight,), of_loss=(loss,))
        return loss, weight

    def weights(self) -> Share:
        """What this process saves of the model: of all ranks together, everything once. It shares memory with the trainer."""
        return self._ranks.weights()

    def state_dict(self) -> Json:
        """All that the next step depends on, but for the weights; of the optimizer what this process saves, in memory that they share."""
        rng = {"cpu": torch.get_rng_state()} | ({"cuda": torch.cuda.get_rng_state(self._device)} if self._device.type == "cuda" else {})
        return {
            "step": self.step,
            "optimizer": self._ranks.state(self._optimizer),
            "numbers": self._numbers.state_dict(),
            "clip": self._clip.state_dict(),
            "detector": self._detector.state_dict(),
            "rng": rng,
        }

    def load_state_dict(self, state: Json) -> None:
        """The way back."""
        self.step = state["step"]
        self._ranks.load_state(self._optimizer, state["optimizer"])
        self._numbers.load_state_dict(state["numbers"])
        self._clip = stability.ClipState.load(state["clip"])
        self._detector = stability.SpikeDetector(self._recipe.stability)
        self._detector.load_state_dict(state["detector"])
        torch.set_rng_state(state["rng"]["cpu"])
        if "cuda" in state["rng"] and self._device.type == "cuda":
            torch.cuda.set_rng_state(state["rng"]["cuda"], self._device)

    def roll_back(self, state: Json, weights: Share) -> None:
        """Be again what a checkpoint says. Only the detector keeps what it has seen, or it would never give up."""
        detector = self._detector
        self.load_state_dict(state)
        self._detector = detector
        self._detector.rolled_back(self.step)
        self._ranks.load_weights(weights)

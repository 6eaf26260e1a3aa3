"""What stands between a bad step and the weights: clipping, and the decision to skip a step or to go back.

    clipped = clip(config.clip, grads, state)              # after the backward pass, before the optimizer
    verdict = detector.observe(step, loss, clipped.norm)   # ok: step; skip: drop this step's gradients; rollback: load the last good state

A bad batch is one bad step, and skipping it is all that is needed. Bad weights (a flipped bit, a step that went too far) make every
following step bad, and only an earlier checkpoint helps. So single bad steps are skipped and counted, and several in a row are a rollback,
after which the loop also passes over the data of the steps in question. Gradients that stay large while the loss is in order are neither:
the weights stand where it is steep, would stand there forever if all steps were skipped, and clipping is made for that. Everything that
decides is a few numbers that go into the checkpoint.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gemel.config.errors import ConfigError
from gemel.config.optim import AdaGC, Clip, GlobalClip, StabilityConfig

ROW = 2**15  # elements whose squares are summed by one thread in one go, whatever the number of threads
MAD_TO_SIGMA = 1.4826  # of a normal distribution


# --- clipping ----------------------------------------------------------------------------------------------------------------------------


@dataclass
class ClipState:
    """What AdaGC remembers: how many steps there were, and the running average of each gradient's clipped norm."""

    num_steps: int = 0
    averages: dict[str, float] = field(default_factory=dict)

    def state_dict(self) -> dict[str, int | dict[str, float]]:
        """Plain data that survives JSON."""
        return {"num_steps": self.num_steps, "averages": dict(self.averages)}

    @classmethod
    def load(cls, state: Mapping[str, int | dict[str, float]]) -> ClipState:
        """The way back."""
        num_steps, averages = state["num_steps"], state["averages"]
        assert isinstance(num_steps, int) and isinstance(averages, dict)
        return cls(num_steps, dict(averages))


class Clipped(NamedTuple):
    """What was measured and done.

    `norm` is that of all gradients together before clipping; `factor` the least that any gradient was multiplied with; `num_clipped` how
    many were multiplied with less than 1; `bad` names the parameters whose gradient is not finite or too large for its norm to be an fp32
    number. If there are any, nothing was changed, and the step must be skipped.
    """

    norm: float
    factor: float
    num_clipped: int
    bad: tuple[str, ...]

    @property
    def finite(self) -> bool:
        """Whether all gradients are."""
        return not self.bad


@torch.no_grad()
def clip(config: Clip, grads: Mapping[str, Tensor], state: ClipState, norms: Mapping[str, float] | None = None) -> Clipped:
    """Measure all gradients and scale them in place as `config` says. `state` is AdaGC's, and changes only with it.

    `norms` are those of the whole gradients where `grads` are parts of them, or of only some; else they are measured.
    """
    norms = measure(grads) if norms is None else norms
    bad = tuple(name for name, norm in norms.items() if not math.isfinite(norm))
    total = math.sqrt(math.fsum(norm * norm for norm in norms.values())) if not bad else math.nan
    if bad:
        return Clipped(total, 1.0, 0, bad)
    factors = _adagc(config, norms, total, state) if isinstance(config, AdaGC) else _global(config, norms, total)
    scaled = [name for name, factor in factors.items() if factor < 1.0]
    here = [name for name in scaled if name in grads]
    if here:
        torch._foreach_mul_([grads[name] for name in here], [factors[name] for name in here])
    return Clipped(total, min(factors.values(), default=1.0), len(scaled), ())


def measure(grads: Mapping[str, Tensor]) -> dict[str, float]:
    """The norm of each gradient.

    Squares are summed in fp32 in rows of fixed length, each by one thread, and the rows in fp64: the result does not depend on the number
    of threads, and is exact to fp32 for tensors of any size. One wait for the device, however many gradients there are.
    """
    if not grads:
        return {}
    squares = torch.stack([_sum_of_squares(grad) for grad in grads.values()])
    return dict(zip(grads, squares.sqrt().tolist(), strict=True))


def _sum_of_squares(x: Tensor) -> Tensor:
    flat = x.reshape(-1)
    whole = flat.numel() // ROW * ROW
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, ROW), dim=1, dtype=torch.float32)
    rest = torch.linalg.vector_norm(flat[whole:], dtype=torch.float32)
    total: Tensor = rows.double().square().sum() + rest.double().square()
    return total


def _global(config: Clip, norms: Mapping[str, float], total: float) -> dict[str, float]:
    factor = min(1.0, config.max_norm / total) if isinstance(config, GlobalClip) and total else 1.0
    return dict.fromkeys(norms, factor)


def _adagc(config: AdaGC, norms: Mapping[str, float], total: float, state: ClipState) -> dict[str, float]:
    """Factors, and new averages in `state`.

    A gradient of zero is passed over: the least norm of a warm-up would be zero, and everything would be clipped to it for ever (the first
    factor of a LoRA has such a gradient at its first step). A parameter that first appears after the warm-up starts with its own norm.
    """
    warming = state.num_steps < config.warmup
    state.num_steps += 1
    common = min(1.0, config.max_norm / total) if total else 1.0
    factors = {}
    for name, norm in norms.items():
        average = state.averages.get(name)
        if warming or average is None:
            factors[name] = common if warming else 1.0
        else:
            factors[name] = min(1.0, config.relative * average / norm) if norm else 1.0
        kept = factors[name] * norm
        if not kept:
            continue
        if average is None:
            state.averages[name] = kept
        else:
            state.averages[name] = min(average, kept) if warming else config.beta * average + (1.0 - config.beta) * kept
    return factors


# --- detection ---------------------------------------------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """What to do with the step that was observed, and why (empty when it is ok)."""

    action: Literal["ok", "skip", "rollback"]
    reason: str = ""


class Good(NamedTuple):
    """A step that was ok."""

    step: int
    loss: float
    norm: float


class SpikeDetector:
    """Judges each step by its loss and gradient norm, before the optimizer is called.

    Spikes are measured against the median of recent good steps, in units of their median absolute deviation: neither moves when one number
    in the window is absurd, as mean and standard deviation do. Norms are compared by their logarithms, because they vary by factors. Only
    upward: a loss that falls fast is no accident.
    """

    def __init__(self, config: StabilityConfig):
        self.config = config
        self.num_skipped = self.num_rollbacks = 0
        self._bad_in_a_row = 0
        self._window: deque[Good] = deque(maxlen=config.window)

    @property
    def healthy(self) -> bool:
        """Whether the last step was ok. A state that is saved when it was not may be the one to get away from."""
        return not self._bad_in_a_row

    def observe(self, step: int, loss: float, norm: float) -> Verdict:
        """Judge step `step`. A rollback must be answered with `rolled_back`."""
        reason = self._fault(loss, norm)
        self._bad_in_a_row = self._bad_in_a_row + 1 if reason else 0
        if reason and self._bad_in_a_row < self.config.patience:
            self.num_skipped += 1
            return Verdict("skip", reason)
        if not reason or self._only_steep(loss, norm):
            self._window.append(Good(step, loss, norm))
            return Verdict("ok")
        self._check_may_roll_back(step, reason)
        return Verdict("rollback", f"{self._bad_in_a_row} bad steps in a row, the last one: {reason}")

    def rolled_back(self, step: int) -> None:
        """The run goes on from the state before step `step`: what was seen from there on is forgotten, the count is not."""
        kept = [good for good in self._window if good.step < step]
        self._window.clear()
        self._window.extend(kept)
        self._bad_in_a_row = 0
        self.num_rollbacks += 1

    def state_dict(self) -> dict[str, int | list[list[float]]]:
        """Plain data that survives JSON."""
        window = [[float(x) for x in good] for good in self._window]
        counts = {"num_skipped": self.num_skipped, "num_rollbacks": self.num_rollbacks, "bad_in_a_row": self._bad_in_a_row}
        return {**counts, "window": window}

    def load_state_dict(self, state: Mapping[str, int | list[list[float]]]) -> None:
        """The way back. A window that is longer than the configured one loses its oldest steps."""
        counts, window = [state[name] for name in ("num_skipped", "num_rollbacks", "bad_in_a_row")], state["window"]
        assert isinstance(window, list)
        self.num_skipped, self.num_rollbacks, self._bad_in_a_row = (int(count) for count in counts if isinstance(count, int))
        self._window.clear()
        self._window.extend(Good(int(step), loss, norm) for step, loss, norm in window)

    def _fault(self, loss: float, norm: float) -> str:
        """What is wrong with a step, or nothing."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(norm):
            return f"the gradient norm is {norm}"
        if not self.config.spikes or len(self._window) < self.config.least_window:
            return ""
        if (z := self._loss_z(loss)) > self.config.threshold:
            return f"the loss of {loss:.4g} is {z:.1f} deviations above the median of {median(good.loss for good in self._window):.4g}"
        norms = [_log(good.norm) for good in self._window]
        if (z := _robust_z(_log(norm), norms, self.config.norm_floor)) > self.config.threshold:
            return f"the gradient norm of {norm:.4g} is {z:.1f} deviations above the median of {math.exp(median(norms)):.4g}"
        return ""

    def _only_steep(self, loss: float, norm: float) -> bool:
        """Whether nothing is wrong with a bad step but its norm."""
        return math.isfinite(loss) and math.isfinite(norm) and self._loss_z(loss) <= self.config.threshold

    def _loss_z(self, loss: float) -> float:
        losses = [good.loss for good in self._window]
        return _robust_z(loss, losses, self.config.loss_floor * abs(median(losses)))

    def _check_may_roll_back(self, step: int, reason: str) -> None:
        if self.num_rollbacks >= self.config.max_rollbacks:
            raise ConfigError(
                f"step {step}: {reason}, and the run has been rolled back max_rollbacks = {self.config.max_rollbacks} times. "
                f"If the data changed on purpose, raise stability.threshold = {self.config.threshold:g} or set spikes = false; "
                "otherwise lower optim.lr, or begin from an earlier checkpoint"
            )


def _robust_z(x: float, window: list[float], floor: float) -> float:
    """Robust standard deviations of `x` above the median of `window`; `floor` is the least such deviation."""
    middle = median(window)
    sigma = max(MAD_TO_SIGMA * median(abs(y - middle) for y in window), floor)
    return (x - middle) / sigma if sigma else math.copysign(math.inf, x - middle) if x != middle else 0.0


def _log(norm: float) -> float:
    return math.log(max(norm, 1e-30))

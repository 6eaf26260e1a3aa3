"""How weights are moved: method, schedule, what the optimizer stores, and what guards a step against bad gradients.

Every technique is a type, so that a setting which a method does not have is an unknown key and not a silent no-op. What depends on the
model (which names a pattern hits) is checked by `train.optim.build`, and what depends on the length of the run by `train.schedule.rate`.

    [train.optim]
    lr = 3e-4
    state = "int8"
    method = { kind = "adamw", betas = [0.9, 0.95] }
    schedule = { kind = "wsd", warmup = 100, decay = 0.2 }
    clip = { kind = "adagc" }
    groups = [{ match = "embed.*", lr_scale = 0.5, weight_decay = 0.0 }]
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from gemel.config.base import Config

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Precision = Literal["fp32", "bf16", "int8"]
WeightStorage = Literal["fp32", "master", "stochastic"]


def _length(value: int | float) -> int | float:
    if value < 0:
        raise ValueError(f"a length of {value} is negative")
    if isinstance(value, float) and value >= 1.0:
        raise ValueError(f"a fraction of the run is below 1; for {value:g} steps write {int(value)}")
    return value


# Steps when it is an integer, a share of the whole run when it is a fraction: 100 or 0.02.
Length = Annotated[NonNegativeInt | float, AfterValidator(_length)]


# --- methods -----------------------------------------------------------------------------------------------------------------------------


class AdamW(Config):
    """Adam with decoupled decay (Loshchilov and Hutter 2017, arXiv 1711.05101). Two states of the size of the weights."""

    kind: Literal["adamw"] = "adamw"
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8

    @property
    def has_state(self) -> bool:
        """Whether something of the size of the weights is kept between steps."""
        return True


class Adafactor(Config):
    """Second moments as row and column sums (Shazeer and Stern 2018, arXiv 1804.04235).

    beta1         None keeps no first moment, which is the point of the method; a number keeps one, of the size of the weights
    decay         second moments average with 1 - step ** -decay
    eps           least squared gradient, and least root mean square of a weight when `relative`
    clip          updates are scaled down to at most this root mean square
    relative      the step is the rate times the root mean square of the weight, and the rate at most 1 / sqrt(step)
    """

    kind: Literal["adafactor"] = "adafactor"
    beta1: Beta | None = None
    decay: Annotated[float, Field(gt=0.0, le=1.0)] = 0.8
    eps: tuple[PositiveFloat, PositiveFloat] = (1e-30, 1e-3)
    clip: PositiveFloat = 1.0
    relative: bool = True

    @property
    def has_state(self) -> bool:
        """Whether something of the size of the weights is kept between steps."""
        return self.beta1 is not None


class Lion(Config):
    """The sign of an interpolated momentum (Chen et al. 2023, arXiv 2302.06675). One state; wants 3 to 10 times less rate than AdamW and
    as much more decay.
    """

    kind: Literal["lion"] = "lion"
    betas: tuple[Beta, Beta] = (0.9, 0.99)

    @property
    def has_state(self) -> bool:
        """Whether something of the size of the weights is kept between steps."""
        return True


class SGD(Config):
    """Stochastic gradient descent, with Nesterov's or plain momentum or none (Sutskever et al. 2013)."""

    kind: Literal["sgd"] = "sgd"
    momentum: Beta = 0.9
    nesterov: bool = False

    @property
    def has_state(self) -> bool:
        """Whether something of the size of the weights is kept between steps."""
        return self.momentum > 0.0

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> SGD:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov = true needs momentum, which is 0; set momentum = 0.9 or nesterov = false")
        return self


class Muon(Config):
    """Orthogonalized momentum for matrices (Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982), AdamW for everything else.

    matrices      name patterns; what matches and has two dimensions is Muon's
    scale         match_rms: updates as large as AdamW's, so that one rate fits both; original: sqrt(max(1, rows / columns))
    iterations    of Newton and Schulz
    precision     of their products: auto takes bf16 on a GPU, fp32 on a CPU
    rest          what the other parameters get, at `rest_lr_scale` times the rate
    """

    kind: Literal["muon"] = "muon"
    momentum: Beta = 0.95
    nesterov: bool = True
    iterations: Annotated[int, Field(ge=1, le=20)] = 5
    eps: PositiveFloat = 1e-7
    scale: Literal["match_rms", "original"] = "match_rms"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    matrices: Annotated[tuple[str, ...], Field(min_length=1)] = ("layers.*",)
    rest: AdamW = AdamW()
    rest_lr_scale: PositiveFloat = 1.0

    @property
    def has_state(self) -> bool:
        """Whether something of the size of the weights is kept between steps."""
        return True


Method = Annotated[AdamW | Adafactor | Lion | SGD | Muon, Field(discriminator="kind")]


# --- schedules: warmup and decay are lengths, `final` is the share of `lr` at the end ----------------------------------------------------


class Constant(Config):
    """The same rate after the warm-up."""

    kind: Literal["constant"] = "constant"
    warmup: Length = 0


class Linear(Config):
    """A straight line down to `final`."""

    kind: Literal["linear"] = "linear"
    warmup: Length = 0
    final: Share = 0.0


class Cosine(Config):
    """Half a cosine down to `final` (Loshchilov and Hutter 2016, arXiv 1608.03983)."""

    kind: Literal["cosine"] = "cosine"
    warmup: Length = 0
    final: Share = 0.0


class Step(Config):
    """Multiplied by `factor` at the end of every `every`."""

    kind: Literal["step"] = "step"
    warmup: Length = 0
    every: Length = 0.25
    factor: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5


class Exponential(Config):
    """The same factor at every step, so that the run ends at `final`."""

    kind: Literal["exponential"] = "exponential"
    warmup: Length = 0
    final: Annotated[float, Field(gt=0.0, le=1.0)] = 0.01


class WSD(Config):
    """Warm-up, stable, decay (Hu et al. 2024, arXiv 2404.06395): a run can go on from its stable part, however long it was to be.

    `shape` "sqrt" is 1 - sqrt(progress), the best of those compared by Hagele et al. 2024 (arXiv 2405.18392).
    """

    kind: Literal["wsd"] = "wsd"
    warmup: Length = 0
    decay: Length = 0.2
    final: Share = 0.0
    shape: Literal["linear", "cosine", "sqrt"] = "sqrt"


Schedule = Annotated[Constant | Linear | Cosine | Step | Exponential | WSD, Field(discriminator="kind")]


# --- clipping ----------------------------------------------------------------------------------------------------------------------------


class NoClip(Config):
    """Gradients as they are. Their norm is measured all the same."""

    kind: Literal["none"] = "none"


class GlobalClip(Config):
    """All gradients scaled by one factor, so that their common norm is at most `max_norm` (Pascanu et al. 2013, arXiv 1211.5063)."""

    kind: Literal["global"] = "global"
    max_norm: PositiveFloat = 1.0


class AdaGC(Config):
    """Each gradient held to `relative` times the running average of its own clipped norms (Wang et al. 2025, arXiv 2502.11034).

    During `warmup` steps clipping is global, with `max_norm`, and the averages start as the least norms seen.
    """

    kind: Literal["adagc"] = "adagc"
    relative: Annotated[float, Field(gt=1.0)] = 1.05
    beta: Beta = 0.98
    warmup: PositiveInt = 100
    max_norm: PositiveFloat = 1.0


Clip = Annotated[NoClip | GlobalClip | AdaGC, Field(discriminator="kind")]


# --- the whole ---------------------------------------------------------------------------------------------------------------------------


class Group(Config):
    """Other settings for parameters whose name matches the shell pattern. The first group that matches decides.

    weight_decay and l1 of None leave the common ones, exclusions included; a number holds for whatever matches.
    """

    match: Annotated[str, Field(min_length=1)]
    lr_scale: NonNegativeFloat = 1.0
    weight_decay: NonNegativeFloat | None = None
    l1: NonNegativeFloat | None = None


class OptimConfig(Config):
    """Everything between a gradient and a weight.

    lr             the highest rate of the schedule
    weight_decay   decoupled: weights shrink by lr * weight_decay, whatever the gradient
    l1             decoupled: after the step weights move towards zero by lr * l1 and stop there, which leaves exact zeros
    exempt         what neither decay nor L1 touches; embeddings include a head that is tied to them
    state          of the optimizer: fp32; bf16, rounded stochastically; or int8 in blocks (Dettmers et al. 2022, arXiv 2110.02861)
    weights        fp32: parameters are fp32. master: they are bf16, and the optimizer keeps the 16 bits that are missing. stochastic: they
                   are bf16 and nothing else is kept; updates are rounded up or down with the probability that makes them right on average
    seed           of stochastic rounding
    """

    lr: PositiveFloat = 3e-4
    method: Method = AdamW()
    schedule: Schedule = Cosine()
    clip: Clip = GlobalClip()
    weight_decay: NonNegativeFloat = 0.1
    l1: NonNegativeFloat = 0.0
    exempt: tuple[Literal["norms", "biases", "embeddings"], ...] = ("norms", "biases")
    groups: tuple[Group, ...] = ()
    state: Precision = "fp32"
    weights: WeightStorage = "fp32"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    @model_validator(mode="after")
    def _state_exists(self) -> OptimConfig:
        if not self.method.has_state and self.state != "fp32":
            raise ValueError(
                f"state = {self.state!r} has no effect: {self.method.kind} as it is set keeps no state of the size of the weights; "
                f"leave state at 'fp32' or set {self.way_to_state}"
            )
        return self

    @property
    def way_to_state(self) -> str:
        """What makes a method without state keep some."""
        return {"sgd": "momentum = 0.9", "adafactor": "beta1 = 0.9"}[self.method.kind]


# --- what watches over a run -------------------------------------------------------------------------------------------------------------


class StabilityConfig(Config):
    """When a step is skipped and when the run goes back to its last good checkpoint.

    A step is bad when its loss or gradient norm is not finite, or, with `spikes`, lies more than `threshold` robust standard deviations
    above the median of the last `window` good steps. A bad step is skipped; `patience` bad steps in a row mean that the weights are bad,
    unless only the norm of the last is large and its loss in order: then it counts, as all such steps that follow.

    spikes          false: only what is not finite is bad
    window          good steps that are remembered
    least_window    good steps before anything is called a spike
    threshold       in robust standard deviations, 1.4826 times the median absolute deviation
    loss_floor      the standard deviation of the loss is taken to be at least this share of its median
    norm_floor      the same for the logarithm of the norm, in absolute terms: 0.1 is 10%
    patience        bad steps in a row that lead to a rollback, or to bearing with large norms
    max_rollbacks   one more ends the run with an error
    """

    spikes: bool = True
    window: PositiveInt = 128
    least_window: PositiveInt = 32
    threshold: PositiveFloat = 6.0
    loss_floor: PositiveFloat = 0.01
    norm_floor: PositiveFloat = 0.1
    patience: PositiveInt = 3
    max_rollbacks: NonNegativeInt = 3

    @model_validator(mode="after")
    def _window_can_fill(self) -> StabilityConfig:
        if self.least_window > self.window:
            raise ValueError(f"least_window = {self.least_window} is more than window = {self.window}, so no spike is ever seen; lower it")
        return self

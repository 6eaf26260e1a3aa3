"""Clipping against float64 and torch, AdaGC against a run by hand, and detection of injected faults."""

from __future__ import annotations

import json
import math
import struct

import pytest
import torch
from torch import Tensor

from gemel.config.errors import ConfigError
from gemel.config.optim import AdaGC, GlobalClip, NoClip, OptimConfig, StabilityConfig
from gemel.train.optim import build
from gemel.train.stability import ClipState, SpikeDetector, clip, measure
from tests.tolerance import assert_close


def _grads(seed: int = 0, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (300, 250), "b": (70,), "c": (1,), "d": (0,)}
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


# --- clipping ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_those_of_float64(dtype: torch.dtype) -> None:
    grads = {name: grad.to(dtype) for name, grad in _grads().items()}
    for name, norm in measure(grads).items():
        assert_close(torch.tensor(norm), grads[name].double().norm(), "fp32_reorder")


def test_norm_of_many_small_numbers_keeps_its_digits() -> None:
    """Added one by one in fp32, 2^25 equal squares would stop at 2^24 of them."""
    ones = torch.ones(1, dtype=torch.bfloat16).expand(2**25)
    assert_close(torch.tensor(measure({"x": ones})["x"]), torch.tensor(2**12.5), "fp32_reorder")


def test_norms_do_not_depend_on_threads() -> None:
    grads, before = {"x": torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))}, torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(measure(grads)["x"])
    torch.set_num_threads(before)
    assert len(set(found)) == 1


def test_global_clipping_is_torch_s() -> None:
    ours, theirs = _grads(), [torch.nn.Parameter(grad.clone()) for grad in _grads().values()]
    for parameter in theirs:
        parameter.grad = parameter.detach().clone()
    want = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
    clipped = clip(GlobalClip(max_norm=0.5), ours, ClipState())
    assert_close(torch.tensor(clipped.norm), want, "fp32_reorder")
    assert clipped.factor == pytest.approx(0.5 / want.item(), rel=1e-5) and clipped.num_clipped == 4
    for name, parameter in zip(ours, theirs, strict=True):
        if ours[name].numel():
            assert parameter.grad is not None
            assert_close(ours[name], parameter.grad, "fp32_reorder")


@pytest.mark.parametrize("config", [NoClip(), GlobalClip(max_norm=1e6), AdaGC(max_norm=1e6)])
def test_what_needs_no_clipping_is_not_touched(config: NoClip | GlobalClip | AdaGC) -> None:
    grads = _grads()
    clipped = clip(config, grads, ClipState())
    assert (clipped.factor, clipped.num_clipped, clipped.finite) == (1.0, 0, True)
    assert all(torch.equal(grad, want) for grad, want in zip(grads.values(), _grads().values(), strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("config", [NoClip(), GlobalClip(), AdaGC()])
def test_gradients_that_are_not_finite_are_named_and_nothing_changes(config: NoClip | GlobalClip | AdaGC, value: float) -> None:
    grads, state = _grads(), ClipState(5, {"a": 1.0, "b": 1.0})
    grads["b"][3] = value
    clipped = clip(config, grads, state)
    assert clipped.bad == ("b",) and not clipped.finite
    assert torch.equal(grads["a"], _grads()["a"])
    assert state == ClipState(5, {"a": 1.0, "b": 1.0})


def test_adagc_by_hand() -> None:
    """Two parameters of one element: their norms are their gradients."""
    config, state = AdaGC(relative=1.5, beta=0.75, warmup=2, max_norm=5.0), ClipState()

    def step(a: float, b: float) -> list[float]:
        grads = {"a": torch.tensor([a]), "b": torch.tensor([b])}
        clip(config, grads, state)
        return [grad.item() for grad in grads.values()]

    assert step(3.0, 4.0) == [3.0, 4.0]  # norm 5, not above max_norm
    assert step(6.0, 8.0) == [3.0, 4.0]  # norm 10, halved; the averages stay at the least clipped norms
    assert state.averages == {"a": 3.0, "b": 4.0}
    assert step(9.0, 4.0) == pytest.approx([4.5, 4.0])  # after the warm-up, a is held to 1.5 * 3
    assert state.averages == pytest.approx({"a": 0.75 * 3.0 + 0.25 * 4.5, "b": 4.0})
    assert step(1.0, 100.0) == pytest.approx([1.0, 6.0])
    assert state.averages == pytest.approx({"a": 0.75 * 3.375 + 0.25 * 1.0, "b": 0.75 * 4.0 + 0.25 * 6.0})


def test_adagc_lets_a_parameter_that_began_at_zero_move() -> None:
    """The first factor of a LoRA has no gradient at first; a least norm of zero would hold it at zero for ever."""
    state = ClipState()
    for gradient in (0.0, 0.0, 0.5, 0.5):
        grads = {"a": torch.tensor([gradient])}
        clip(AdaGC(warmup=2), grads, state)
        assert grads["a"].item() == gradient


def test_adagc_goes_on_where_it_was() -> None:
    state = ClipState()
    for step in range(5):
        clip(AdaGC(warmup=3), _grads(step), state)
    again = ClipState.load(json.loads(json.dumps(state.state_dict())))
    results = [(clip(AdaGC(warmup=3), grads := _grads(9, 50.0), one), grads["a"]) for one in (state, again)]
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])
    assert state == again


# --- detection ---------------------------------------------------------------------------------------------------------------------------

CONFIG = StabilityConfig(window=32, least_window=8, patience=3, max_rollbacks=2)


def _watched(num_steps: int = 40) -> SpikeDetector:
    """A detector that has seen a slowly falling, noisy loss."""
    detector, noise = SpikeDetector(CONFIG), torch.randn(num_steps, 2, generator=torch.Generator().manual_seed(0)).tolist()
    for step, (first, second) in enumerate(noise):
        verdict = detector.observe(step, 4.0 - 0.01 * step + 0.05 * first, math.exp(0.15 * second))
        assert verdict.action == "ok", verdict.reason
    return detector


def test_a_corrupt_batch_is_skipped_and_forgotten() -> None:
    detector = _watched()
    verdict = detector.observe(40, 9.0, 1.0)
    assert verdict.action == "skip" and "loss of 9" in verdict.reason
    assert not detector.healthy
    assert detector.observe(41, 3.6, 1.0).action == "ok"
    assert detector.healthy and detector.num_skipped == 1


def test_a_norm_is_a_spike_by_its_factor() -> None:
    assert _watched().observe(40, 3.6, 2.0).action == "ok"
    assert "gradient norm of 30" in _watched().observe(40, 3.6, 30.0).reason


def test_norms_that_stay_large_are_borne_while_the_loss_is_in_order() -> None:
    """Where it is steep, a step that is left out leads to the same place; the loss alone says whether the weights are bad."""
    detector = _watched()
    assert [detector.observe(40 + i, 3.6, 30.0).action for i in range(6)] == ["skip"] * 2 + ["ok"] * 4
    assert detector.observe(46, 9.0, 30.0).action == "rollback"
    detector.rolled_back(46)
    assert detector.observe(47, 3.6, 1.0).action == "ok" and detector.observe(48, 3.6, 30.0).action == "skip"
    assert detector.num_skipped == 3 and detector.observe(49, math.nan, 30.0).action == "skip"
    assert detector.observe(50, 3.6, math.inf).action == "rollback"


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (3.6, math.nan), (3.6, math.inf)])
def test_what_is_not_finite_is_skipped_from_the_first_step_on(loss: float, norm: float) -> None:
    for detector in (_watched(), SpikeDetector(CONFIG), SpikeDetector(StabilityConfig(spikes=False))):
        assert detector.observe(40, loss, norm).action == "skip"


def test_spikes_are_ok_when_they_are_not_asked_for() -> None:
    detector = SpikeDetector(StabilityConfig(spikes=False))
    assert all(detector.observe(step, 10.0**step, 1.0).action == "ok" for step in range(60))


def test_a_fast_fall_is_no_spike() -> None:
    assert _watched().observe(40, 0.5, 0.01).action == "ok"


def test_a_constant_loss_has_a_floor_to_its_deviation() -> None:
    detector = SpikeDetector(CONFIG)
    for step in range(20):
        detector.observe(step, 2.0, 1.0)
    assert detector.observe(20, 2.0 * (1 + 5 * CONFIG.loss_floor), 1.0).action == "ok"
    assert detector.observe(21, 2.0 * (1 + 7 * CONFIG.loss_floor), 1.0).action == "skip"


def test_spikes_that_persist_roll_back_until_that_has_been_tried_enough() -> None:
    detector = _watched()
    for rollback in range(CONFIG.max_rollbacks):
        actions = [detector.observe(40 + i, 9.0, 1.0).action for i in range(3)]
        assert actions == ["skip", "skip", "rollback"]
        detector.rolled_back(36)
        assert detector.num_rollbacks == rollback + 1
        assert detector.observe(36, 3.6, 1.0).action == "ok"
    detector.observe(40, 9.0, 1.0)
    detector.observe(41, 9.0, 1.0)
    with pytest.raises(ConfigError, match="max_rollbacks = 2 times"):
        detector.observe(42, 9.0, 1.0)


def test_a_rollback_forgets_what_came_after_it() -> None:
    detector = _watched()
    detector.rolled_back(38)
    window = detector.state_dict()["window"]
    assert isinstance(window, list) and [int(good[0]) for good in window] == list(range(8, 38))


def test_goes_on_where_it_was() -> None:
    detector = _watched()
    detector.observe(40, 9.0, 1.0)
    again = SpikeDetector(CONFIG)
    again.load_state_dict(json.loads(json.dumps(detector.state_dict())))
    for step, loss in enumerate((9.0, 9.0), start=41):
        assert detector.observe(step, loss, 1.0) == again.observe(step, loss, 1.0)
    assert detector.state_dict() == again.state_dict()


# --- faults, on something that learns ----------------------------------------------------------------------------------------------------


class _Regression:
    """Fits a linear map with AdamW under the guards, as the loop will: clip, observe, step or skip or roll back."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x, truth = torch.randn(64, 16, generator=generator), torch.randn(16, 4, generator=generator)
        self.y = self.x @ truth + 0.5 * torch.randn(64, 4, generator=generator)
        self.w = torch.nn.Parameter(torch.zeros(16, 4))
        self.optimizer = build(OptimConfig(weight_decay=0.0), [("layers.0.weight", self.w)])
        self.clip_state, self.detector = ClipState(), SpikeDetector(CONFIG)
        self.saved: tuple[int, Tensor, dict[str, Tensor]] | None = None

    def step(self, step: int, *, corrupt: bool = False, nan: bool = False) -> str:
        rows = torch.randint(0, 64, (32,), generator=torch.Generator().manual_seed(step))
        y = 100.0 + self.y[rows] if corrupt else self.y[rows]
        self.w.grad = None
        loss = (self.x[rows] @ self.w - y).square().mean()
        loss.backward()
        assert self.w.grad is not None
        if nan:
            self.w.grad[0, 0] = math.nan
        clipped = clip(GlobalClip(), {"layers.0.weight": self.w.grad}, self.clip_state)
        action = self.detector.observe(step, loss.item(), clipped.norm).action
        if action == "ok":
            self.optimizer.step(1e-2)
        return action

    def save(self, step: int) -> None:
        self.saved = (step, self.w.detach().clone(), {name: x.clone() for name, x in self.optimizer.state_dict().items()})

    def roll_back(self) -> int:
        assert self.saved is not None
        step, w, state = self.saved
        with torch.no_grad():
            self.w.copy_(w)
        self.optimizer.load_state_dict(state)
        self.detector.rolled_back(step)
        return step


@pytest.mark.parametrize("fault", ["corrupt", "nan"])
def test_a_fault_in_one_step_leaves_no_trace(fault: str) -> None:
    run = _Regression()
    for step in range(60):
        assert run.step(step) == "ok"
    before = run.w.detach().clone()
    assert run.step(60, **{fault: True}) == "skip"
    assert torch.equal(run.w, before)
    assert all(run.step(step) == "ok" for step in range(61, 80))


def test_a_flipped_bit_is_found_and_undone() -> None:
    """The highest bit of the exponent of one weight: 0.1 becomes 10^37."""
    run = _Regression()
    for step in range(60):
        run.step(step)
    run.save(60)
    flat = run.w.detach().view(-1)
    (bits,) = struct.unpack("<i", struct.pack("<f", flat[5].item()))
    flat[5] = struct.unpack("<f", struct.pack("<i", bits ^ (1 << 30)))[0]
    assert [run.step(step) for step in range(60, 63)] == ["skip", "skip", "rollback"]
    assert run.roll_back() == 60
    assert all(run.step(step) == "ok" for step in range(63, 90))  # the data of the bad steps is passed over
    assert run.w.abs().max() < 10

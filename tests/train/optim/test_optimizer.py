"""The whole optimizer: resumed runs repeat the bits of whole ones, storage changes numbers within its promise, mistakes are refused."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gemel.config.errors import CheckpointError, ConfigError
from gemel.config.optim import Muon, OptimConfig, Precision, WeightStorage
from gemel.ops.cpu import training
from gemel.train.optim import build
from gemel.train.optim.method import At
from tests.tolerance import RELATIVE, assert_close
from tests.train.optim.problem import METHODS, SHAPES, Problem, combinations, config


@pytest.mark.parametrize(("method", "state", "weights"), list(combinations()))
def test_a_resumed_run_is_bitwise_a_whole_one(tmp_path: Path, method: str, state: Precision, weights: WeightStorage) -> None:
    """Six steps against three, a save to files, another process's objects with other weights, a load, and three."""
    settings = config(method, state=state, weights=weights, seed=7)
    whole = Problem(settings)
    whole.run(0, 6)
    first = Problem(settings)
    first.run(0, 3)
    save_file(first.optimizer.state_dict(), tmp_path / "optimizer.safetensors")
    save_file(first.weights(), tmp_path / "weights.safetensors")
    second = Problem(settings, seed=99)
    second.targets = first.targets
    with torch.no_grad():
        for name, x in load_file(tmp_path / "weights.safetensors").items():
            second.parameters[name].copy_(x)
    second.optimizer.load_state_dict(load_file(tmp_path / "optimizer.safetensors"))
    second.run(3, 6)
    for name, x in whole.weights().items():
        assert torch.equal(second.parameters[name], x), name
    ours, theirs = whole.optimizer.state_dict(), second.optimizer.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())


@pytest.mark.parametrize("method", METHODS)
def test_a_run_depends_on_all_of_its_state(method: str) -> None:
    """Were some of it not used, the test above could not fail."""
    whole, forgetful = Problem(config(method)), Problem(config(method))
    whole.run(0, 4)
    forgetful.run(0, 2)
    for x in forgetful.optimizer.state_dict().values():
        x.zero_()
    forgetful.run(2, 4)
    same = torch.equal(whole.parameters["embed.weight"], forgetful.parameters["embed.weight"])
    assert same == (method == "sgd_plain")


@pytest.mark.parametrize("method", METHODS)
def test_bf16_weights_with_their_halves_move_as_fp32_ones(method: str) -> None:
    """From the same weights and with the same gradients: not one bit apart."""
    halved = Problem(config(method, weights="master"))
    plain = {name: nn.Parameter(x.float()) for name, x in halved.weights().items()}
    optimizer = build(config(method), plain.items())
    for step in range(5):
        halved.set_grads(step)
        for name, parameter in halved.parameters.items():
            assert parameter.grad is not None
            plain[name].grad = parameter.grad.float()
        halved.optimizer.step(1e-3)
        optimizer.step(1e-3)
    for name, parameter in halved.parameters.items():
        assert torch.equal(parameter, plain[name].bfloat16()), name


@pytest.mark.skipif(training.kernels() is None, reason="the kernels are not compiled")
@pytest.mark.parametrize("state", ["fp32", "bf16"])
@pytest.mark.parametrize("weights", ["fp32", "master", "stochastic"])
def test_the_native_step_is_the_plain_one(state: Precision, weights: WeightStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """With decay, L1, and the same draws where numbers are rounded at random."""
    native, plain = Problem(config(state=state, weights=weights)), Problem(config(state=state, weights=weights))
    assert native.optimizer._members[0]._update_stored(At(0.0, 0.0, 1), torch.zeros(80 * 65), 0, 80 * 65)
    native.run(0, 5)
    monkeypatch.setattr(training, "kernels", lambda: None)
    assert not plain.optimizer._members[0]._update_stored(At(0.0, 0.0, 1), torch.zeros(80 * 65), 0, 80 * 65)
    plain.run(0, 5)
    row = "fp32_reorder" if (state, weights) == ("fp32", "fp32") else "bf16_reorder"
    for name, x in native.weights().items():
        assert_close(x, plain.parameters[name], row)
        assert (x == plain.parameters[name]).float().mean() > 0.9  # a rare last bit apart
    for name, x in native.optimizer.state_dict().items():
        if not name.endswith("low"):  # what a last bit is apart in the weight is everything there
            assert_close(x, plain.optimizer.state_dict()[name], row)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("method", ["adamw", "lion"])
def test_a_part_moves_by_the_bits_of_the_whole(method: str, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where numbers are rounded at random, and wherever a part begins within a stretch."""
    monkeypatch.setattr("gemel.train.optim.optimizer.STRETCH", 256)
    if not native:
        monkeypatch.setattr(training, "kernels", lambda: None)
    settings, generator = config(method, weights="stochastic", state="bf16"), torch.Generator().manual_seed(0)
    whole = torch.randn(3000, generator=generator).bfloat16()
    bounds = [0, 100, 700, 1024, 1500, 3000]
    parts = [whole[a:b].clone() for a, b in pairwise(bounds)]
    optimizers = [
        build(settings, [("w", x.requires_grad_())], starts={"w": start}) for x, start in [(whole, 0), *zip(parts, bounds, strict=False)]
    ]
    for _ in range(3):
        whole.grad = torch.randn(3000, generator=generator).bfloat16()
        for part, (a, b) in zip(parts, pairwise(bounds), strict=True):
            part.grad = whole.grad[a:b]
        for optimizer in optimizers:
            optimizer.step(1e-2)
    assert torch.equal(torch.cat(parts), whole)
    first, *others = [optimizer.state_dict() for optimizer in optimizers]
    assert all(torch.equal(torch.cat([other[name] for other in others]), x) for name, x in first.items() if x.dim())


def test_stochastic_weights_get_there_where_nearest_ones_stand_still() -> None:
    """1,000 steps of 0.001 from 1: each is an eighth of the spacing of bf16 there."""
    w = nn.Parameter(torch.ones(4000, dtype=torch.bfloat16))
    optimizer = build(OptimConfig.parse({"method": {"kind": "lion"}, "weights": "stochastic", "weight_decay": 0.0}), [("w", w)])
    for _ in range(1000):
        w.grad = -torch.ones(4000, dtype=torch.bfloat16)
        optimizer.step(1e-3)
    assert torch.equal(torch.ones(1, dtype=torch.bfloat16) + 1e-3, torch.ones(1, dtype=torch.bfloat16))
    assert_close(w.float().mean(), torch.tensor(2.0), "fp16_scales")
    assert w.float().std() < 0.1


def test_the_seed_decides_how_numbers_are_rounded() -> None:
    runs = [Problem(config(weights="stochastic", seed=seed)) for seed in (1, 1, 2)]
    for run in runs:
        run.run(0, 2)
    weights = [run.parameters["embed.weight"] for run in runs]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.has_state])
@pytest.mark.parametrize(("state", "row"), [("bf16", "bf16_state"), ("int8", "int8_state")])
def test_smaller_state_moves_weights_alike(method: str, state: Precision, row: str) -> None:
    """After 40 steps the way that a parameter has come is the same but for a small part of its length."""
    exact, small = Problem(config(method)), Problem(config(method, state=state))
    start = exact.weights()
    for run in (exact, small):
        run.run(0, 40, lr=0.1)
    assert small.optimizer.state_bytes < exact.optimizer.state_bytes
    for name, x in exact.weights().items():
        way, other = x - start[name], small.parameters[name].detach() - start[name]
        assert ((other - way).norm() / way.norm()).item() <= RELATIVE[row]


@pytest.mark.parametrize("method", ["adamw", "lion", "sgd"])
def test_bits_do_not_depend_on_threads(method: str) -> None:
    """A parameter of more than one stretch, whose end is in the middle of a block and of a vector."""
    generator = torch.Generator().manual_seed(0)
    start, grad = (torch.randn(300_007, generator=generator) for _ in range(2))
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        w = nn.Parameter(start.clone())
        optimizer = build(config(method, state="int8"), [("layers.0.weight", w)])
        for _ in range(2):
            w.grad = grad.clone()
            optimizer.step(1e-2)
        found.append(w.detach())
    assert torch.equal(*found)


def test_gradients_are_read_only_and_parameters_without_one_stand_still() -> None:
    problem = Problem(config())
    problem.set_grads(0)
    grads = {name: x.grad.clone() for name, x in problem.parameters.items() if x.grad is not None}
    problem.parameters["embed.weight"].grad = None
    before = problem.weights()
    problem.optimizer.step(1e-2)
    assert torch.equal(problem.parameters["embed.weight"], before["embed.weight"])
    assert problem.optimizer.state_dict()["embed.weight.step"] == 0
    for name in SHAPES.keys() - {"embed.weight"}:
        assert torch.equal(problem.parameters[name].grad, grads[name])  # type: ignore[arg-type]
        assert not torch.equal(problem.parameters[name], before[name])


def test_memory_is_what_the_precision_says() -> None:
    num, small = 80 * 65 + 96 * 65, 96 + 65
    blocks = -(-80 * 65 // 256) + -(-96 * 65 // 256)
    steps = 8 * len(SHAPES)
    sizes = {state: Problem(config(state=state)).optimizer for state in ("fp32", "bf16", "int8")}
    assert sizes["fp32"].state_bytes == 8 * (num + small)
    assert sizes["bf16"].state_bytes == 4 * (num + small)
    assert sizes["int8"].state_bytes == 2 * (num + 4 * blocks) + 8 * small
    assert Problem(config(weights="master")).optimizer.state_bytes == 10 * (num + small)
    saved = sizes["int8"].state_dict()
    assert sum(x.nbytes for x in saved.values()) == sizes["int8"].state_bytes + steps


# --- mistakes ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "dtype", "way_out"),
    [("fp32", torch.bfloat16, "'master' or 'stochastic'"), ("master", torch.float32, "'fp32'"), ("stochastic", torch.float16, "bfloat16")],
)
def test_types_that_do_not_fit_are_refused(weights: WeightStorage, dtype: torch.dtype, way_out: str) -> None:
    with pytest.raises(ConfigError, match=way_out):
        build(config(weights=weights), [("layers.0.weight", nn.Parameter(torch.ones(3, dtype=dtype)))])


def test_training_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to train"):
        build(config(), [("w", nn.Parameter(torch.ones(3), requires_grad=False))])


def test_muon_without_matrices_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no trained matrix is named like; there are: embed\.weight, layers\.\*\.mlp\.up\.bias"):
        Problem(OptimConfig(method=Muon(matrices=("blocks.*",))))


@pytest.mark.parametrize(
    ("saved", "loaded", "message"),
    [
        ({"method": "adamw"}, {"method": "lion"}, "lacks embed.weight.momentum .* has embed.weight.exp_avg"),
        ({"state": "int8"}, {"state": "fp32"}, "of another"),
        ({"state": "bf16"}, {"state": "fp32"}, "not .* of torch.float32"),
        ({}, {"weights": "master"}, "lacks embed.weight.low"),
    ],
)
def test_state_of_another_configuration_is_refused_and_nothing_changes(saved: dict[str, str], loaded: dict[str, str], message: str) -> None:
    first, second = Problem(config(**saved)), Problem(config(**loaded))  # type: ignore[arg-type]
    first.run(0, 1)
    before = {name: x.clone() for name, x in second.optimizer.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        second.optimizer.load_state_dict(first.optimizer.state_dict())
    assert all(torch.equal(x, before[name]) for name, x in second.optimizer.state_dict().items())


def test_state_of_another_model_is_refused() -> None:
    first = Problem(config())
    state = first.optimizer.state_dict()
    state["embed.weight.exp_avg"] = torch.zeros(81, 65)
    with pytest.raises(CheckpointError, match=r"\[81, 65\]"):
        first.optimizer.load_state_dict(state)

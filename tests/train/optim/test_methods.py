"""Each method against torch.optim where torch has it, and against first steps by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

from gemel.config.optim import SGD, Adafactor, AdamW, Lion, Method, Muon, OptimConfig
from gemel.train.optim import build
from gemel.train.optim.muon import orthogonal
from tests.tolerance import assert_close
from tests.train.optim.problem import Problem

Peer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]
LR = 3e-3


def _against(
    method: Method, peer: Peer, names: tuple[str, ...], row: str, weight_decay: float = 0.1, dtype: torch.dtype = torch.float32
) -> None:
    """Twenty steps of both from the same weights with the same gradients."""
    config = OptimConfig(method=method, weight_decay=weight_decay, exempt=())
    ours = Problem(config)
    theirs = {name: nn.Parameter(ours.parameters[name].detach().to(dtype).clone()) for name in names}
    optimizer = peer(theirs.values())
    for group in optimizer.param_groups:
        group["lr"] = LR
    for step in range(20):
        ours.set_grads(step)
        for name, parameter in theirs.items():
            grad = ours.parameters[name].grad
            assert grad is not None
            parameter.grad = grad.to(dtype).clone()
        ours.optimizer.step(LR)
        optimizer.step()
    for name in names:
        assert not torch.equal(ours.parameters[name], Problem(config).parameters[name])
        assert_close(ours.parameters[name], theirs[name], row)


ALL = ("embed.weight", "layers.0.mlp.up.weight", "layers.0.mlp.up.bias", "layers.0.mlp_norm.weight")
MATRIX = ("layers.0.mlp.up.weight",)
REST = tuple(name for name in ALL if name not in MATRIX)


def test_adamw_is_torch_s() -> None:
    method = AdamW(betas=(0.8, 0.97), eps=1e-7)
    _against(method, lambda p: torch.optim.AdamW(p, betas=(0.8, 0.97), eps=1e-7, weight_decay=0.1, fused=True), ALL, "fp32_elementwise")
    double = lambda p: torch.optim.AdamW(p, betas=(0.8, 0.97), eps=1e-7, weight_decay=0.1)  # noqa: E731
    _against(method, double, ALL, "fp32_reorder", dtype=torch.float64)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd_is_torch_s(momentum: float, nesterov: bool) -> None:
    peer: Peer = lambda p: torch.optim.SGD(p, momentum=momentum, nesterov=nesterov)  # noqa: E731
    _against(SGD(momentum=momentum, nesterov=nesterov), peer, ALL, "fp32_reorder", weight_decay=0.0, dtype=torch.float64)


def test_adafactor_is_torch_s() -> None:
    peer: Peer = lambda p: torch.optim.Adafactor(p, weight_decay=0.1, eps=(1e-15, 1e-3))  # noqa: E731
    _against(Adafactor(), peer, ALL, "fp32_reorder", dtype=torch.float64)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("scale", "theirs"), [("match_rms", "match_rms_adamw"), ("original", "original")])
def test_muon_is_torch_s(scale: str, theirs: str, nesterov: bool) -> None:
    method = Muon.parse({"scale": scale, "nesterov": nesterov, "precision": "bf16", "rest": {"betas": (0.9, 0.95)}})
    _against(method, lambda p: torch.optim.Muon(p, nesterov=nesterov, weight_decay=0.1, adjust_lr_fn=theirs), MATRIX, "exact")
    _against(method, lambda p: torch.optim.AdamW(p, betas=(0.9, 0.95), weight_decay=0.1, fused=True), REST, "fp32_elementwise")


def _step(
    method: Method, w: list[float], grads: list[list[float]], lr: float = 0.1, weight_decay: float = 0.5, **more: object
) -> list[float]:
    parameter = nn.Parameter(torch.tensor(w))
    optimizer = build(OptimConfig.parse({"method": method, "weight_decay": weight_decay, **more}), [("layers.0.weight", parameter)])
    for grad in grads:
        parameter.grad = torch.tensor(grad)
        optimizer.step(lr)
    found: list[float] = parameter.tolist()
    return found


def test_adamw_by_hand() -> None:
    """The corrected moments of a first step are g and g^2, so that it is the sign of g; decay takes 0.1 * 0.5 of w."""
    assert _step(AdamW(), [1.0, -2.0, 3.0], [[4.0, 1e-3, 0.0]]) == pytest.approx([0.95 - 0.1, -1.9 - 0.1, 2.85], rel=1e-4)


def test_lion_by_hand() -> None:
    """Momentum after the first step is 0.01 g. Second: 0.9 * 0.01 * 4 + 0.1 * g is positive for g = -0.3, and negative for -0.4."""
    assert _step(Lion(), [1.0, 1.0], [[4.0, 4.0]]) == pytest.approx([0.85, 0.85])
    assert _step(Lion(), [1.0, 1.0], [[4.0, 4.0], [-0.3, -0.4]]) == pytest.approx([0.85 * 0.95 - 0.1, 0.85 * 0.95 + 0.1])


def test_sgd_by_hand() -> None:
    assert _step(SGD(momentum=0.5), [1.0], [[2.0], [1.0]]) == pytest.approx([(0.95 - 0.2) * 0.95 - 0.1 * 2.0])


def test_adafactor_by_hand() -> None:
    """A first gradient of rank one is all that rows and columns can say, so that the update is its signs, of root mean square 1."""
    optimizer_free = _step(Adafactor(relative=False), [1.0, 1.0], [[3.0, -0.1]])
    assert optimizer_free == pytest.approx([0.95 - 0.1, 0.95 + 0.1])
    w = nn.Parameter(torch.full((2, 3), 2.0))
    w.grad = torch.tensor([[1.0], [-10.0]]) @ torch.tensor([[1.0, 2.0, -5.0]])
    build(OptimConfig(method=Adafactor(), weight_decay=0.0), [("layers.0.weight", w)]).step(0.1)
    assert_close(w, 2.0 - 0.1 * 2.0 * torch.tensor([[1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]]), "fp32_reorder")


def test_adafactor_stands_rows_without_gradient() -> None:
    """Rows of an embedding whose tokens did not occur have none, and eps keeps their root from dividing by zero."""
    w = nn.Parameter(torch.ones(3, 4))
    w.grad = torch.zeros(3, 4)
    w.grad[1] = 1.0
    build(OptimConfig(method=Adafactor(relative=False), weight_decay=0.0), [("embed.weight", w)]).step(0.1)
    assert torch.equal(w[[0, 2]], torch.ones(2, 4)) and bool((w[1] < 1).all())


def test_adafactor_limits_the_rate_when_relative() -> None:
    """At the first step the rate is at most 1."""
    assert _step(Adafactor(), [1.0], [[1.0]], lr=5.0, weight_decay=0.0) == pytest.approx([0.0])
    assert _step(Adafactor(relative=False), [1.0], [[1.0]], lr=5.0, weight_decay=0.0) == pytest.approx([-4.0])


@pytest.mark.parametrize("shape", [(48, 48), (30, 70), (70, 30)])
def test_muon_s_direction_has_singular_values_near_one(shape: tuple[int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.logspace(-2, 2, shape[1]))
    direction = orthogonal(x, 10, 1e-7, torch.float32)
    u, _, v = torch.linalg.svd(x.double(), full_matrices=False)
    values = torch.linalg.svdvals(direction.double())
    assert values.min().item() > 0.6 and values.max().item() < 1.3
    assert torch.trace(u.T @ direction.double() @ v.T).item() / min(shape) > 0.6  # along U V^T, not only orthogonal


def test_muon_treats_fused_parts_as_matrices_of_their_own() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(rows, 24, generator=generator) for rows in (32, 8, 8)]
    grads = [torch.randn(part.shape, generator=generator) for part in parts]
    config = OptimConfig(method=Muon())
    alone = [nn.Parameter(part.clone()) for part in parts]
    fused = nn.Parameter(torch.cat(parts))
    optimizers = (
        build(config, [(f"layers.{i}.weight", w) for i, w in enumerate(alone)]),
        build(config, [("layers.0.attn.qkv.weight", fused)], {"layers.0.attn.qkv.weight": (32, 8, 8)}),
    )
    for w, grad in zip((*alone, fused), (*grads, torch.cat(grads)), strict=True):
        w.grad = grad
    for optimizer in optimizers:
        optimizer.step(1e-2)
    assert_close(fused, torch.cat([w.detach() for w in alone]), "exact")


def test_l1_leaves_exact_zeros_and_touches_only_what_it_should() -> None:
    """Weights within lr * l1 = 0.05 of zero become zero, others come so much nearer."""
    w = _step(SGD(momentum=0.0), [0.04, -0.04, 1.0, -1.0], [[0.0] * 4], weight_decay=0.0, l1=0.5)
    assert w[:2] == [0.0, 0.0] and w[2:] == pytest.approx([0.95, -0.95])

"""The kernels of training as other instruction sets have them, against float64; `tests/ops/test_train.py` tests this processor's."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from gemel.ops import activation, head, norm, rotary, train
from gemel.ops.cpu import training
from tests.ops.cpu.conftest import OpenKernels
from tests.ops.test_train import angles, assert_right, randn
from tests.tolerance import assert_close

SOURCES = ("adamw.cpp", "elementwise.cpp", "gemm.cpp", "head_loss.cpp", "norm.cpp", "packed_attention.cpp", "threads.cpp", "workshop.cpp")
STARTS = (0, 1, 98, 107)


@pytest.fixture(scope="module", params=["generic", "avx512"])
def kernels(request: pytest.FixtureRequest, open_kernels: OpenKernels) -> training.Kernels:
    return training.Kernels(open_kernels(request.param, SOURCES, ()), 2)


@pytest.fixture(autouse=True)
def _variant(kernels: training.Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "kernels", lambda: kernels)
    monkeypatch.setattr(train, "products_are_native", lambda _: True)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 5, 7), (100, 67, 97), (99, 1000, 20)])
def test_linear(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    num_tokens, width, out = sizes
    assert_right(train.linear, F.linear, [randn(num_tokens, width), randn(out, width, seed=1) / math.sqrt(width)], dtype)


@pytest.mark.parametrize("window", [None, 37])
def test_packed_attention(window: int | None, dtype: torch.dtype) -> None:
    inputs = [randn(STARTS[-1], heads, 20, seed=heads) for heads in (4, 2, 2)]
    plain = train.packed_attention_reference
    assert_right(lambda *qkv: train.packed_attention(*qkv, STARTS, window), lambda *qkv: plain(*qkv, STARTS, window), inputs, dtype)


def test_head_cross_entropy(dtype: torch.dtype) -> None:
    hidden, weight = randn(70, 33), randn(205, 33, seed=1) / 4
    targets, weights = torch.arange(70) * 3 % 205, torch.linspace(0.0, 1.0, 70)
    inputs = [x.to(dtype) for x in (hidden, weight)]
    for leaf in inputs:
        leaf.requires_grad_()
    loss, _ = train.head_cross_entropy(*inputs, targets, weights, 1e-3, 0.1)
    want = [leaf.detach().double().requires_grad_() for leaf in inputs]
    wanted, _ = head.cross_entropy(*want, targets, weights.double(), 1e-3, 0.1)
    for one in (loss, wanted):
        one.backward()
    row = "fp32_reorder" if dtype == torch.float32 else "bf16_reorder"
    for ours, theirs in ((loss, wanted), *((leaf.grad, other.grad) for leaf, other in zip(inputs, want, strict=True))):
        assert_close(ours, theirs, row)


def test_what_goes_number_by_number(dtype: torch.dtype) -> None:
    cos, sin = (x.to(dtype) for x in angles(35, 20))
    wide = cos.double(), sin.double()
    assert_right(lambda x: train.rope(x, cos, sin), lambda x: rotary.rope(x, *wide), (randn(35, 3, 20),), dtype)
    assert_right(train.swiglu, activation.swiglu, (3 * randn(9, 2 * 37),), dtype)
    inputs = (randn(7, 37), 1 + randn(37, seed=1) / 4)
    assert_right(lambda x, w: train.rms_norm(x, w, 1e-5), lambda x, w: norm.rms_norm(x, w, 1e-5), inputs, dtype)

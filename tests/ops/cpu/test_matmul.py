"""Products against float64, and their law: a row's result is the same bits whatever is computed beside it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gemel.ops.cpu import native
from tests.ops.cpu.conftest import OpenKernels
from tests.ops.cpu.products import FULL, LOW, NAMES, ROUNDED, SOURCES, Array, Kernels, Kind, Product
from tests.tolerance import assert_close


@pytest.fixture(scope="module", params=native.VARIANTS)
def kernels(request: pytest.FixtureRequest, open_kernels: OpenKernels) -> Kernels:
    return Kernels(request.param, open_kernels(request.param, SOURCES, NAMES))


def rows(count: int, k: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal((count, k), np.float32)


def expected(product: Product, x: Array, epilogue: int = native.STORE, y: Array | None = None) -> torch.Tensor:
    out = torch.from_numpy(product.as_given(x) @ product.dense.astype(np.float64).T)
    if product.bias is not None:
        out += torch.from_numpy(product.bias).double()
    if epilogue == native.ADD:
        assert y is not None
        return out + torch.from_numpy(y).double()
    if epilogue == native.SWIGLU:
        gate, up = out.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up
    return torch.nn.functional.gelu(out, approximate="tanh") if epilogue == native.GELU else out


@pytest.mark.parametrize("kind", FULL + LOW + ROUNDED, ids=str)
@pytest.mark.parametrize("t", [1, 3, 21])
def test_product(kernels: Kernels, kind: Kind, t: int) -> None:
    product, x = Product(kernels, kind, 200, 384), rows(t, 384)
    assert_close(torch.from_numpy(product(x)), expected(product, x), "fp32_reorder")


@pytest.mark.parametrize("kind", [*FULL, Kind(native.I8), Kind(native.I8, quantize=True), Kind(native.I4, 32, quantize=True)], ids=str)
@pytest.mark.parametrize(
    ("epilogue", "n", "paired"),
    [
        *((native.SWIGLU, n, True) for n in (70, 6)),
        *(
            (epilogue, n, paired)
            for epilogue in (native.STORE, native.ADD, native.GELU)
            for n, paired in ((70, False), (70, True), (1, False))
        ),
    ],
)
def test_epilogues_and_widths_that_fill_no_panel(kernels: Kernels, kind: Kind, epilogue: int, n: int, paired: bool) -> None:
    product, x = Product(kernels, kind, n, 64, paired=paired, bias=True), rows(4, 64)
    y = rows(4, n, seed=2) if epilogue == native.ADD else None
    assert_close(torch.from_numpy(product(x, epilogue, y=y)), expected(product, x, epilogue, y), "fp32_reorder")


@pytest.mark.parametrize("kind", [Kind(native.F32), Kind(native.BF16)], ids=str)
def test_any_k_that_the_format_allows(kernels: Kernels, kind: Kind) -> None:
    for k in (2, 34, 321 if kind.format == native.F32 else 322):
        product, x = Product(kernels, kind, 40, k), rows(9, k)
        assert_close(torch.from_numpy(product(x)), expected(product, x), "fp32_reorder")


@pytest.mark.parametrize("kind", FULL + LOW + ROUNDED, ids=str)
def test_a_row_does_not_depend_on_the_others(kernels: Kernels, kind: Kind) -> None:
    product, x = Product(kernels, kind, 136, 384, paired=True, bias=True), rows(64, 384)
    alone = np.concatenate([product(row[None], native.SWIGLU) for row in x])
    for t in (*range(1, 21), 64):
        assert np.array_equal(product(x[:t], native.SWIGLU), alone[:t]), t
    assert np.array_equal(product(x[5:12], native.SWIGLU), alone[5:12])


@pytest.mark.parametrize("kind", FULL + LOW[:3] + ROUNDED[:4], ids=str)
def test_neither_stretches_nor_blocks_nor_threads_show(kernels: Kernels, kind: Kind) -> None:
    """k longer than what a panel keeps in the first-level cache, more rows than a block, and pieces taken by several threads."""
    product, x = Product(kernels, kind, 40, 2176 if kind.format == native.I4 else 1184), rows(101, 2176)
    x = np.ascontiguousarray(x[:, : product.k])
    together = product(x)
    assert_close(torch.from_numpy(together), expected(product, x), "fp32_reorder")
    for row in (0, 50, 96, 100):
        assert np.array_equal(product(x[row : row + 1])[0], together[row])
    assert np.array_equal(product(x, threads=3), together)


@pytest.mark.parametrize("kind", ROUNDED, ids=str)
def test_the_largest_numbers_stay_exact(kernels: Kernels, kind: Kind) -> None:
    """Intermediate sums of 16 bits just hold the extremes; one more would wrap around or saturate."""
    n, k = 40, 256
    product = Product(kernels, kind, n, k)
    ones = np.ones((n, k // kind.group if kind.group else 1), np.float32)
    for extreme in (127, -127) if kind.format == native.I8 else (15, 0):
        values = np.full((n, k), extreme, np.int8) if kind.format == native.I8 else np.full((n, k // 2), extreme * 17, np.uint8)
        product.pack(values, ones, np.zeros_like(ones))
        weight = extreme if kind.format == native.I8 or kind.minima else extreme - 8
        for sign in (1, -1):
            assert np.array_equal(product(np.full((5, k), 127 * sign, np.float32)), np.full((5, n), 127 * sign * weight * k, np.float32))


@pytest.mark.parametrize("kind", [Kind(native.I8, quantize=True), Kind(native.I4, 32, quantize=True)], ids=str)
def test_activations_round_to_nearest_even(kernels: Kernels, kind: Kind) -> None:
    product = Product(kernels, kind, 8, 32)
    values = np.full((8, 32), 1, np.int8) if kind.format == native.I8 else np.full((8, 16), 0x99, np.uint8)
    one = np.ones((8, 1), np.float32)
    product.pack(values, one, one)  # every weight is one: the result is the sum of the rounded activations
    x = np.zeros((4, 32), np.float32)
    x[0, :5] = 127, 0.5, 1.5, 2.5, -2.5  # 127 + 0 + 2 + 2 - 2
    x[1, :3] = 127, 0.5001, -1.4999  # 127 + 1 - 1
    x[3, :2] = 1e-38, -1e-39  # vanishes rather than overflows
    assert np.array_equal(product(x), np.array([[129], [127], [0], [0]], np.float32).repeat(8, 1))

"""Packing loses nothing but what the format cannot hold, and wastes nothing but the last panel's empty columns."""

from __future__ import annotations

import numpy as np
import pytest

from gemel.ops.cpu import native
from tests.ops.cpu.conftest import OpenKernels
from tests.ops.cpu.products import FULL, LOW, NAMES, SOURCES, Kernels, Kind, Product


@pytest.fixture(scope="module", params=native.VARIANTS)
def kernels(request: pytest.FixtureRequest, open_kernels: OpenKernels) -> Kernels:
    return Kernels(request.param, open_kernels(request.param, SOURCES, NAMES))


@pytest.mark.parametrize("kind", FULL + LOW, ids=str)
@pytest.mark.parametrize(("n", "paired"), [(64, False), (70, False), (1, False), (64, True), (70, True)])
def test_unpacking_gives_back_what_was_packed(kernels: Kernels, kind: Kind, n: int, paired: bool) -> None:
    product = Product(kernels, kind, n, 256, paired=paired)
    assert np.array_equal(product.unpacked(), product.dense)


@pytest.mark.parametrize(
    ("kind", "bits_per_weight"),
    [
        (Kind(native.F32), 32),
        (Kind(native.BF16), 16),
        (Kind(native.I8), 8 + 32 / 1024),
        (Kind(native.I8, 32), 8.5),
        (Kind(native.I4, 32), 4.5),
        (Kind(native.I4, 64, True), 4.5),
        (Kind(native.I4, 128), 4.125),
    ],
    ids=str,
)
def test_size(kernels: Kernels, kind: Kind, bits_per_weight: float) -> None:
    product = Product(kernels, kind, 64, 1024)
    needed = 64 * 1024 * bits_per_weight / 8
    assert needed <= product.packed.size <= needed + 64 * 64 / 8  # panels of at least 8 columns begin at multiples of 64 bytes


def test_scales_of_groups_are_rounded_to_fp16(kernels: Kernels) -> None:
    # An ordinary one, halfway to even both ways, the smallest subnormal, half of it (ties to zero), a carry into the next exponent.
    scales = np.array([0.1, 1 + 2**-11, 1 + 3 * 2**-11, 2**-24, 2**-25, 2 - 2**-12, 3e-6, 60000], np.float32)[:, None]
    minima = -scales
    product = Product(kernels, Kind(native.I4, 32, minima=True), 8, 32)
    product.pack(np.full((8, 16), 0x33, np.uint8), scales, minima)
    rounded = scales.astype(np.float16).astype(np.float32)
    assert np.array_equal(product.unpacked(), np.broadcast_to(3 * rounded - rounded, (8, 32)))

"""Bytes and arithmetic of leaves, whoever made them."""

import pytest
import torch
from torch import nn

from gemel.bench import storage
from gemel.bench.roofline import uniform
from gemel.model.leaves.linear import Linear
from gemel.model.leaves.prepacked import prepack
from gemel.ops.cpu import native
from tests import tiny


class Packed(nn.Module):
    """As the native leaf: numbers in one hidden tensor, a description beside it."""

    def __init__(self, format_, *, quantize=False):
        super().__init__()
        self.weight = native.Weight(format=format_, n=8, k=32, quantize=quantize)
        self._packed = torch.zeros(300, dtype=torch.uint8)
        self.register_buffer("bias", torch.zeros(8))


class LowBit(nn.Module):
    """As the reference leaf of few bits."""

    def __init__(self):
        super().__init__()
        self.register_buffer("q", torch.zeros(8, 32, dtype=torch.int8))
        self.register_buffer("scale", torch.zeros(8))


@pytest.mark.parametrize(
    ("leaf", "num_bytes", "arithmetic"),
    [
        (Linear(32, 8, bias=True), 4 * 256, "float32"),
        (Linear(32, 8).bfloat16(), 2 * 256, "bfloat16"),
        (LowBit(), 256 + 8 * 4, "float32"),
        (Packed(native.F32), 300, "float32"),
        (Packed(native.BF16), 300, "bfloat16"),
        (Packed(native.I4, quantize=True), 300, "int8"),
        (Packed(native.I8), 300, "float32"),
    ],
)
def test_bytes_and_arithmetic_of_a_leaf(leaf, num_bytes, arithmetic):
    assert storage.leaf_bytes(leaf) == num_bytes
    assert storage.arithmetic(leaf) == arithmetic


@pytest.mark.parametrize("kind", ["gqa", "mqa", "learned"])
def test_a_plain_model_is_stored_as_its_configuration_says(kind):
    loaded = tiny.build(kind)
    assert storage.of(loaded.model, loaded.config, "float32") == uniform(loaded.config, "float32", 4, "float32")


def test_prepacking_moves_the_bytes_and_keeps_their_number():
    loaded = tiny.build("gqa")
    before = storage.of(loaded.model, loaded.config, "float32")
    assert prepack(loaded.model) > 0
    assert storage.of(loaded.model, loaded.config, "float32") == before


@pytest.mark.parametrize(("kv", "num_bytes"), [("float32", 4), ("bfloat16", 2), ("int8", 1 + 4 / 8)])
def test_keys_and_values(kv, num_bytes):
    loaded = tiny.build("gqa")
    assert storage.of(loaded.model, loaded.config, kv).kv_bytes_per_token == loaded.config.kv_elements_per_token * num_bytes

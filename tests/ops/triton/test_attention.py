from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gemel import ops
from gemel.ops import triton
from gemel.ops.train import packed_attention_reference
from tests.ops.triton.gradients import assert_same

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of numbers beyond documents that nobody keeps
TILES = {"forward": (32, 16), "backward": (16, 32)}  # queries and keys: documents of a few dozen tokens then have several tiles of each


@pytest.fixture(autouse=True)
def _small_tiles(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter is slow; the device takes the tiles that it is meant to."""
    if device.type == "cpu":
        from gemel.ops.triton import attention

        def tile(width: int, itemsize: int, *, back: bool) -> attention.Tile:
            return attention.Tile(*TILES["backward" if back else "forward"], 4, 1)

        monkeypatch.setattr(attention, "tile_for", tile)


def heads(num_tokens: int, num_heads: int, num_kv_heads: int, width: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(num_tokens, n, width, generator=generator).to(device, dtype) for n in (num_heads, num_kv_heads, num_kv_heads)]


@pytest.mark.parametrize(
    ("starts", "num_heads", "num_kv_heads", "width"),
    [
        ((0, 5, 6, 49), 2, 2, 12),
        ((0, 32, 75), 4, 2, 16),
        ((0, 40), 2, 1, 80),
    ],
    ids=str,
)
def test_documents(starts: tuple[int, ...], num_heads: int, num_kv_heads: int, width: int, device: torch.device) -> None:
    qkv = heads(starts[-1], num_heads, num_kv_heads, width, device, torch.float32)
    assert_same(triton.packed_attention, packed_attention_reference, qkv, "fp32_reorder", starts)


@pytest.mark.parametrize("window", [2, 16, 40, 100])
def test_windows(window: int, device: torch.device) -> None:
    """Narrower than a tile, a whole one, several, and wider than a document."""
    qkv = heads(97, 2, 1, 16, device, torch.float32)
    assert_same(triton.packed_attention, packed_attention_reference, qkv, "fp32_reorder", (0, 11, 97), window)


@pytest.mark.parametrize("window", [None, 20])
def test_slopes(window: int | None, device: torch.device) -> None:
    qkv = heads(60, 3, 1, 16, device, torch.float32)
    assert_same(triton.packed_attention, packed_attention_reference, qkv, "fp32_reorder", (0, 11, 60), window, ops.alibi_slopes(3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_types(dtype: torch.dtype, device: torch.device) -> None:
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("the interpreter knows no products of bf16")
    qkv = heads(70, 4, 2, 16, device, dtype)
    assert_same(triton.packed_attention, packed_attention_reference, qkv, "bf16_reorder", (0, 11, 70), 40)


def test_a_document_is_alone(device: torch.device) -> None:
    """Bitwise, outputs and gradients, whatever lies before and behind, even if that is not finite."""
    q, k, v = heads(101, 2, 1, 16, device, torch.float32)
    for tensor in (q, k, v):
        tensor[:30], tensor[81:] = torch.nan, torch.inf
    results = []
    for rows, starts in ((slice(0, 101), (0, 30, 81, 101)), (slice(30, 81), (0, 51))):
        parts = [tensor[rows].requires_grad_() for tensor in (q, k, v)]
        out = triton.packed_attention(*parts, starts)
        results.append([out, *torch.autograd.grad(out, parts, torch.ones_like(out))])
    for packed, alone in zip(*results, strict=True):
        assert torch.equal(packed[30:81] if len(packed) == 101 else packed, alone)


def test_parts_of_a_fused_product(device: torch.device) -> None:
    fused_TMH = torch.randn(40, 8, 16, generator=torch.Generator().manual_seed(0)).to(device)
    assert_same(triton.packed_attention, packed_attention_reference, fused_TMH.split((4, 2, 2), 1), "fp32_reorder", (0, 40))


def test_heads_too_wide_for_tiles_are_left_to_torch(device: torch.device) -> None:
    qkv = heads(9, 1, 1, 288, device, torch.float32)
    assert_same(triton.packed_attention, packed_attention_reference, qkv, "fp32_reorder", (0, 4, 9))

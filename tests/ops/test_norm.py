import pytest
import torch

from gemel import ops
from tests.tolerance import assert_close


@pytest.mark.parametrize("num_tokens", [1, 7, 64])
def test_rms_norm_is_the_formula(num_tokens: int) -> None:
    x, weight = torch.randn(num_tokens, 96) * 3, torch.randn(96)
    x64 = x.double()
    want = x64 / (x64.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert_close(ops.rms_norm(x, weight, 1e-5), want, "fp32_reorder")


def test_rms_norm_uses_eps() -> None:
    tiny = torch.full((1, 4), 1e-4)
    assert_close(ops.rms_norm(tiny, torch.ones(4), 3e-8), torch.full((1, 4), 0.5), "fp32_reorder")


@pytest.mark.parametrize("num_tokens", [1, 7, 64])
def test_layer_norm_is_the_formula(num_tokens: int) -> None:
    x, weight, bias = torch.randn(num_tokens, 96) * 3 + 1, torch.randn(96), torch.randn(96)
    x64 = x.double()
    variance = x64.var(-1, unbiased=False, keepdim=True)
    want = (x64 - x64.mean(-1, keepdim=True)) / (variance + 1e-5).sqrt() * weight.double() + bias.double()
    assert_close(ops.layer_norm(x, weight, bias, 1e-5), want, "fp32_reorder")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((300, 96), (96,), (96,)))
    rms, layer = ops.rms_norm(x, weight, 1e-5), ops.layer_norm(x, weight, bias, 1e-5)
    for a, b in ((0, 1), (5, 6), (3, 20), (100, 300)):
        assert torch.equal(ops.rms_norm(x[a:b], weight, 1e-5), rms[a:b])
        assert torch.equal(ops.layer_norm(x[a:b], weight, bias, 1e-5), layer[a:b])

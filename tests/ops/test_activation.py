import math

import torch

from gemel import ops
from tests.tolerance import assert_close


def test_swiglu_gates_the_second_half_by_the_first() -> None:
    x = torch.randn(5, 14)
    gate, up = x.double().chunk(2, -1)
    assert_close(ops.swiglu(x), gate / (1 + torch.exp(-gate)) * up, "fp32_reorder")


def test_swiglu_leaves_its_input_alone_and_has_the_right_gradient() -> None:
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    before = x.detach().clone()
    assert torch.autograd.gradcheck(ops.swiglu, (x,))
    assert torch.equal(x, before)


def test_gelu_is_the_tanh_form() -> None:
    x = torch.linspace(-6, 6, 101)
    x64 = x.double()
    want = 0.5 * x64 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x64 + 0.044715 * x64**3)))
    assert_close(ops.gelu(x), want, "fp32_reorder")


def test_a_row_does_not_depend_on_the_others_at_real_widths() -> None:
    x = torch.randn(84, 2 * 1536)
    gated, smooth = ops.swiglu(x), ops.gelu(x)
    for a, b in ((0, 1), (1, 14), (14, 56), (83, 84)):
        assert torch.equal(ops.swiglu(x[a:b]), gated[a:b])
        assert torch.equal(ops.gelu(x[a:b]), smooth[a:b])

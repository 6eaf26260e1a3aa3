import pytest
import torch

from gemel import ops
from gemel.config.model import Alibi
from gemel.model.attend import PackedAttend
from tests.model.test_model import SMALL
from tests.tolerance import assert_close


def _qkv(num: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(num, 4, 8), torch.randn(num, 2, 8), torch.randn(num, 2, 8)


@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("windows", [(), (3, None)])
def test_each_document_has_its_own_attention(alibi: bool, windows: tuple[int | None, ...]) -> None:
    config = SMALL.model_copy(update={"windows": windows} | ({"positions": Alibi()} if alibi else {}))
    q, k, v = _qkv(12)
    attend = PackedAttend(config, (0, 5, 6, 12))
    slopes = ops.alibi_slopes(4) if alibi else None
    for layer in range(2):
        out = attend(layer, q, k, v)
        for a, b in ((0, 5), (5, 6), (6, 12)):
            alone = PackedAttend(config, (0, b - a))(layer, q[a:b], k[a:b], v[a:b])
            assert torch.equal(out[a:b], alone)
            assert_close(alone, ops.attention(q[a:b], k[a:b], v[a:b], window=config.window(layer), slopes_N=slopes), "fp32_reorder")


def test_bounds_that_do_not_fit_are_our_bug() -> None:
    for starts in ((1, 5), (0, 5, 5), (0, 5, 3)):
        with pytest.raises(AssertionError, match="not document bounds"):
            PackedAttend(SMALL, starts)
    with pytest.raises(AssertionError, match="4 tokens given"):
        PackedAttend(SMALL, (0, 5))(0, *_qkv(4))

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemel import ops
from tests.tolerance import assert_close


def _reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, slopes: torch.Tensor | None) -> torch.Tensor:
    """Query by query, head by head, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    group, first = q.shape[1] // k.shape[1], len(k) - len(q)
    out = torch.zeros_like(q)
    for s in range(len(q)):
        oldest = 0 if window is None else max(0, first + s - window + 1)
        for n in range(q.shape[1]):
            keys, values = k[oldest : first + s + 1, n // group], v[oldest : first + s + 1, n // group]
            scores = keys @ q[s, n] / math.sqrt(q.shape[-1])
            if slopes is not None:
                scores -= slopes[n].double() * torch.arange(len(keys) - 1, -1, -1)
            out[s, n] = scores.softmax(0) @ values
    return out


@settings(max_examples=60, deadline=None)
@given(
    num_queries=st.integers(1, 9),
    earlier=st.integers(0, 12),
    group=st.sampled_from([1, 2, 3]),
    num_kv_heads=st.sampled_from([1, 2]),
    window=st.sampled_from([None, 1, 4, 100]),
    alibi=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_attention(num_queries: int, earlier: int, group: int, num_kv_heads: int, window: int | None, alibi: bool, seed: int) -> None:
    torch.manual_seed(seed)
    q = torch.randn(num_queries, group * num_kv_heads, 8)
    k, v = torch.randn(2, num_queries + earlier, num_kv_heads, 8)
    slopes = ops.alibi_slopes(group * num_kv_heads) if alibi else None
    want = _reference(q, k, v, window, slopes)
    got = ops.attention(q, k, v, window=window, slopes_N=slopes)
    assert_close(got, want, "fp32_reorder")
    bias = ops.causal_bias(num_queries, num_queries + earlier, q, window, slopes)
    assert torch.equal(ops.attention(q, k, v, window=window, bias=bias), got)


def test_heads_may_be_views_of_a_fused_product() -> None:
    qkv = torch.randn(6, 8, 8)
    q, k, v = qkv.split((4, 2, 2), 1)
    for n in (1, 6):
        assert_close(ops.attention(q[-n:], k, v), _reference(q[-n:], k, v, None, None), "fp32_reorder")


def test_no_bias_where_the_shape_says_it() -> None:
    like = torch.zeros(1)
    assert ops.causal_bias(5, 5, like) is None
    assert ops.causal_bias(1, 5, like) is None
    assert ops.causal_bias(1, 50, like, window=8) is None
    assert ops.causal_bias(5, 5, like, window=5) is None
    assert ops.causal_bias(5, 6, like) is not None
    assert ops.causal_bias(5, 5, like, window=4) is not None


def test_bias_reaches_only_the_keys_in_the_window() -> None:
    bias = ops.causal_bias(2, 10, torch.zeros(1), window=3)
    assert bias is not None
    assert bias.tolist() == [[0, 0, 0, -math.inf], [-math.inf, 0, 0, 0]]


@pytest.mark.parametrize(
    ("num_heads", "exponents"),
    [(1, [8]), (2, [4, 8]), (8, [1, 2, 3, 4, 5, 6, 7, 8]), (6, [2, 4, 6, 8, 1, 3]), (12, [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5])],
)
def test_alibi_slopes(num_heads: int, exponents: list[float]) -> None:
    assert_close(ops.alibi_slopes(num_heads), torch.tensor([2.0**-e for e in exponents]), "fp32_reorder")


def test_attention_is_differentiable() -> None:
    q, k, v = (torch.randn(4, n, 4, dtype=torch.float64, requires_grad=True) for n in (2, 1, 1))
    assert torch.autograd.gradcheck(ops.attention, (q, k, v))
    bias = ops.causal_bias(4, 4, q, window=2)
    assert torch.autograd.gradcheck(lambda *args: ops.attention(*args, window=2, bias=bias), (q, k, v))

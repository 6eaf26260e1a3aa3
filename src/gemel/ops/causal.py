"""Causal attention of the last S of C positions, and the two things that may bend its scores: a window and ALiBi.

S queries, C keys, N query heads, K key/value heads, G = N / K query heads per key head, H head width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def alibi_slopes(num_heads: int) -> Tensor:
    """The penalty per position of distance, [N] in fp32 (Press et al. 2021, arXiv 2108.12409).

    A geometric sequence from 2**(-8/n) for a power of two n; heads beyond the largest such n take every other slope of the one for 2n.
    """
    n = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (i + 1) / n) for i in range(n)]
    slopes += [2 ** (-4 * (2 * i + 1) / n) for i in range(num_heads - n)]
    return torch.tensor(slopes, dtype=torch.float32, device="cpu")


def causal_bias(num_queries: int, num_keys: int, like: Tensor, window: int | None = None, slopes_N: Tensor | None = None) -> Tensor | None:
    """What is added to the scores: -inf where a key is in the future or out of the window, ALiBi's penalty elsewhere.

    Returns [S, C'] or, with slopes, [N, S, C'], in the dtype and on the device of `like`; C' is the number of keys that any query sees.
    Returns None where the shape alone says it (one query, or all of them, and no window in reach): the common cases need no such tensor.
    It depends on no data, so a caller with many layers builds it once.
    """
    num_keys = visible_keys(num_queries, num_keys, window)
    windowed = window is not None and num_queries > 1 and num_keys > window
    if slopes_N is None and not windowed and num_queries in (1, num_keys):
        return None
    queries_S = torch.arange(num_keys - num_queries, num_keys, device=like.device)
    distance_SC = queries_S[:, None] - torch.arange(num_keys, device=like.device)
    hidden_SC = distance_SC < 0
    if window is not None:
        hidden_SC |= distance_SC >= window
    if slopes_N is None:
        bias = torch.zeros(num_queries, num_keys, device=like.device)
    else:
        bias = distance_SC * -slopes_N.to(like.device)[:, None, None]
    return bias.masked_fill_(hidden_SC, -math.inf).to(like.dtype)


def visible_keys(num_queries: int, num_keys: int, window: int | None) -> int:
    """How many of the last keys are seen by any of the last `num_queries` queries."""
    return num_keys if window is None else min(num_keys, num_queries - 1 + window)


def attention(
    q_SNH: Tensor, k_CKH: Tensor, v_CKH: Tensor, *, window: int | None = None, slopes_N: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """softmax(q k / sqrt(H) + bias) v, where query s is at position C - S + s. Returns [S, N, H].

    `bias` is `causal_bias(S, C, q, window, slopes_N)` if the caller has it already. For a single query the heads of a group are laid along
    the query axis: torch's own grouped heads copy keys and values G times, which would be most of the work. Longer runs hide the copy.
    """
    num_queries, num_heads, head_width = q_SNH.shape
    num_kv_heads = k_CKH.shape[1]
    num_visible = visible_keys(num_queries, len(k_CKH), window)
    if num_visible < len(k_CKH):
        k_CKH, v_CKH = k_CKH[-num_visible:], v_CKH[-num_visible:]
    if bias is None:
        bias = causal_bias(num_queries, num_visible, q_SNH, window, slopes_N)
    k_1KCH, v_1KCH = k_CKH.transpose(0, 1)[None], v_CKH.transpose(0, 1)[None]
    if num_queries == 1:
        q_1KGH = q_SNH.reshape(1, num_kv_heads, -1, head_width)
        bias = None if bias is None else bias.reshape(1, num_kv_heads, -1, num_visible)
        return F.scaled_dot_product_attention(q_1KGH, k_1KCH, v_1KCH, attn_mask=bias).reshape(1, num_heads, head_width)
    q_1NSH = q_SNH.transpose(0, 1)[None]
    grouped = num_heads != num_kv_heads
    out_1NSH = F.scaled_dot_product_attention(
        q_1NSH,
        k_1KCH,
        v_1KCH,
        attn_mask=None if bias is None else bias.expand(1, num_heads, -1, -1),
        is_causal=bias is None,
        enable_gqa=grouped,
    )
    return out_1NSH[0].transpose(0, 1)

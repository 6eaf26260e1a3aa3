"""What happens between the two matrices of a feed-forward. T tokens, F feed-forward width.

On CPU torch computes exponentials 16 at a time, and the last few of a thread's share by another routine that may differ in the last bit. A
row's result is bitwise independent of the other rows as long as shares end on multiples of 16, as they do for widths that are multiples of
32 on the usual numbers of threads.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up_T2F: Tensor) -> Tensor:
    """silu(gate) * up over [T, 2F], gate first (Shazeer 2020, arXiv 2002.05202). Returns [T, F].

    The product overwrites silu's result: an allocation can cost as much as the arithmetic. Autograd notices and keeps what it needs.
    """
    gate_TF, up_TF = gate_up_T2F.chunk(2, dim=-1)
    return F.silu(gate_TF).mul_(up_TF)


def gelu(x_TF: Tensor) -> Tensor:
    """The tanh approximation of GELU (Hendrycks and Gimpel 2016, arXiv 1606.08415), which GPT-2 and BLOOM were trained with."""
    return F.gelu(x_TF, approximate="tanh")

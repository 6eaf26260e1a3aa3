"""What happens between the two matrices of a feed-forward. T tokens, F feed-forward width."""

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

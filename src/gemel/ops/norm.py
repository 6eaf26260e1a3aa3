"""Norms over the last axis. Every row is computed alone, so a token's result does not depend on what else is in the call."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Root mean square norm: x / sqrt(mean(x**2) + eps) * weight (Zhang and Sennrich 2019, arXiv 1910.07467).

    Narrow types are summed in fp32. On CPU torch composes it of small calls, but hand-written forms (rsqrt of the mean square, division
    by hypot of the vector norm) measured the same within noise from 1 to 512 rows of 576, so the one call stays.
    """
    return F.rms_norm(x_TD, weight_D.shape, weight_D, eps)


def layer_norm(x_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    """Layer norm: (x - mean) / sqrt(variance + eps) * weight + bias (Ba et al. 2016, arXiv 1607.06450)."""
    return F.layer_norm(x_TD, weight_D.shape, weight_D, bias_D, eps)

"""The arithmetic of a decoder. Each operation exists as plain torch, the truth that every faster version is measured against.

Those of `train` choose a faster version by themselves where gradients are wanted and one fits; the others are the plain ones.
"""

from gemel.ops.activation import gelu
from gemel.ops.causal import alibi_slopes, attention, causal_bias
from gemel.ops.norm import layer_norm
from gemel.ops.rotary import rope_frequencies, rope_table
from gemel.ops.train import head_cross_entropy, linear, packed_attention, rms_norm, rope, swiglu

__all__ = [
    "alibi_slopes",
    "attention",
    "causal_bias",
    "gelu",
    "head_cross_entropy",
    "layer_norm",
    "linear",
    "packed_attention",
    "rms_norm",
    "rope",
    "rope_frequencies",
    "rope_table",
    "swiglu",
]

"""The arithmetic of a decoder, each operation as plain torch: the truth that every faster version is measured against."""

from gemel.ops.activation import gelu, swiglu
from gemel.ops.causal import alibi_slopes, attention, causal_bias
from gemel.ops.norm import layer_norm, rms_norm
from gemel.ops.rotary import rope, rope_frequencies, rope_table

__all__ = ["alibi_slopes", "attention", "causal_bias", "gelu", "layer_norm", "rms_norm", "rope", "rope_frequencies", "rope_table", "swiglu"]

"""GGUF files (the format of llama.cpp).

Matrices of the types in `gguf_blocks` stay packed; those of the other types are dequantized on the way in.

Metadata is translated into the Hugging Face spelling and goes through the same family as a directory would, so the same things are refused;
tensor names are translated into the family's own table. Two things are particular to files of architecture `llama`: the rows of queries and
keys are permuted, because llama.cpp rotates neighbours where everybody else rotates halves; and Llama-3 scaling is stored as a tensor of
divisors instead of the four numbers it came from.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES
from torch import Tensor

from gemel import ops
from gemel.config.errors import CheckpointError, UnsupportedError
from gemel.config.model import Llama3Scaling, ModelConfig, Rope
from gemel.model.checkpoint import Checkpoint
from gemel.model.families import family
from gemel.model.families.fields import Fields
from gemel.model.families.table import Stacked, Weight
from gemel.model.gguf_blocks import PACKED
from gemel.model.gguf_header import Span, read_header
from gemel.model.leaves.lowbit import LowBit
from gemel.model.stored import Stored

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DEQUANTIZED = ("Q5_0", "Q5_1", "Q5_K", "Q6_K")
_FACTORS = "rope_freqs.weight"
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@dataclass(frozen=True)
class RotatesNeighbours:
    """Queries, keys and values with `rows` each, the first two stored so that rotated pairs lie next to each other in every head."""

    by_rows: ClassVar[bool] = True
    rows: tuple[int, int, int]
    head_width: int

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Pairs to halves, then one below the other."""
        q, k, v = parts
        return torch.cat((self._regroup(q, -1, 2), self._regroup(k, -1, 2), v))

    def split(self, whole: Tensor) -> list[Tensor]:
        """Cut, then halves to pairs."""
        q, k, v = torch.split(whole, list(self.rows))
        return [self._regroup(q, 2, -1), self._regroup(k, 2, -1), v]

    def _regroup(self, rows: Tensor, outer: int, inner: int) -> Tensor:
        heads = rows.view(len(rows) // self.head_width, self.head_width, *rows.shape[1:])
        size = {-1: self.head_width // 2, 2: 2}
        grouped = heads.view(len(heads), size[outer], size[inner], *rows.shape[1:])
        return grouped.transpose(1, 2).reshape(rows.shape)


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file of architecture llama (Mistral included), qwen2 or qwen3."""
    try:
        fields, spans = read_header(path)
    except (ValueError, OverflowError, OSError, struct.error) as error:
        raise CheckpointError(f"{path} is truncated or not a GGUF file ({error}); fetch it again") from None
    arch = str(fields.get("general.architecture"))
    if arch not in ("llama", "qwen2", "qwen3"):
        raise UnsupportedError(f"{path}: architecture {arch!r} is not supported in GGUF files; llama, qwen2 and qwen3 are")
    stored, shapes = _stored(path, spans), {name: span.shape for name, span in spans.items()}
    hf = _hf_config(Fields(_strip(fields, f"{arch}."), str(path)), arch, shapes)
    if _FACTORS in stored:
        hf["rope_scaling"] = _llama3_scaling(path, stored[_FACTORS].read(), hf)
    kind = family(hf["model_type"])
    config = kind.config(hf)
    weights = tuple(_translate(weight, config, arch) for weight in kind.weights(config))
    tokens = Fields(_strip(fields, "tokenizer.ggml."), str(path))
    ends = dict.fromkeys(tokens.integer(key) for key in ("eos_token_id", "eot_token_id") if key in tokens)
    bos = tokens.integer("bos_token_id") if "bos_token_id" in tokens else None
    return Checkpoint(path, config, weights, stored, (_FACTORS,), tuple(ends), bos)


def _stored(path: Path, spans: Mapping[str, Span]) -> dict[str, Stored]:
    """The tensors of the file, which is mapped."""
    data = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    stored: dict[str, Stored] = {}
    for name, span in spans.items():
        kind = span.kind.name
        if kind not in (*_PLAIN, *PACKED, *_DEQUANTIZED):
            readable = ", ".join(sorted((*_PLAIN, *PACKED, *_DEQUANTIZED)))
            raise UnsupportedError(f"{path}: {name} is stored as {kind}; {readable} are read")
        raw = data[span.start : span.start + span.num_bytes]
        dtype = None if kind in PACKED and len(span.shape) == 2 else _PLAIN.get(kind, torch.float16)
        stored[name] = Stored(span.shape, dtype, partial(_read, raw, span))
    return stored


def _read(raw: Tensor, span: Span) -> Tensor | LowBit:
    kind = span.kind.name
    if kind in _PLAIN:
        return raw.view(_PLAIN[kind]).view(span.shape)
    if kind in PACKED and len(span.shape) == 2:
        matrix = PACKED[kind](raw.view(span.shape[0], -1, GGML_QUANT_SIZES[span.kind][1]))
        # No quantizer writes -128, and `LowBit` leaves it out, because kernels that take absolute values cannot hold its own.
        return matrix.dense() if matrix.bits == 8 and int(matrix.q.min()) == -128 else matrix
    # The package works on 16 rows at a time, so longer rows save most of its overhead.
    long_rows = raw.numpy().reshape(math.gcd(span.shape[0], 64), -1)
    return torch.from_numpy(quants.dequantize(long_rows, span.kind)).view(span.shape)


def _strip(fields: Mapping[str, object], prefix: str) -> dict[str, object]:
    return {name.removeprefix(prefix): value for name, value in fields.items() if name.startswith(prefix)}


def _hf_config(fields: Fields, arch: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, object]:
    """The file's metadata in the Hugging Face spelling; what it says that we do not know is refused."""
    width, num_heads = fields.integer("embedding_length"), fields.integer("attention.head_count")
    head_width = fields.integer("attention.key_length", width // max(num_heads, 1))
    fields.only("attention.value_length", head_width)
    fields.only("rope.dimension_count", head_width)
    for name in ("expert_count", "expert_used_count"):
        fields.only(name, 0)
    hf: dict[str, object] = {
        "model_type": "mistral" if "attention.sliding_window" in fields else arch,
        "hidden_size": width,
        "num_attention_heads": num_heads,
        "num_key_value_heads": fields.integer("attention.head_count_kv", num_heads),
        "head_dim": head_width,
        "num_hidden_layers": fields.integer("block_count"),
        "intermediate_size": fields.integer("feed_forward_length"),
        "vocab_size": shapes.get("token_embd.weight", (0,))[0],
        "max_position_embeddings": fields.integer("context_length"),
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": fields.number("rope.freq_base", 10_000.0),
        "tie_word_embeddings": "output.weight" not in shapes,
    }
    if "attention.sliding_window" in fields:
        hf["sliding_window"] = fields.integer("attention.sliding_window")
    if arch == "llama" and "blk.0.attn_q.bias" in shapes:
        hf["attention_bias"] = True
    kind = fields.text("rope.scaling.type", "none")
    if kind != "none":
        hf["rope_scaling"] = _hf_scaling(fields, kind)
    fields.drop("vocab_size", "rope.scaling.finetuned")
    fields.finish()
    return hf


def _hf_scaling(fields: Fields, kind: str) -> dict[str, object]:
    """Scaling that the metadata states: linear or YaRN."""
    scaling: dict[str, object] = {"rope_type": kind, "factor": fields.number("rope.scaling.factor")}
    if "rope.scaling.original_context_length" in fields:
        scaling["original_max_position_embeddings"] = fields.integer("rope.scaling.original_context_length")
    return scaling


def _llama3_scaling(path: Path, divisor_R: Tensor | LowBit, hf: Mapping[str, object]) -> dict[str, object]:
    """The Llama-3 scaling whose effect is these divisors of the frequencies. All released models share all numbers but the factor."""
    if isinstance(divisor_R, LowBit):
        raise UnsupportedError(f"{path}: {_FACTORS} is a matrix; a list of divisors is expected")
    head_width, factor = 2 * len(divisor_R), float(divisor_R.max())
    bands = Llama3Scaling(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_positions=8192)
    plain_R, _ = ops.rope_frequencies(Rope.parse({"theta": hf["rope_theta"]}), head_width)
    scaled_R, _ = ops.rope_frequencies(Rope.parse({"theta": hf["rope_theta"], "scaling": bands}), head_width)
    if not torch.allclose(plain_R / scaled_R, divisor_R.flatten(), rtol=1e-4):
        raise UnsupportedError(f"{path}: {_FACTORS} is not the scaling of Llama 3; other tables of frequencies are not supported")
    values = bands.model_dump(exclude={"kind", "original_positions"})
    return {"rope_type": "llama3", "original_max_position_embeddings": bands.original_positions} | values


def _translate(weight: Weight, config: ModelConfig, arch: str) -> Weight:
    """A row of the family's table with the names, and where needed the permutation, of GGUF."""
    parts = tuple(_rename(part) for part in weight.parts)
    form = weight.form
    if arch == "llama" and isinstance(form, Stacked) and len(form.rows) == 3:
        q_rows, k_rows, v_rows = form.rows
        return Weight(weight.name, parts, RotatesNeighbours((q_rows, k_rows, v_rows), config.head_width))
    return Weight(weight.name, parts, form)


def _rename(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem.startswith("model.layers."):
        index, _, rest = stem.removeprefix("model.layers.").partition(".")
        return f"blk.{index}.{_NAMES[rest]}.{kind}"
    return f"{_NAMES[stem]}.{kind}"

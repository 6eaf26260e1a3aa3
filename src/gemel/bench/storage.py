"""What a loaded model's matrices weigh, read off its leaves: whoever packs or rounds them, the bytes that a step has to read are theirs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gemel.bench.roofline import Matrices, Storage, shapes
from gemel.config.model import ModelConfig, SwiGLU
from gemel.model.model import Model
from gemel.ops.cpu import native

# Bytes of one element, and those of the scale that each key and each value has in int8.
KV_BYTES = {"float32": (4, 0), "bfloat16": (2, 0), "float16": (2, 0), "int8": (1, 4)}
# Keys and values in int8 are widened, never multiplied as they are.
KV_ARITHMETIC = {"int8": "bfloat16"}
_NATIVE = {native.F32: "float32", native.BF16: "bfloat16"}


def of(model: Model, config: ModelConfig, kv: str) -> Storage:
    """The storage of a model as it is now, with keys and values in the format `kv`."""
    gate_up = "mlp.gate_up" if isinstance(config.ffn, SwiGLU) else "mlp.up"
    names = {"qkv": "attn.qkv", "out": "attn.out", "gate_up": gate_up, "down": "mlp.down"}
    leaves = {part: [layer.get_submodule(name) for layer in model.layers] for part, name in names.items()} | {"head": [model.head]}
    products = {
        part: Matrices(count * rows * columns, sum(map(leaf_bytes, leaves[part])), arithmetic(leaves[part][0]))
        for part, (count, rows, columns) in shapes(config).items()
    }
    tied = getattr(model.head, "weight", None) is model.embed.weight
    element, scale = KV_BYTES[kv]
    kv_bytes_per_token = config.kv_elements_per_token * (element + scale / config.head_width)
    return Storage(products, 0 if tied else _bytes(model.embed.weight), kv_bytes_per_token, KV_ARITHMETIC.get(kv, kv))


def leaf_bytes(leaf: nn.Module) -> int:
    """Memory of a leaf's weight, however many tensors it is kept in."""
    return sum(map(_bytes, _weights(leaf)))


def arithmetic(leaf: nn.Module) -> str:
    """What a leaf multiplies in: int8 where activations are rounded too, else its weight's type. Low-bit weights are widened to fp32."""
    weight = getattr(leaf, "weight", None)
    if isinstance(weight, native.Weight):
        return "int8" if weight.quantize else _NATIVE.get(weight.format, "float32")
    dtypes = {tensor.dtype for tensor in _weights(leaf)}
    if dtypes & {torch.int8, torch.uint8}:
        return "float32"
    (dtype,) = dtypes
    return str(dtype).removeprefix("torch.")


def _weights(leaf: nn.Module) -> list[Tensor]:
    """All tensors of a leaf but its bias: parameters, buffers, and what is hidden from both because it is packed."""
    tensors = {**leaf._parameters, **leaf._buffers, **vars(leaf)}
    return [tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor) and name != "bias"]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()

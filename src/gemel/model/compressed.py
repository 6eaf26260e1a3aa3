"""The compressed-tensors layout: how a Hugging Face directory stores matrices of few bits, in both directions.

`quantization_config` in config.json says which modules are quantized and how; each of them has, instead of its `weight`,

    int-quantized    weight int8 [N, K], weight_scale [N, 1]                                     8 bits, one scale per row
    pack-quantized   weight_packed int32 [N, K * bits / 32], lowest bits first and offset by 2^(bits - 1), weight_scale [N, G],
                     weight_shape [2], and where the numbers do not lie around their middle weight_zero_point int32 [N * bits / 32, G]

as vLLM, SGLang and transformers read them (vllm-project/compressed-tensors, compressors/pack_quantized and naive_quantized). On a
little-endian machine the bytes of 4-bit `weight_packed` are those of `LowBit`.

What others state about activations is a promise that they may be rounded; how far ours are is the engine's setting.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gemel.config.errors import CheckpointError, UnsupportedError
from gemel.model.families.fields import Fields
from gemel.model.leaves.lowbit import INT4_GROUPS, INT8_GROUP, LowBit
from gemel.model.stored import Stored

METHOD = "compressed-tensors"
INT, PACK, MIXED = "int-quantized", "pack-quantized", "mixed-precision"
_SCALES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Scheme:
    """How a matrix is stored. `group` counts elements of a row that share a scale; 0 is the whole row."""

    format: str
    bits: int
    group: int
    symmetric: bool = True

    @classmethod
    def of(cls, matrix: LowBit) -> Scheme:
        """The scheme in which a matrix is written."""
        whole_rows = matrix.group == 0
        return cls(INT if whole_rows else PACK, matrix.bits, matrix.group, matrix.minimum is None)

    def to_hf(self, targets: list[str]) -> dict[str, object]:
        """A config group. int-quantized is by definition for products with rounded activations."""
        tokens = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
        weights: dict[str, object] = {"num_bits": self.bits, "type": "int", "symmetric": self.symmetric, "dynamic": False}
        weights |= {"strategy": "group", "group_size": self.group} if self.group else {"strategy": "channel", "group_size": None}
        inputs = tokens if self.format == INT else None
        return {"targets": targets, "format": self.format, "weights": weights, "input_activations": inputs, "output_activations": None}


def describe(schemes: Mapping[str, Scheme], plain: list[str]) -> dict[str, object]:
    """The `quantization_config` of a model with these quantized modules and these plain ones. The commonest scheme is that of "Linear"."""
    modules: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        modules.setdefault(scheme, []).append(name)
    groups = sorted(modules.items(), key=lambda item: -len(item[1]))
    formats = {scheme.format for scheme in modules}
    return {
        "quant_method": METHOD,
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "ignore": plain,
        "kv_cache_scheme": None,
        "config_groups": {f"group_{i}": scheme.to_hf(names if i else ["Linear"]) for i, (scheme, names) in enumerate(groups)},
    }


def pack(module: str, matrix: LowBit) -> Iterator[tuple[str, Tensor]]:
    """The tensors that stand for a module's weight."""
    scheme = Scheme.of(matrix)
    if scheme.format == INT:
        yield f"{module}.weight", matrix.q
        yield f"{module}.weight_scale", matrix.scale[:, None]
        return
    if matrix.minimum is not None:
        yield f"{module}.weight_zero_point", _pack_columns(_zero_points(module, matrix.scale, matrix.minimum))
    bytes_ = matrix.q if matrix.bits == 4 else matrix.q.view(torch.uint8) ^ 128
    yield f"{module}.weight_packed", bytes_.contiguous().view(torch.int32)
    yield f"{module}.weight_scale", matrix.scale
    yield f"{module}.weight_shape", torch.tensor(matrix.shape)


def _zero_points(module: str, scale_NG: Tensor, minimum_NG: Tensor) -> Tensor:
    """The whole numbers z from 0 to 15, uint8 [N, G], with minimum = -z * scale as fp16. Not all minima have one."""
    zero_NG = (-minimum_NG.float() / scale_NG.float()).nan_to_num(0.0, 0.0, 0.0).round().clamp(0, 15)
    if not torch.equal(_minimum(scale_NG, zero_NG), minimum_NG):
        raise UnsupportedError(
            f"{module}: its minima are not whole multiples of its scales (as in GGUF's Q4_1 and Q4_K), which the {METHOD} layout cannot "
            "express; load the model with weights = 'dense' and save that, or keep the GGUF file"
        )
    return zero_NG.to(torch.uint8)


def _minimum(scale_NG: Tensor, zero_NG: Tensor) -> Tensor:
    return (scale_NG.float() * -zero_NG.float()).to(torch.float16)


def _pack_columns(zero_NG: Tensor) -> Tensor:
    """Eight 4-bit numbers of a column into one int32, the first of them lowest."""
    num_rows = len(zero_NG)
    padded = torch.nn.functional.pad(zero_NG, (0, 0, 0, -num_rows % 8)).t().contiguous()
    return (padded[:, ::2] | padded[:, 1::2] << 4).view(torch.int32).t().contiguous()


def _unpack_columns(packed_nG: Tensor, num_rows: int) -> Tensor:
    pairs_Gb = packed_nG.t().contiguous().view(torch.uint8)
    return torch.stack((pairs_Gb & 15, pairs_Gb >> 4), -1).flatten(1)[:, :num_rows].t()


def logical(quantization: Mapping[str, object], what: str, stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """What is stored, with one `weight` in the place of the tensors that stand for it."""
    groups, ignored = _groups(Fields(quantization, f"{what}: quantization_config"))
    out = dict(stored)
    for name in stored:
        if name.endswith(".weight_g_idx"):
            raise UnsupportedError(
                f"{what}: {name}: columns in the order of their activations are not read; use actorder = 'static' or None"
            )
        module, _, kind = name.rpartition(".")
        if kind != "weight_scale":
            continue
        scheme = None if _named(module, ignored) else _scheme(module, groups)
        if scheme is None:
            raise CheckpointError(f"{what}: {module} has a weight_scale, but no target of quantization_config says how it is quantized")
        kinds = ["weight_scale", *(["weight"] if scheme.format == INT else ["weight_packed", "weight_shape"])]
        kinds += [] if scheme.symmetric else ["weight_zero_point"]
        if missing := [kind for kind in kinds if f"{module}.{kind}" not in out]:
            raise CheckpointError(f"{what} lacks {module}.{missing[0]}, which its {scheme.format} matrix needs")
        parts = {kind: out.pop(f"{module}.{kind}") for kind in kinds}
        out[f"{module}.weight"] = _matrix(scheme, parts, f"{what}: {module}")
    return out


def _matrix(scheme: Scheme, parts: Mapping[str, Stored], what: str) -> Stored:
    """The logical tensor of one module, with the shapes of its parts checked."""
    num_rows, width = parts["weight" if scheme.format == INT else "weight_packed"].shape
    width = width if scheme.format == INT else width * 32 // scheme.bits
    group = scheme.group or width
    steps = [n for n in (reversed(INT4_GROUPS) if scheme.bits == 4 else (INT8_GROUP,)) if group % n == 0]
    if width % group or (not steps and (scheme.bits == 4 or scheme.group)):
        smallest = INT4_GROUPS[0] if scheme.bits == 4 else INT8_GROUP
        raise UnsupportedError(
            f"{what}: groups of {group} in rows of {width} are not read; multiples of {smallest} that divide the row are"
        )
    num_groups = width // group
    wanted: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {
        "weight": ((num_rows, width), (torch.int8,)),
        "weight_packed": ((num_rows, width * scheme.bits // 32), (torch.int32,)),
        "weight_scale": ((num_rows, num_groups), _SCALES),
        "weight_shape": ((2,), (torch.int64, torch.int32)),
        "weight_zero_point": ((-(-num_rows * scheme.bits // 32), num_groups), (torch.int32,)),
    }
    for kind, part in parts.items():
        shape, dtypes = wanted[kind]
        if part.shape != shape or part.dtype not in dtypes:
            raise CheckpointError(f"{what}.{kind} is {part.dtype} {list(part.shape)}, not {dtypes[0]} {list(shape)}")
    if "weight_shape" in parts and parts["weight_shape"].tensor().tolist() != [num_rows, width]:
        raise CheckpointError(f"{what}.weight_shape is {parts['weight_shape'].tensor().tolist()}, not {[num_rows, width]}")
    per_row = scheme.bits == 8 and not scheme.group
    return Stored((num_rows, width), None, partial(_read, parts, num_rows, scheme.bits, 0 if per_row else group // steps[0]))


def _read(parts: Mapping[str, Stored], num_rows: int, bits: int, repeat: int) -> LowBit:
    """The matrix, in memory of its own. `repeat`: how many of our groups share a stored scale; 0 for one scale per row.

    -128, which some write for the lowest weight of a row, becomes -127, the farthest on the other side: `LowBit` is symmetric.
    """
    scale_NG = parts["weight_scale"].tensor().float()
    if "weight" in parts:
        return LowBit(parts["weight"].tensor().clamp(min=-127), scale_NG[:, 0].clone())
    bytes_ = parts["weight_packed"].tensor().contiguous().view(torch.uint8)
    q = (bytes_ ^ 128).view(torch.int8).clamp_(min=-127) if bits == 8 else bytes_.clone()
    if not repeat:
        return LowBit(q, scale_NG[:, 0].clone())
    scale_NG = scale_NG.repeat_interleave(repeat, 1).to(torch.float16)
    if "weight_zero_point" not in parts:
        return LowBit(q, scale_NG)
    zero_NG = _unpack_columns(parts["weight_zero_point"].tensor(), num_rows).repeat_interleave(repeat, 1)
    return LowBit(q, scale_NG, _minimum(scale_NG, zero_NG))


def _groups(fields: Fields) -> tuple[list[tuple[str, Scheme]], list[str]]:
    """Targets with their schemes, and names to leave alone."""
    fields.only("quant_method", METHOD)
    fields.only("quantization_status", "compressed")
    for name in ("sparsity_config", "transform_config", "moe_sparsity_config"):
        fields.only(name, {}, {"format": "dense"})
    fields.only("kv_cache_scheme", None)
    fields.drop("version", "global_compression_ratio")
    overall = fields.text("format")
    ignored = fields.texts("ignore") if "ignore" in fields else []
    section = fields.section("config_groups") or Fields({}, f"{fields.what}: config_groups")
    fields.finish()
    targets: list[tuple[str, Scheme]] = []
    for name in section.names():
        group = section.section(name)
        assert group is not None
        scheme = _parse_scheme(group, overall)
        targets += [(target, scheme) for target in group.texts("targets")]
        group.finish()
    return targets, ignored


def _parse_scheme(group: Fields, overall: str) -> Scheme:
    format_ = group.text("format", overall)
    if format_ not in (INT, PACK):
        raise UnsupportedError(f"{group.what}: format = {format_!r} is not read; {PACK} and {INT} are")
    group.only("output_activations", None)
    if inputs := group.section("input_activations"):
        inputs.only("num_bits", 8)
        inputs.only("type", "int")
        inputs.only("dynamic", True)
        inputs.drop("symmetric", "strategy", "group_size", "observer", "observer_kwargs", "actorder", "block_structure", "zp_dtype")
        inputs.drop("scale_dtype")
        inputs.finish()
    weights = group.section("weights")
    if weights is None:
        raise UnsupportedError(f"{group.what}: a group without quantized weights is not read")
    bits, symmetric = weights.integer("num_bits"), weights.flag("symmetric", True)
    if bits not in ((8,) if format_ == INT else (4, 8)) or (bits == 8 and not symmetric):
        raise UnsupportedError(
            f"{weights.what}: num_bits = {bits} with symmetric = {symmetric} as {format_} is not read; {PACK} with 4 bits and symmetric "
            "8 bits are"
        )
    weights.only("type", "int")
    weights.only("dynamic", False)
    weights.only("actorder", False, "static", "weight")
    strategy = weights.text("strategy", "group" if "group_size" in weights else "channel")
    size = weights.integer("group_size", 0)
    if strategy not in ("channel", "group") or (strategy == "group") != (size > 0) or (strategy == "group" and format_ == INT):
        raise UnsupportedError(f"{weights.what}: strategy = {strategy!r} with group_size = {size} as {format_} is not read")
    weights.drop("observer", "observer_kwargs", "scale_dtype", "zp_dtype")
    weights.finish()
    return Scheme(format_, bits, max(size, 0), symmetric)


def _scheme(module: str, targets: list[tuple[str, Scheme]]) -> Scheme | None:
    """The scheme of a module: by its name, else by a pattern, else by its class."""
    rank: list[Callable[[str], bool]] = [
        lambda target: target == module,
        lambda target: _named(module, [target]),
        lambda target: target == "Linear",
    ]
    return next((scheme for fits in rank for target, scheme in targets if fits(target)), None)


def _named(module: str, names: list[str]) -> bool:
    """Whether the module is among the names, of which those with re: in front are patterns that match its beginning."""
    try:
        return any(re.match(name[3:], module) is not None if name.startswith("re:") else name == module for name in names)
    except re.error as error:
        raise CheckpointError(f"quantization_config: {error.pattern!r} is not a regular expression: {error}") from None

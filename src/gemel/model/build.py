"""From a checkpoint to a model and back.

The model is first laid out on torch's meta device, which costs neither memory nor random numbers; then each tensor is read, transformed,
cast or quantized, checked and put in its place, so that the peak is the model plus one tensor. Whatever is missing, surplus, misshapen or
not finite is refused by name before anything is computed with it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gemel.config.errors import CheckpointError, ConfigError, UnsupportedError
from gemel.config.model import DynamicNTK, ModelConfig, Rope
from gemel.model import compressed
from gemel.model.checkpoint import Checkpoint, open_directory, write_directory
from gemel.model.families import family
from gemel.model.families.table import Form, Stacked, Weight
from gemel.model.leaves.linear import Leaf, Linear
from gemel.model.leaves.lowbit import Activations, LowBit, LowBitLinear, quantize
from gemel.model.model import Model
from gemel.model.pieces import Pieces, Share, everything
from gemel.model.shard import Box
from gemel.model.tensor_file import Entry

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
Weights = Literal["auto", "dense", "int8", "int4"]


@dataclass(frozen=True)
class LoadedModel:
    """A model with weights, where it came from, and the token ids that start and end its texts.

    `config` is of the model as it is: a tied checkpoint whose head became a matrix of few bits is no longer tied. `stored` is the type of
    the checkpoint's plain matrices, see `Peek`.
    """

    model: Model
    config: ModelConfig
    path: Path
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    stored: torch.dtype = torch.float32


@dataclass(frozen=True)
class Peek:
    """What can be known of a checkpoint without reading it.

    `stored` is the type of most of the elements of its plain matrices, or fp16 where it has none; `low_bit` whether it has matrices of few
    bits that "auto" keeps so.
    """

    config: ModelConfig
    stored: torch.dtype
    low_bit: bool


def peek(path: str | Path) -> Peek:
    """Look at a Hugging Face directory or a .gguf file. Takes milliseconds, some tens of them for GGUF."""
    checkpoint = _open(Path(path).expanduser())
    matrices = [tensor for tensor in checkpoint.stored.values() if len(tensor.shape) == 2]
    return Peek(checkpoint.config, _stored_dtype(checkpoint), any(matrix.dtype is None for matrix in matrices))


def load(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    max_context: int | None = None,
    weights: Weights = "auto",
    group: int = 32,
    activations: Activations = "int8",
) -> LoadedModel:
    """Read a Hugging Face directory or a .gguf file.

    `max_context` (tokens) matters to dynamic NTK scaling, whose rotation is fixed for exactly that length; elsewhere it is only checked
    against what the model can do. None takes the model's own limit.

    `weights` is about the matrices of the blocks and the head; everything else has `dtype`. "auto" leaves matrices of few bits as the
    checkpoint stores them, "dense" dequantizes them to `dtype`, "int8" rounds all to 8 bits with one scale per row, "int4" all to 4 bits
    with one scale per `group` elements of a row, but for the head, which gets 8. A head of few bits is a matrix of its own even where it is
    tied to the embedding. `activations` is of products with few bits, see `LowBitLinear`.
    """
    path = Path(path).expanduser()
    if dtype not in DTYPES:
        raise ConfigError(f"dtype = {dtype} is not supported; {', '.join(DTYPES.values())} are")
    if weights not in get_args(Weights):
        raise ConfigError(f"weights = {weights!r} is not known; {', '.join(get_args(Weights))} are")
    checkpoint = _open(path)
    config = with_context(checkpoint.config, max_context)
    table = checkpoint.weights
    if config.tied_head and _head_is_low_bit(checkpoint, weights):
        embed = _named(table, "embed.weight")
        config, table = config.model_copy(update={"tied_head": False}), (*table, Weight("head.weight", embed.parts, embed.form))
    model = outline(config, dtype)
    _check_names(checkpoint, model, table)
    if checkpoint.config.tied_head:
        _check_tied(checkpoint, dtype)
    for weight in table:
        found = _matrix(checkpoint, weight, dtype, weights, group) if _is_matrix(model, weight) else _dense(checkpoint, weight, dtype)
        _put(model, weight.name, found.map(lambda x: x.to(device)) if isinstance(found, LowBit) else found.to(device), activations)
    if config.tied_head:
        model.head.weight = model.embed.weight
    if model.rotary is not None:
        model.rotary.to(device)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())), "the weight table leaves tensors out"
    return LoadedModel(model, config, path, checkpoint.eos_token_ids, checkpoint.bos_token_id, _stored_dtype(checkpoint))


def lay_out(path: str | Path, dtype: torch.dtype) -> tuple[LoadedModel, Share]:
    """A model of a directory or file without memory for its parameters, and its weights in pieces, as dense numbers of `dtype`.

    For who needs only a part of them: `allocate` what is needed, and read that. It is checked as `load` does, numbers when they are read.
    """
    checkpoint = _open(Path(path).expanduser())
    model = outline(checkpoint.config, dtype)
    _check_names(checkpoint, model, checkpoint.weights)
    if checkpoint.config.tied_head:
        _check_tied(checkpoint, dtype)
    weights = Share(
        {weight.name: _pieces(checkpoint, weight, model.get_parameter(weight.name).shape, dtype) for weight in checkpoint.weights}
    )
    ends, start = checkpoint.eos_token_ids, checkpoint.bos_token_id
    return LoadedModel(model, checkpoint.config, checkpoint.path, ends, start, _stored_dtype(checkpoint)), weights


def outline(config: ModelConfig, dtype: torch.dtype) -> Model:
    """A model whose parameters have names, shapes and a type, and no memory."""
    with torch.device("meta"), _NoInitialValues():
        model = Model(config)
    for parameter in model.parameters():
        parameter.data = parameter.to(dtype)
    return model


def allocate(module: nn.Module, device: torch.device) -> None:
    """Give parameters that have no memory some, with whatever is in it. Those that are one stay one."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if parameter.is_meta:
                memory = made.setdefault(parameter, nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad))
                setattr(owner, name, memory)


@dataclass(frozen=True)
class _InFiles:
    """One of our tensors, or one that is stacked into it: read from the mapped file where it is asked for, and checked there."""

    checkpoint: Checkpoint
    weight: Weight
    dtype: torch.dtype

    def __getitem__(self, part: Box, /) -> Tensor:
        stored = [_read(self.checkpoint, name) for name in self.weight.parts]
        joined = self.weight.form.join([x.dense(self.dtype) if isinstance(x, LowBit) else x for x in stored])
        found = joined[part].to(self.dtype)
        _check_finite(self.checkpoint, self.weight, found, DTYPES[self.dtype])
        return found


def _pieces(checkpoint: Checkpoint, weight: Weight, shape: Sequence[int], dtype: torch.dtype) -> Pieces:
    """Tensors that lie below each other in one of ours can be read apart; others are joined to be read."""
    if not isinstance(weight.form, Stacked):
        return Pieces(tuple(shape), dtype, ((everything(shape), _InFiles(checkpoint, weight, dtype)),))
    found, end = [], 0
    for name, height in zip(weight.parts, weight.form.rows, strict=True):
        box, end = (slice(end, end + height), *everything(shape[1:])), end + height
        found.append((box, _InFiles(checkpoint, Weight(weight.name, (name,), Stacked((height,))), dtype)))
    return Pieces(tuple(shape), dtype, tuple(found))


class _NoInitialValues(TorchFunctionMode):
    """Parameters stay as they were made. To draw normal numbers on the meta device, torch would import its compiler: 2 s and 100 MB."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def save(loaded: LoadedModel, path: str | Path, dtype: torch.dtype | None = None, read: Callable[[str], Tensor] | None = None) -> None:
    """Write a Hugging Face directory that `transformers` and `load` read; weights cast to `dtype`, or as they are. No tokenizer files.

    Matrices of few bits are written in the compressed-tensors layout. Other leaves are asked for their plain weights, so a model with
    swapped leaves saves what it computes with. `read` gives weights by their names in the model, if they are elsewhere; each is asked for
    once and written before the next, so that no more than one need be in memory.
    """
    config, model = loaded.config, loaded.model
    dtype = dtype or model.norm.weight.dtype
    if dtype not in DTYPES:
        raise ConfigError(f"dtype = {dtype} cannot be saved; {', '.join(DTYPES.values())} can")
    kind, hf = family(config.family), described(config)
    ends, table = list(loaded.eos_token_ids), kind.weights(config)
    tokens: dict[str, object] = {"bos_token_id": loaded.bos_token_id, "eos_token_id": ends[0] if len(ends) == 1 else ends or None}
    hf |= {"architectures": [kind.ARCHITECTURE], "dtype": DTYPES[dtype]} | tokens | _quantization(model, table)
    shapes = (_get(model, weight.name) for weight in table)
    announced = (
        _theirs(weight, x if isinstance(x, LowBit) else x.detach().to("meta"), dtype) for weight, x in zip(table, shapes, strict=True)
    )
    entries = [Entry.of(name, tensor) for named in announced for name, tensor in named]
    values = ((weight, _get(model, weight.name) if read is None else read(weight.name)) for weight in table)
    tensors = (named for weight, x in values for named in _theirs(weight, x, dtype))
    write_directory(Path(path).expanduser(), hf, tokens, entries, tensors)


def _theirs(weight: Weight, ours: Tensor | LowBit, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint calls one of our tensors, part by part."""
    if isinstance(ours, LowBit):
        for name, part in zip(weight.parts, _split(ours, weight.form), strict=True):
            yield from compressed.pack(name.removesuffix(".weight"), part)
    else:
        yield from zip(weight.parts, weight.form.split(ours.detach().to(dtype)), strict=True)


def described(config: ModelConfig) -> dict[str, object]:
    """What config.json says of a model. `UnsupportedError` if its family has no words for it, which is better known before training."""
    kind = family(config.family)
    hf = kind.hf_config(config)
    back = with_context(kind.config(hf), config.max_positions if _stretches(config) else None)
    if wrong := [name for name, value in config if getattr(back, name) != value]:
        settings = ", ".join(f"{name} = {getattr(config, name)!r}" for name in wrong)
        raise UnsupportedError(
            f"a checkpoint of family {config.family!r} cannot express {settings}, so nobody could load it; choose a family that has it"
        )
    return hf


def _quantization(model: Model, table: Sequence[Weight]) -> dict[str, object]:
    """What config.json says about matrices of few bits: nothing if there are none."""
    schemes: dict[str, compressed.Scheme] = {}
    plain: list[str] = []
    for weight in table:
        modules = [part.removesuffix(".weight") for part in weight.parts]
        matrix = _get(model, weight.name) if _is_matrix(model, weight) else None
        if isinstance(matrix, LowBit):
            if not weight.form.by_rows:
                raise UnsupportedError(
                    f"{weight.parts[0]} is stored as [inputs, outputs], for which the {compressed.METHOD} layout has no place; load the "
                    "model with weights = 'dense' and save that"
                )
            schemes |= dict.fromkeys(modules, compressed.Scheme.of(matrix))
        elif matrix is not None:
            plain += modules
    return {"quantization_config": compressed.describe(schemes, plain)} if schemes else {}


def with_context(config: ModelConfig, max_context: int | None) -> ModelConfig:
    """The configuration for runs of at most `max_context` tokens."""
    if max_context is None:
        return config
    if _stretches(config):
        values = config.model_dump()
        values["positions"]["scaling"]["length"] = values["max_positions"] = max_context
        return ModelConfig.parse(values)
    if max_context > config.max_positions:
        raise ConfigError(f"max_context = {max_context} exceeds the model's {config.max_positions} positions; lower it or leave it out")
    return config


def _stretches(config: ModelConfig) -> bool:
    return isinstance(config.positions, Rope) and isinstance(config.positions.scaling, DynamicNTK)


def _open(path: Path) -> Checkpoint:
    if path.is_dir():
        return open_directory(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a Hugging Face directory or a .gguf file")
    if path.suffix == ".gguf":
        from gemel.model.gguf_file import open_gguf

        return open_gguf(path)
    raise UnsupportedError(f"{path} is neither a Hugging Face directory nor a .gguf file; for a single safetensors file give its directory")


def _stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    elements: Counter[torch.dtype] = Counter()
    for tensor in checkpoint.stored.values():
        if tensor.dtype in DTYPES and len(tensor.shape) == 2:
            elements[tensor.dtype] += math.prod(tensor.shape)
    return max(elements, key=elements.__getitem__, default=torch.float16)


def _check_names(checkpoint: Checkpoint, model: Model, table: Sequence[Weight]) -> None:
    """Every tensor that we need is there in the shape that we need, and there is no other."""
    wanted: dict[str, tuple[int, ...]] = {}
    for weight in table:
        parts = weight.form.split(_owner(model, weight.name).get_parameter(weight.name.rpartition(".")[2]).detach())
        wanted |= {name: tuple(part.shape) for name, part in zip(weight.parts, parts, strict=True)}
    shapes, path = {name: tensor.shape for name, tensor in checkpoint.stored.items()}, checkpoint.path
    if missing := sorted(wanted.keys() - shapes.keys()):
        raise CheckpointError(f"{path} lacks {_some(missing)}; the checkpoint is incomplete or of another architecture")
    wrong = [f"{name} is {list(shapes[name])}, not {list(shape)}" for name, shape in wanted.items() if shapes[name] != shape]
    if wrong:
        raise CheckpointError(f"{path}: {_some(wrong)}; the weights do not belong to this configuration")
    allowed = (*checkpoint.surplus, *(["lm_head.weight"] if checkpoint.config.tied_head else []))
    extra = sorted(name for name in shapes.keys() - wanted.keys() if not any(fnmatchcase(name, pattern) for pattern in allowed))
    if extra:
        raise CheckpointError(f"{path} has tensors that its configuration does not explain: {_some(extra)}")


def _check_tied(checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """A tied checkpoint may hold the head once more, as long as it is the same one."""
    if "lm_head.weight" not in checkpoint.stored:
        return
    head = Weight("head.weight", ("lm_head.weight",), Stacked((checkpoint.config.vocab_size,)))
    if not torch.equal(_dense(checkpoint, head, dtype), _dense(checkpoint, _named(checkpoint.weights, "embed.weight"), dtype)):
        raise CheckpointError(
            f"{checkpoint.path}: tie_word_embeddings is true, but lm_head.weight differs from the embedding; set it to false in config.json"
        )


def _head_is_low_bit(checkpoint: Checkpoint, weights: Weights) -> bool:
    """Whether the head of a tied checkpoint becomes a matrix of few bits, while the embedding stays plain."""
    embed = checkpoint.stored.get(_named(checkpoint.weights, "embed.weight").parts[0])
    return weights in ("int8", "int4") or (weights == "auto" and embed is not None and embed.dtype is None)


def _matrix(checkpoint: Checkpoint, weight: Weight, dtype: torch.dtype, weights: Weights, group: int) -> Tensor | LowBit:
    """The weight of a leaf as `weights` wants it. Parts of one matrix that are stored in different ways are dequantized."""
    if weights in ("int8", "int4"):
        return _rounded(checkpoint, weight, *((4, group) if weights == "int4" and weight.name != "head.weight" else (8, 0)))
    if weights == "auto" and weight.form.by_rows and all(checkpoint.stored[name].dtype is None for name in weight.parts):
        parts = [part for name in weight.parts if isinstance(part := checkpoint.stored[name].read(), LowBit)]
        if len(parts) == len(weight.parts) and all(part.alike(parts[0]) for part in parts):
            joined = _join(parts, weight.form)
            _check_finite(checkpoint, weight, joined, "its fp16 scales")
            return joined
    return _dense(checkpoint, weight, dtype)


def _rounded(checkpoint: Checkpoint, weight: Weight, bits: Literal[8, 4], group: int) -> LowBit:
    """One of our matrices, rounded part by part as it is read."""
    parts = [_read(checkpoint, name) for name in weight.parts]
    plain = [part.dense() if isinstance(part, LowBit) else part for part in parts]
    try:
        if weight.form.by_rows:
            rounded = _join([quantize(part, bits, group) for part in plain], weight.form)
        else:
            rounded = quantize(weight.form.join(plain), bits, group)
    except ConfigError as error:
        raise ConfigError(f"{' and '.join(weight.parts)}: {error}") from None
    _check_finite(checkpoint, weight, rounded, "fp16 scales" if group else "fp32 scales")
    return rounded


def _dense(checkpoint: Checkpoint, weight: Weight, dtype: torch.dtype) -> Tensor:
    """One of our tensors, in memory of its own: pages of a mapped file would change under us when the file does."""
    parts = [_read(checkpoint, name) for name in weight.parts]
    tensor = weight.form.join([part.dense(dtype) if isinstance(part, LowBit) else part for part in parts])
    ours = len(parts) > 1 or isinstance(parts[0], LowBit)
    tensor = tensor.to(dtype, copy=not ours, memory_format=torch.contiguous_format)
    _check_finite(checkpoint, weight, tensor, DTYPES[dtype])
    return tensor


def _read(checkpoint: Checkpoint, name: str) -> Tensor | LowBit:
    stored = checkpoint.stored[name]
    if stored.dtype is not None and (not stored.dtype.is_floating_point or stored.dtype.itemsize < 2):
        raise UnsupportedError(f"{checkpoint.path}: {name} is stored as {stored.dtype}; float32, bfloat16 and float16 are read")
    return stored.read()


def _check_finite(checkpoint: Checkpoint, weight: Weight, found: Tensor | LowBit, kind: str) -> None:
    if isinstance(found, LowBit):
        finite = found.is_finite()
    else:
        low, high = torch.aminmax(found)
        finite = bool(low.isfinite() and high.isfinite())
    if not finite:
        raise CheckpointError(f"{checkpoint.path}: {' or '.join(weight.parts)} holds NaN or infinity as {kind}; fetch it again")


def _join(parts: Sequence[LowBit], form: Form) -> LowBit:
    """Parts of one kind to one matrix, rows as `form` puts them."""
    minima = [part.minimum for part in parts if part.minimum is not None]
    return LowBit(form.join([part.q for part in parts]), form.join([part.scale for part in parts]), form.join(minima) if minima else None)


def _split(whole: LowBit, form: Form) -> Iterator[LowBit]:
    """The way back."""
    minima = [None] * len(form.split(whole.scale)) if whole.minimum is None else form.split(whole.minimum)
    return (LowBit(*part) for part in zip(form.split(whole.q), form.split(whole.scale), minima, strict=True))


def _put(model: Model, name: str, found: Tensor | LowBit, activations: Activations) -> None:
    where, _, kind = name.rpartition(".")
    owner = _owner(model, name)
    if isinstance(found, LowBit):
        assert isinstance(owner, Linear)
        model.set_submodule(where, LowBitLinear(found, owner.bias, owner.sections, activations))
    else:
        setattr(owner, kind, found if isinstance(owner, LowBitLinear) else nn.Parameter(found))


def _get(model: Model, name: str) -> Tensor | LowBit:
    owner, kind = _owner(model, name), name.rpartition(".")[2]
    if kind == "weight" and isinstance(owner, LowBitLinear):
        return owner.matrix
    tensor = owner.plain() if kind == "weight" and isinstance(owner, Leaf) else getattr(owner, kind)
    assert isinstance(tensor, Tensor)
    return tensor


def _owner(model: Model, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _is_matrix(model: Model, weight: Weight) -> bool:
    return weight.name.endswith(".weight") and isinstance(_owner(model, weight.name), Leaf)


def _named(table: Sequence[Weight], name: str) -> Weight:
    return next(weight for weight in table if weight.name == name)


def _some(items: list[str]) -> str:
    return ", ".join(items[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")

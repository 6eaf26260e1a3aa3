"""From a checkpoint to a model and back.

The model is first laid out on torch's meta device, which costs neither memory nor random numbers; then each tensor is read, transformed,
cast, checked and put in its place, so that the peak is the model plus one tensor. Whatever is missing, surplus, misshapen or not finite is
refused by name before anything is computed with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gemel.config.errors import CheckpointError, ConfigError, UnsupportedError
from gemel.config.model import DynamicNTK, ModelConfig, Rope
from gemel.model.checkpoint import Checkpoint, open_directory, write_directory
from gemel.model.families import family
from gemel.model.families.table import Weight
from gemel.model.leaves.linear import Leaf
from gemel.model.model import Model

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True)
class LoadedModel:
    """A model with weights, where it came from, and the token ids that start and end its texts."""

    model: Model
    config: ModelConfig
    path: Path
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None


def load(
    path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", max_context: int | None = None
) -> LoadedModel:
    """Read a Hugging Face directory or a .gguf file.

    `max_context` (tokens) matters to dynamic NTK scaling, whose rotation is fixed for exactly that length; elsewhere it is only checked
    against what the model can do. None takes the model's own limit.
    """
    path = Path(path).expanduser()
    if dtype not in DTYPES:
        raise ConfigError(f"dtype = {dtype} is not supported; {', '.join(DTYPES.values())} are")
    checkpoint = _open(path)
    config = with_context(checkpoint.config, max_context)
    with torch.device("meta"), _NoInitialValues():
        model = Model(config)
    _check_names(checkpoint, model)
    for weight in checkpoint.weights:
        tensor = _read(checkpoint, weight, dtype).to(device)
        _put(model, weight.name, tensor)
    if config.tied_head:
        model.head.weight = model.embed.weight
        _check_tied(checkpoint, model, dtype)
    if model.rotary is not None:
        model.rotary.to(device)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())), "the weight table leaves tensors out"
    return LoadedModel(model, config, path, checkpoint.eos_token_ids, checkpoint.bos_token_id)


class _NoInitialValues(TorchFunctionMode):
    """Parameters stay as they were made. To draw normal numbers on the meta device, torch would import its compiler: 2 s and 100 MB."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def save(loaded: LoadedModel, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write a Hugging Face directory that `transformers` and `load` read; weights cast to `dtype`, or as they are. No tokenizer files.

    Leaves are asked for their plain weights, so a model with swapped leaves saves what it computes with.
    """
    config, model = loaded.config, loaded.model
    dtype = dtype or model.norm.weight.dtype
    if dtype not in DTYPES:
        raise ConfigError(f"dtype = {dtype} cannot be saved; {', '.join(DTYPES.values())} can")
    kind = family(config.family)
    hf = kind.hf_config(config)
    if with_context(kind.config(hf), config.max_positions if _stretches(config) else None) != config:
        raise UnsupportedError(f"the configuration of family {config.family!r} cannot express this model: {config!r}")
    ends = list(loaded.eos_token_ids)
    tokens: dict[str, object] = {"bos_token_id": loaded.bos_token_id, "eos_token_id": ends[0] if len(ends) == 1 else ends or None}
    hf |= {"architectures": [kind.ARCHITECTURE], "dtype": DTYPES[dtype]} | tokens

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for weight in kind.weights(config):
            yield from zip(weight.parts, weight.form.split(_get(model, weight.name).detach().to(dtype)), strict=True)

    write_directory(Path(path).expanduser(), hf, tokens, tensors())


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


def _check_names(checkpoint: Checkpoint, model: Model) -> None:
    """Every tensor that we need is there in the shape that we need, and there is no other."""
    wanted: dict[str, tuple[int, ...]] = {}
    for weight in checkpoint.weights:
        parts = weight.form.split(_get(model, weight.name).detach())
        wanted |= {name: tuple(part.shape) for name, part in zip(weight.parts, parts, strict=True)}
    shapes, path = checkpoint.shapes, checkpoint.path
    if missing := sorted(wanted.keys() - shapes.keys()):
        raise CheckpointError(f"{path} lacks {_some(missing)}; the checkpoint is incomplete or of another architecture")
    wrong = [f"{name} is {list(shapes[name])}, not {list(shape)}" for name, shape in wanted.items() if shapes[name] != shape]
    if wrong:
        raise CheckpointError(f"{path}: {_some(wrong)}; the weights do not belong to this configuration")
    allowed = (*checkpoint.surplus, *(["lm_head.weight"] if checkpoint.config.tied_head else []))
    extra = sorted(name for name in shapes.keys() - wanted.keys() if not any(fnmatchcase(name, pattern) for pattern in allowed))
    if extra:
        raise CheckpointError(f"{path} has tensors that its configuration does not explain: {_some(extra)}")


def _check_tied(checkpoint: Checkpoint, model: Model, dtype: torch.dtype) -> None:
    """A tied checkpoint may hold the head once more, as long as it is the same one."""
    if "lm_head.weight" in checkpoint.shapes and not torch.equal(checkpoint.read("lm_head.weight").to(dtype), model.embed.weight.cpu()):
        raise CheckpointError(
            f"{checkpoint.path}: tie_word_embeddings is true, but lm_head.weight differs from the embedding; set it to false in config.json"
        )


def _read(checkpoint: Checkpoint, weight: Weight, dtype: torch.dtype) -> Tensor:
    """One of our tensors, in memory of its own: pages of a mapped file would change under us when the file does."""
    tensor = weight.form.join([checkpoint.read(name) for name in weight.parts])
    tensor = tensor.to(dtype, copy=len(weight.parts) == 1, memory_format=torch.contiguous_format)
    low, high = torch.aminmax(tensor)
    if not (low.isfinite() and high.isfinite()):
        raise CheckpointError(f"{checkpoint.path}: {' or '.join(weight.parts)} holds NaN or infinity as {DTYPES[dtype]}; fetch it again")
    return tensor


def _put(model: Model, name: str, tensor: Tensor) -> None:
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, nn.Parameter(tensor))


def _get(model: Model, name: str) -> Tensor:
    module, _, leaf = name.rpartition(".")
    owner = model.get_submodule(module)
    tensor = owner.plain() if leaf == "weight" and isinstance(owner, Leaf) else getattr(owner, leaf)
    assert isinstance(tensor, Tensor)
    return tensor


def _some(items: list[str]) -> str:
    return ", ".join(items[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")

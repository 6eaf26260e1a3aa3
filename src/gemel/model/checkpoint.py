"""Hugging Face directories: opening one without trusting it, and writing one that is whole or absent.

A directory is `config.json`, one or more safetensors files (with an index when there are several) and optionally `generation_config.json`.
Files are memory-mapped and read tensor by tensor. Pickled weights are refused: opening one runs whatever code it holds.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from gemel.config.errors import CheckpointError, UnsupportedError
from gemel.config.model import ModelConfig
from gemel.model import compressed
from gemel.model.families import family
from gemel.model.families.table import Weight
from gemel.model.stored import Stored

SHARD_BYTES = 4 * 2**30
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is open but not read: what the model is and what tensors there are, by their own names.

    `surplus` are patterns of names that may be there and are not needed.
    """

    path: Path
    config: ModelConfig
    weights: tuple[Weight, ...]
    stored: Mapping[str, Stored]
    surplus: tuple[str, ...]
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None


class _Slice(Protocol):
    def get_shape(self) -> list[int]: ...
    def get_dtype(self) -> str: ...


class _TensorFile(Protocol):
    """The part of safetensors' untyped handle that is used here."""

    def keys(self) -> list[str]: ...
    def get_slice(self, name: str) -> _Slice: ...
    def get_tensor(self, name: str) -> Tensor: ...


def open_directory(path: Path) -> Checkpoint:
    """Open a Hugging Face directory."""
    hf = read_json(path / "config.json")
    quantization = hf.get("quantization_config")
    low_bit = isinstance(quantization, dict) and quantization.get("quant_method") == compressed.METHOD
    kind = family(hf.get("model_type"))
    config = kind.config({key: value for key, value in hf.items() if not (low_bit and key == "quantization_config")})
    stored = {name: _stored(name, file) for file in map(_open, _weight_files(path)) for name in file.keys()}  # noqa: SIM118
    if isinstance(quantization, dict) and low_bit:
        stored = compressed.logical(quantization, str(path), stored)
    weights = kind.weights(config)
    if not any(name.startswith(kind.PREFIX) for name in stored):
        weights = tuple(Weight(w.name, tuple(part.removeprefix(kind.PREFIX) for part in w.parts), w.form) for w in weights)
    eos, bos = _end_and_start(path, hf)
    return Checkpoint(path, config, weights, stored, kind.SURPLUS, eos, bos)


def _stored(name: str, file: _TensorFile) -> Stored:
    header = file.get_slice(name)
    return Stored(tuple(header.get_shape()), _DTYPES.get(header.get_dtype(), torch.uint8), partial(file.get_tensor, name))


def read_json(path: Path) -> dict[str, object]:
    """The object in a JSON file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; a model is a Hugging Face directory or a .gguf file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}, not an object")
    return value


def _weight_files(path: Path) -> list[Path]:
    """The safetensors files, from the index if there is one."""
    if (path / _INDEX).exists():
        entries = read_json(path / _INDEX).get("weight_map")
        if not isinstance(entries, dict) or not entries:
            raise CheckpointError(f"{path / _INDEX} has no weight_map")
        files = sorted({str(file) for file in entries.values()})
        for file in files:
            if file in ("", ".", "..") or "/" in file or "\\" in file or "\0" in file:
                raise CheckpointError(f"{path / _INDEX} names the file {file!r}, which is not in its own directory")
        return [path / file for file in files]
    if (path / _SINGLE).exists():
        return [path / _SINGLE]
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
    if pickles:
        raise UnsupportedError(
            f"{path} holds pickled weights ({', '.join(pickles[:3])}), which can run code when opened; convert them where you trust them: "
            "transformers.AutoModelForCausalLM.from_pretrained(path).save_pretrained(new_path)"
        )
    raise CheckpointError(f"{path} has neither {_SINGLE} nor {_INDEX}")


def _open(path: Path) -> _TensorFile:
    try:
        return safetensors.safe_open(path, "pt")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; the index names it, so the download is incomplete") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file ({error}); fetch it again") from None


def _end_and_start(path: Path, hf: Mapping[str, object]) -> tuple[tuple[int, ...], int | None]:
    """End tokens and start token: generation_config.json where it says so, else config.json."""
    generation = read_json(path / "generation_config.json") if (path / "generation_config.json").exists() else {}

    def ids(key: str) -> tuple[int, ...]:
        value = generation.get(key, hf.get(key))
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in values):
            raise CheckpointError(f"{path}: {key} = {value!r} is not a token id or a list of them")
        return tuple(values)

    return ids("eos_token_id"), next(iter(ids("bos_token_id")), None)


def write_directory(path: Path, hf: Mapping[str, object], generation: Mapping[str, object], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write everything beside `path`, then rename: a reader sees a whole checkpoint or none. `path` must not exist, or be empty."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"{path} exists and is not an empty directory; save to another path or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        for name, value in (("config.json", hf), ("generation_config.json", generation)):
            (draft / name).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        _write_tensors(draft, tensors)
        draft.chmod(0o777 & ~_umask())
        draft.replace(path)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _write_tensors(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Safetensors files of at most SHARD_BYTES, and an index if there is more than one. Holds one file's tensors at a time."""
    shards: list[tuple[Path, list[str]]] = []
    total_bytes = 0
    for shard in _shards(tensors):
        file = path / f"{len(shards)}.safetensors"
        save_file(shard, file, metadata={"format": "pt"})
        shards.append((file, list(shard)))
        total_bytes += sum(tensor.nbytes for tensor in shard.values())
    if len(shards) == 1:
        shards[0][0].rename(path / _SINGLE)
        return
    home: dict[str, str] = {}
    for i, (file, names) in enumerate(shards, 1):
        final = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        file.rename(path / final)
        home |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": home}
    (path / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _shards(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if shard and sum(held.nbytes for held in shard.values()) + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard = {}
        # A copy: parts of a fused matrix share storage, which the format does not allow.
        shard[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    yield shard


def _umask() -> int:
    """The process's mask for new files, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask

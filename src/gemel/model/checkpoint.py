"""Hugging Face directories: opening one without trusting it, and writing one that is whole or absent.

A directory is `config.json`, one or more safetensors files (with an index when there are several) and optionally `generation_config.json`.
Files are memory-mapped and read tensor by tensor. Pickled weights are refused: opening one runs whatever code it holds.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import safetensors
import torch
from torch import Tensor

from gemel.config.errors import CheckpointError, UnsupportedError
from gemel.config.model import ModelConfig
from gemel.model import compressed
from gemel.model.families import family
from gemel.model.families.table import Weight
from gemel.model.stored import Stored
from gemel.model.tensor_file import CODES, Entry, TensorFile

SHARD_BYTES = 4 * 2**30
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_DTYPES = {code: dtype for dtype, code in CODES.items()}


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


def write_directory(
    path: Path,
    hf: Mapping[str, object],
    generation: Mapping[str, object],
    entries: Sequence[Entry],
    tensors: Iterable[tuple[str, Tensor]],
) -> None:
    """Write everything beside `path`, then rename: a reader sees a whole checkpoint or none. `path` must not exist, or be empty.

    `entries` announce the tensors, in their order. One tensor is held at a time.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"{path} exists and is not an empty directory; save to another path or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        for name, value in (("config.json", hf), ("generation_config.json", generation)):
            (draft / name).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        _write_tensors(draft, list(_shards(entries)), iter(tensors))
        draft.chmod(0o777 & ~_umask())
        draft.replace(path)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _write_tensors(path: Path, shards: Sequence[Sequence[Entry]], tensors: Iterator[tuple[str, Tensor]]) -> None:
    """The files of all shards, and an index if there is more than one."""
    home: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = _SINGLE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        home |= dict.fromkeys((entry.name for entry in shard), file)
        with TensorFile(path / file, shard, {"format": "pt"}) as opened:
            for _ in shard:
                opened.put(*next(tensors))
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(entry.num_bytes for shard in shards for entry in shard)}, "weight_map": home}
        (path / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _shards(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    """What goes into each file: at most SHARD_BYTES, in the order of the entries."""
    shard: list[Entry] = []
    for entry in entries:
        if shard and sum(held.num_bytes for held in shard) + entry.num_bytes > SHARD_BYTES:
            yield shard
            shard = []
        shard.append(entry)
    yield shard


def _umask() -> int:
    """The process's mask for new files, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask

"""A checkpoint with int8 weights as vLLM reads them: compressed-tensors, W8A8.

Weights are rounded to nearest with one scale per output row, the head stays as it is, and the configuration asks for activations that are
rounded to int8 per token while running, which is the only int8 scheme of vLLM's CPU kernels.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

_WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
_ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
_SCHEME = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": _WEIGHTS, "input_activations": _ACTIVATIONS}},
}


def write(source: Path, made: Path) -> None:
    """Write the directory `made` from the Hugging Face directory `source`, whose weights must be safetensors."""
    made.mkdir(parents=True, exist_ok=True)
    for path in source.glob("*.json*"):
        if not path.name.endswith(".index.json"):
            shutil.copy(path, made)
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(source.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            tensors |= _rounded(name, tensor) if ".layers." in name and name.endswith("_proj.weight") else {name: tensor}
    save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (made / "config.json").write_text(json.dumps(config | {"quantization_config": _SCHEME}, indent=1), encoding="utf-8")


def _rounded(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The int8 matrix [n, k] and its scales [n, 1]."""
    scale = weight.float().abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
    return {name: (weight.float() / scale).round().to(torch.int8), name + "_scale": scale.to(weight.dtype)}

"""Families of models that share the one definition, one file each, named like the checkpoint's `model_type`.

A family is how its configuration is spelt, in both directions, and a weight-name table. To add one, write its file and name it here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from gemel.config.errors import UnsupportedError
from gemel.config.model import ModelConfig
from gemel.model.families import bloom, gpt2, llama, mistral, qwen2, qwen3
from gemel.model.families.table import Weight


class Family(Protocol):
    """What a family's module offers.

    PREFIX begins most of its tensor names, and is missing from checkpoints saved without the head. SURPLUS are patterns of tensors that old
    checkpoints hold and nobody needs.
    """

    ARCHITECTURE: str
    PREFIX: str
    SURPLUS: tuple[str, ...]

    def config(self, hf: Mapping[str, object]) -> ModelConfig:
        """Theirs to ours."""
        ...

    def hf_config(self, config: ModelConfig) -> dict[str, object]:
        """Ours to theirs."""
        ...

    def weights(self, config: ModelConfig) -> tuple[Weight, ...]:
        """The weight-name table."""
        ...


FAMILIES: Mapping[str, Family] = {"bloom": bloom, "gpt2": gpt2, "llama": llama, "mistral": mistral, "qwen2": qwen2, "qwen3": qwen3}


def family(name: object) -> Family:
    """The family of that `model_type`."""
    if not isinstance(name, str) or name not in FAMILIES:
        raise UnsupportedError(f"model_type = {name!r} is not supported; these are: {', '.join(FAMILIES)}")
    return FAMILIES[name]

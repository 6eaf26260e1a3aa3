"""Gemel: one model definition for the whole life of a large language model, from raw text to a quantized service.

The names below are the library's front door; they are imported on first use, so that `import gemel` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemel.config.engine import EngineConfig
    from gemel.config.sampling import SamplingParams
    from gemel.llm.offline import LLM
    from gemel.llm.online import AsyncLLM

__version__ = "0.1.0"
__all__ = ["LLM", "AsyncLLM", "EngineConfig", "SamplingParams", "__version__"]

_HOME = {
    "LLM": "gemel.llm.offline",
    "AsyncLLM": "gemel.llm.online",
    "EngineConfig": "gemel.config.engine",
    "SamplingParams": "gemel.config.sampling",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gemel' has no attribute {name!r}; it offers {', '.join(__all__)}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)

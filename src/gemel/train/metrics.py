"""What a run says about itself while it goes: a line of JSON for every step, and where asked for the same numbers for TensorBoard.

A run that is taken up from a checkpoint cuts the file back to where it was then, so that a step that was done twice is there once.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

FILE = "metrics.jsonl"


class Metrics:
    """Writes metrics.jsonl."""

    def __init__(self, out: Path, num_bytes: int = 0):
        """`num_bytes` of what is there stay."""
        self._file = (out / FILE).open("ab")
        os.truncate(out / FILE, num_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    @property
    def num_bytes(self) -> int:
        """So far."""
        return self._file.tell()

    def write(self, values: dict[str, Any]) -> None:
        """One line, there at once for whoever follows the file."""
        self._file.write(json.dumps(values).encode() + b"\n")
        self._file.flush()

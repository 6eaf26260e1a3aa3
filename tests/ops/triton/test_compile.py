"""The interpreter runs Python; what the compiler thinks of it is another matter, and it needs no GPU to say so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed: pip install triton")
def test_kernels_compile_and_keep_their_numbers_in_registers(tmp_path: Path) -> None:
    """For GPUs of compute capability 9.0; `bench/gpu_ops.py --compile` does it for any, and for every variant."""
    command = [sys.executable, "bench/gpu_ops.py", "--compile", "90", "--only", "rms_norm of heads,rope,swiglu,ALiBi,head,adamw", "--json"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    kernels = json.loads(done.stdout.splitlines()[-1])["made"]
    assert {kernel["name"] for kernel in kernels} == {
        *("norm.forward", "norm.backward", "rotary.turn", "activation.forward", "activation.backward"),
        *("attention.forward", "attention.backward_queries", "attention.backward_keys", "head_loss.cross_entropy", "optimizer.step"),
    }
    assert all(kernel["spilled_bytes"] <= 64 for kernel in kernels)

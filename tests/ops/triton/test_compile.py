"""The interpreter runs Python; what the compiler thinks of its types and shapes is another matter, and takes no GPU to learn.

For GPUs of compute capability 9.0, up to the point where those are checked; `bench/gpu_ops.py --compile` goes all the way, for any.
"""

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
def test_the_compiler_takes_every_kernel() -> None:
    command = [sys.executable, "bench/gpu_ops.py", "--compile", "90", "--translate", "--json"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    names = [kernel["name"] for kernel in json.loads(done.stdout.splitlines()[-1])["made"]]
    assert set(names) == {
        *("norm.forward", "norm.backward", "rotary.turn", "activation.forward", "activation.backward"),
        *("attention.forward", "attention.backward_queries", "attention.backward_keys", "head_loss.cross_entropy", "optimizer.step"),
    }
    assert names.count("attention.forward") == 4  # heads of 64 and 128, a window, slopes
    assert names.count("optimizer.step") == 2  # fp32, and bf16 with its halves and rounded at random

"""The same tests twice: Triton's interpreter runs the kernels on CPU tensors, the device runs what was compiled from them.

The interpreter knows no products of bf16; narrow products are tested in fp16 there.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if find_spec("triton") is None:
        pytest.skip("triton is not installed: pip install triton")
    from triton import knobs

    if request.param == "cpu" and not knobs.runtime.interpret:
        pytest.skip("kernels are compiled for the device here; TRITON_INTERPRET=1 interprets them")
    return torch.device(request.param)

"""That the operations of training come here, and that a model's gradients are then what they were."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from itertools import accumulate, chain
from typing import Any

import pytest
import torch
from torch import Tensor

from gemel.model.attend import PackedAttend
from gemel.ops import train, triton
from tests import tiny
from tests.tolerance import assert_close

OPERATIONS = ("rms_norm", "rope", "swiglu", "packed_attention", "head_cross_entropy")


def gradients(device: torch.device) -> dict[str, Tensor]:
    loaded, documents = tiny.build("qk_norm", device=device.type), tiny.documents(5, 9)
    model = loaded.model.requires_grad_(True)
    tokens_T = torch.tensor(list(chain(*documents)), device=device)
    positions_T = torch.cat([torch.arange(len(document), device=device) for document in documents])
    starts = tuple(accumulate(map(len, documents), initial=0))
    hidden_TD = model(tokens_T, positions_T, PackedAttend(model.config, starts))
    weights_T = torch.linspace(0, 1, len(tokens_T), device=device)
    train.head_cross_entropy(hidden_TD, model.head.weight, tokens_T.roll(-1), weights_T, 1e-3)[0].backward()
    return {name: parameter.grad.cpu() for name, parameter in model.named_parameters()}


def test_gradients_of_a_model(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    want = gradients(torch.device("cpu"))
    called = set()

    def seen(name: str, operation: object, *given: object) -> object:
        called.add(name)
        return operation(*given)

    for name in OPERATIONS:
        monkeypatch.setattr(triton, name, partial(seen, name, getattr(triton, name)))
    if device.type == "cpu":
        monkeypatch.setattr(triton, "takes", lambda *tensors: tensors[0].numel() > 0)
    got = gradients(device)
    assert called == set(OPERATIONS)
    assert got.keys() == want.keys()
    for name in want:
        assert_close(got[name], want[name], "fp32_reference")


@pytest.mark.parametrize("operation", ["rms_norm", "swiglu"])
def test_done_again(operation: str, device: torch.device) -> None:
    """What may be asked for instead of being kept, see `train.recompute`."""
    x_T2F = torch.randn(3, 8).to(device).requires_grad_()
    y = triton.rms_norm(x_T2F, torch.full((8,), 2.0, device=device), 1e-5) if operation == "rms_norm" else triton.swiglu(x_T2F)
    node: Any = y.grad_fn
    assert_close(node._forward_cls.again(node), y, "exact")


def test_what_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing on a CPU, even where the kernels could be interpreted; on a device whatever is plain, alike, and of a type that they know."""
    assert not triton.takes(torch.ones(3))
    monkeypatch.setattr(triton, "why_not", lambda device: None)
    on_gpu = partial(torch.empty, 3, device="cuda" if torch.cuda.is_available() else "meta")
    monkeypatch.setattr(triton, "DEVICE", on_gpu().device.type)
    assert triton.takes(on_gpu(), None, torch.nn.Parameter(on_gpu()))
    assert not triton.takes(on_gpu(), torch.ones(3))
    assert not triton.takes(on_gpu(), on_gpu(dtype=torch.bfloat16))
    assert not triton.takes(on_gpu(dtype=torch.float64))
    assert not triton.takes(on_gpu()[:0])
    monkeypatch.setattr(triton, "why_not", lambda device: "of something")
    assert not triton.takes(on_gpu())


def test_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    why_not, device = triton.why_not.__wrapped__, torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(triton, "find_spec", lambda name: object())
    assert why_not(device) == "compute capability 7.5, Triton supports 8.0 and later"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert why_not(device) is None
    monkeypatch.setattr(triton, "find_spec", lambda name: None)
    assert why_not(device) == "triton is not installed"


def test_nobody_waits_for_triton_who_does_not_need_it() -> None:
    code = "import sys, gemel.ops, torch; gemel.ops.rms_norm(torch.ones(2, 2), torch.ones(2), 1e-5); assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed: pip install triton")
def test_all_names_lead_somewhere() -> None:
    assert all(hasattr(triton, name) for name in triton.__all__)
    assert not hasattr(triton, "layer_norm")

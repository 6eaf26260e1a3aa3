"""Products in fp8, as far as they can be seen without a GPU: what is missing is named, and emulated ones are near."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from gemel.config.compute import FP8
from gemel.config.errors import ConfigError, UnsupportedError
from gemel.model.build import load
from gemel.train import metrics, precision
from tests import tiny
from tests.tolerance import assert_close
from tests.train import runs
from tests.train.test_run import go
from tests.train.test_trainer import trainer

FP8_CONFIG = FP8(kind="fp8")


def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough of torchao to be found."""
    for name in ("torchao", "torchao.float8", "torchao.float8.float8_linear"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["torchao.float8"].Float8LinearConfig = sys.modules["torchao.float8.float8_linear"].Float8Linear = object  # type: ignore[attr-defined]


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(UnsupportedError, match=r"precision\.kind = 'fp8' needs a package: pip install torchao; or take kind = 'bf16'"):
        trainer(tmp_path, precision={"kind": "fp8"})
    fake(monkeypatch)
    with pytest.raises(UnsupportedError, match=r"needs a GPU of compute capability 8\.9 or more, not cpu"):
        trainer(tmp_path, precision={"kind": "fp8"})


def test_fp8_is_bf16_but_for_the_blocks() -> None:
    numbers = precision.Numbers(FP8_CONFIG, torch.float32, torch.device("cpu"))
    assert numbers.dtype == torch.bfloat16 and numbers.scale == 1.0


def rounded(x: Tensor, kind: torch.dtype) -> Tensor:
    """To fp8 with the scale that makes the largest number of a tensor the largest of the type."""
    scale = torch.finfo(kind).max / x.abs().max()
    return (x * scale).to(kind).double() / scale


def test_emulated_products_are_those_of_rounded_factors() -> None:
    """Forwards with 3 bits behind the leading one, the gradient that comes back with 2 and more range."""
    pytest.importorskip("torchao")
    model = tiny.build().model.requires_grad_(True)
    precision.in_fp8(FP8_CONFIG, model, torch.device("cpu"), emulate=True)
    leaf, generator = model.layers[0].mlp.down, torch.Generator().manual_seed(0)
    x, grad = torch.randn(16, 48, generator=generator).requires_grad_(), torch.randn(16, 32, generator=generator)
    weight = rounded(leaf.weight.detach(), torch.float8_e4m3fn)
    y = leaf(x)
    y.backward(grad)
    assert_close(y, rounded(x.detach(), torch.float8_e4m3fn) @ weight.t(), "fp32_reorder")
    assert_close(x.grad, rounded(grad, torch.float8_e5m2) @ weight, "fp32_reorder")
    assert_close(leaf.weight.grad, rounded(grad, torch.float8_e5m2).t() @ rounded(x.detach(), torch.float8_e4m3fn), "fp32_reorder")
    assert leaf.sections == tiny.build().model.layers[0].mlp.down.sections and type(model.head).__name__ == "Linear"


@pytest.mark.parametrize("scaling", ["tensorwise", "rowwise"])
def test_emulated_runs_learn_and_are_saved(scaling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")
    real = precision.in_fp8
    monkeypatch.setattr(precision, "in_fp8", lambda *args: real(*args, emulate=True))
    go(runs.recipe(tmp_path, steps=40, precision={"kind": "fp8", "scaling": scaling}, optim__method={"kind": "muon"}))
    losses = [line["loss"] for line in metrics.read(tmp_path / "out")]
    assert losses[-1] < 0.7 * losses[0]
    assert load(tmp_path / "out" / "latest").config.num_layers == 2


def test_widths_that_do_not_fit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")
    model = tiny.build(ffn_width=50).model
    with pytest.raises(ConfigError, match=r"a matrix of 100 x 32 cannot be multiplied in fp8"):
        precision.in_fp8(FP8_CONFIG, model, torch.device("cpu"), emulate=True)


@pytest.mark.gpu
def test_gradients_on_a_gpu_are_near(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    loaded = tiny.build()
    model = loaded.model.cuda().requires_grad_(True)
    precision.in_fp8(FP8_CONFIG, model, torch.device("cuda"))
    x = torch.randn(64, 32, device="cuda", dtype=torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        y = model.layers[0].mlp(x)
    want = tiny.build().model.cuda().layers[0].mlp(x.float())
    assert ((y - want).norm() / want.norm()).item() < 0.1

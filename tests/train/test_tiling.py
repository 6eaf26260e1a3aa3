"""Products in parts: the same gradients, and less that is kept for the backward pass."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from gemel.config.errors import ConfigError
from gemel.model.build import load, save
from gemel.model.leaves.linear import Linear
from gemel.train.tiling import TiledLinear
from tests import tiny
from tests.tolerance import assert_close
from tests.train import runs
from tests.train.test_trainer import DOCUMENTS, Kept, assert_same_gradients, gradients, trainer

OUTPUTS, TOKENS = {"kind": "outputs", "tiles": 3}, {"kind": "tokens", "tokens": 16}


@pytest.mark.parametrize("tiling", [OUTPUTS, OUTPUTS | {"match": "layers.0.mlp.*", "tiles": 200}, TOKENS, TOKENS | {"tokens": 1000}])
@pytest.mark.parametrize("kind", ["gqa", "learned"])
@pytest.mark.parametrize("activations", [{"kind": "none"}, {"kind": "recompute"}])
def test_gradients_are_those_of_the_whole(tiling: dict[str, Any], kind: str, activations: dict[str, Any], tmp_path: Path) -> None:
    want = gradients(trainer(tmp_path, kind), runs.batch(*DOCUMENTS))
    got = gradients(trainer(tmp_path, kind, tiling=tiling, activations=activations), runs.batch(*DOCUMENTS))
    assert_close(torch.tensor(got[0]), torch.tensor(want[0]), "fp32_reorder")
    assert_same_gradients(got[1], want[1], "fp32_reorder")


@pytest.mark.parametrize("tiling", [OUTPUTS, TOKENS])
@pytest.mark.parametrize("changes", [{"precision": {"kind": "bf16"}}, {"precision": {"kind": "bf16"}, "optim__weights": "master"}])
def test_narrow_products_in_parts_are_narrow_products(tiling: dict[str, Any], changes: dict[str, Any], tmp_path: Path) -> None:
    want = gradients(trainer(tmp_path, **changes), *(runs.batch(document) for document in DOCUMENTS))
    got = gradients(trainer(tmp_path, tiling=tiling, **changes), *(runs.batch(document) for document in DOCUMENTS))
    assert_same_gradients(got[1], want[1], "bf16_reorder")
    assert {name: g.dtype for name, g in got[1].items()} == {name: g.dtype for name, g in want[1].items()}


def test_products_in_parts_against_finite_differences() -> None:
    """Ten outputs in four parts, the last of them smaller."""
    leaf = Linear(7, 10, bias=True).double()
    tiled, x = TiledLinear(leaf, 4), torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    weight, bias = (parameter.detach().clone().requires_grad_() for parameter in leaf.parameters())
    assert torch.autograd.gradcheck(
        lambda *args: torch.func.functional_call(tiled, {"weight": args[1], "bias": args[2]}, args[0]), (x, weight, bias)
    )
    assert_close(tiled(x), leaf(x), "fp32_reorder")


def kept_bytes(folder: Path, *, num_tokens: int = 0, **changes: Any) -> int:
    """By autograd, between a forward and a backward pass, besides the parameters."""
    made, kept = trainer(folder, loaded=tiny.build(num_layers=3), activations={"kind": "none"}, **changes), Kept()
    weights = {p.untyped_storage().data_ptr() for p in made.loaded.model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda x: x):
        made._loss(runs.batch(*(DOCUMENTS if not num_tokens else [list(range(num_tokens))])), 1.0, 0.0)
    return sum(size for where, size in kept.storages.items() if where not in weights)


def test_tokens_in_parts_keep_no_inner_activations(tmp_path: Path) -> None:
    """Of a SwiGLU of width 48 at least gate, up, and their product, in fp32, per token and layer."""
    num_tokens = sum(map(len, DOCUMENTS)) - len(DOCUMENTS)
    assert kept_bytes(tmp_path) - kept_bytes(tmp_path, tiling=TOKENS) >= 3 * num_tokens * 3 * 48 * 4


def test_outputs_in_parts_keep_no_narrow_weights(tmp_path: Path) -> None:
    """Autocast keeps the copies in bf16 that the backward pass multiplies with; their tiles are made again."""
    num_weights = sum(p.numel() for p in tiny.build(num_layers=3).model.layers.parameters() if p.dim() == 2)
    autocast = {"precision": {"kind": "bf16"}, "num_tokens": 3}
    assert kept_bytes(tmp_path, **autocast) - kept_bytes(tmp_path, tiling=OUTPUTS, **autocast) > 0.9 * 2 * num_weights


def test_a_tiled_model_is_saved_as_it_was(tmp_path: Path) -> None:
    loaded = tiny.build()
    made = trainer(tmp_path, loaded=copy.deepcopy(loaded), tiling=OUTPUTS)
    save(made.loaded, tmp_path / "model")
    again = dict(load(tmp_path / "model").model.named_parameters())
    assert all(torch.equal(p, again[name]) for name, p in loaded.model.named_parameters())
    assert made.loaded.model.layers[0].attn.qkv.sections == loaded.model.layers[0].attn.qkv.sections


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tiling": {"kind": "outputs", "match": "blocks.*"}}, r"no matrix is named like 'blocks\.\*'; there are: "),
        ({"tiling": {"kind": "outputs", "tiles": 1}}, r"tiles = 1: Input should be greater than or equal to 2"),
        ({"tiling": OUTPUTS, "compile": {"kind": "blocks"}}, r"leave tiling or compile out"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        trainer(tmp_path, **changes)

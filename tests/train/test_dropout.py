"""Dropout: the right share, where it belongs, the same again when it is computed again, and never when validating."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gemel.config.train import DropoutConfig
from gemel.train.dropout import Dropout, Placed
from tests import tiny
from tests.tolerance import CHI_SQUARE_P, assert_close
from tests.train import runs
from tests.train.test_trainer import DOCUMENTS, assert_same_gradients, gradients, trainer

BOTH = {"embedding": 0.3, "residual": 0.2}


def test_the_share_that_is_zero_and_the_rest_as_much_larger(tmp_path: Path) -> None:
    """What is dropped of the first block's input and of the parts' outputs, by hooks behind ours."""
    made = trainer(tmp_path, loaded=tiny.build("learned", num_layers=2), dropout=BOTH)
    model, seen = made.loaded.model, dict[str, tuple[Tensor, Tensor]]()
    plain = copy.deepcopy(model)
    for block in plain.layers:
        for module in (block, block.attn, block.mlp):
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
    tokens = torch.arange(90).repeat(8)
    batch = runs.batch(*(tokens[i : i + 100].tolist() for i in range(0, 720, 100)))
    stream_TD = model.embed(batch.tokens_T) + model.positions(batch.positions_T)
    model.layers[0].register_forward_pre_hook(lambda _, args: seen.update(stream=(args[0], stream_TD)))
    for name in ("attn", "mlp"):
        part, without = model.layers[0].get_submodule(name), plain.layers[0].get_submodule(name)
        part.register_forward_hook(lambda _, args, out, name=name, without=without: seen.update({name: (out, without(*args))}))
    made._loss(batch, 1.0, 0.0)
    for name, share in (("stream", 0.3), ("attn", 0.2), ("mlp", 0.2)):
        got, want = seen[name]
        zero = got == 0
        deviation = (zero.sum() - share * zero.numel()) / (share * (1 - share) * zero.numel()) ** 0.5
        assert torch.special.erfc(deviation.abs() / 2**0.5) > CHI_SQUARE_P
        assert_close(got[~zero], want[~zero] / (1 - share), "fp32_reorder")
    assert set(seen) == {"stream", "attn", "mlp"}


def test_validation_drops_nothing(tmp_path: Path) -> None:
    batch = runs.batch(*DOCUMENTS)
    assert trainer(tmp_path, dropout=BOTH).validate([batch]) == trainer(tmp_path).validate([batch])
    assert gradients(trainer(tmp_path, dropout=BOTH), batch)[0] != gradients(trainer(tmp_path), batch)[0]


@pytest.mark.parametrize("activations", [{"kind": "recompute"}, {"kind": "recompute", "blocks": "sqrt"}, {"kind": "selective"}])
def test_what_is_recomputed_is_dropped_again(activations: dict[str, Any], tmp_path: Path) -> None:
    found = []
    for changes in ({}, {"activations": activations}):
        made = trainer(tmp_path, loaded=tiny.build(num_layers=3), dropout=BOTH, **changes)
        found.append(gradients(made, runs.batch(*DOCUMENTS)))
    assert found[0][0] == found[1][0]
    assert_same_gradients(found[1][1], found[0][1], "exact")


def test_micro_batches_drop_what_the_whole_does(tmp_path: Path) -> None:
    """And another step, or another seed, something else."""
    places = list(range(0, 100 * len(DOCUMENTS), 100))
    cut = [runs.batch(document, places=[place]) for document, place in zip(DOCUMENTS, places, strict=True)]
    whole, parts = (gradients(trainer(tmp_path, dropout=BOTH), *batches) for batches in ([runs.batch(*DOCUMENTS, places=places)], cut))
    assert_close(torch.tensor(parts[0]), torch.tensor(whole[0]), "fp32_cut")
    assert_same_gradients(parts[1], whole[1], "fp32_cut")
    later = trainer(tmp_path, dropout=BOTH)
    later.step = 1
    others = gradients(later, *cut)[0], gradients(trainer(tmp_path, dropout=BOTH, seed=1), *cut)[0]
    assert len({parts[0], *others}) == 3


def test_what_is_dropped_of_tokens_and_widths_is_as_good_as_random() -> None:
    """Rows and columns have their share, and masks of other tokens, steps and places in the model agree by chance."""
    shape, share = (1000, 500), 0.3

    def mask(first: int, step: int, site: str, layer: int) -> Tensor:
        placed = Placed(lambda *_: torch.empty(0), torch.arange(first, first + shape[0]), 7, step)
        dropout = Dropout(DropoutConfig(residual=share), tiny.build().model)
        dropout._begin(torch.empty(shape), placed, layer, (site,))
        return dropout._drop(torch.ones(shape, requires_grad=True), share, site) == 0

    def deviation(hits: Tensor, chance: float) -> Tensor:
        return (hits.double().mean() - chance) / (chance * (1 - chance) / hits.numel()) ** 0.5

    found = mask(0, 3, "attn", 1)
    for other in (
        mask(1000, 3, "attn", 1),
        mask(0, 4, "attn", 1),
        mask(0, 3, "mlp", 1),
        mask(0, 3, "attn", 0),
        found.roll(1, 0),
        found.roll(1, 1),
    ):
        assert torch.special.erfc(deviation(other & found, share**2).abs() / 2**0.5) > CHI_SQUARE_P
    for dim in (0, 1):
        num = shape[1 - dim]
        z = (found.double().sum(1 - dim) - share * num) / (share * (1 - share) * num) ** 0.5
        degrees = z.numel()
        assert torch.special.gammaincc(torch.tensor(degrees / 2).double(), z.square().sum() / 2) > CHI_SQUARE_P
    assert torch.equal(mask(200, 3, "attn", 1)[:800], found[200:])

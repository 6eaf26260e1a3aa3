"""What ranks check of context parallel: the gradients of the whole model are those of one process."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gemel.config.errors import ConfigError
from gemel.model.attend import Attend, PackedAttend
from gemel.model.build import LoadedModel
from gemel.ops import head_cross_entropy
from gemel.train.batch import Batch
from gemel.train.parallel import context
from gemel.train.parallel.context import Layout, RingAttend, UlyssesAttend
from tests import tiny
from tests.tolerance import assert_close
from tests.train import runs
from tests.train.parallel import ranks

# Documents of which one crosses every border between ranks, some lie within a piece, and tokens do not divide over ranks.
CROSSING = runs.batch(*tiny.documents(4, 90, 3, 2, 31, 7))
LONG = runs.batch(*tiny.documents(122))
FEW = runs.batch(*tiny.documents(4, 3))  # fewer tokens than pieces


def gradients(model: torch.nn.Module, batch: Batch, attend: Attend, weight: float) -> dict[str, Tensor]:
    hidden_TD = model(batch.tokens_T, batch.positions_T, attend)
    loss, _ = head_cross_entropy(hidden_TD, model.head.weight, batch.targets_T, batch.weights_T / weight, z_loss=1e-3)
    loss.backward()
    grads = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters()}
    return grads | {"loss": loss.detach()[None]}


def built(kind: str) -> LoadedModel:
    loaded = tiny.build(kind, windows=(40, 7) if kind == "window" else ())
    loaded.model.requires_grad_(True)
    return loaded


def same(kind: str, batch: Batch, way: str) -> None:
    loaded = built(kind)
    want = gradients(copy.deepcopy(loaded.model), batch, PackedAttend(loaded.config, batch.starts), batch.weight)
    layout = (Layout.zigzag if way == "ring" else Layout.even)(batch.starts, dist.get_world_size())
    part = layout.part(batch, dist.get_rank())
    attend = (RingAttend if way == "ring" else UlyssesAttend)(loaded.config, layout, dist.group.WORLD)
    got = gradients(loaded.model, part, attend, batch.weight)
    for name, gradient in got.items():
        dist.all_reduce(gradient)
        assert_close(gradient, want[name], "fp32_parallel")


def ring() -> None:
    for kind in ("gqa", "window", "alibi", "qk_norm"):
        same(kind, CROSSING, "ring")
    same("mqa", LONG, "ring")
    same("window", LONG, "ring")
    same("gqa", FEW, "ring")
    with pytest.MonkeyPatch.context() as patch:  # what devices without our kernels do; in slices of a few queries
        patch.setattr(context, "fit", lambda *_: None)
        patch.setattr(context, "SCORE_BYTES", 2000)
        same("gqa", CROSSING, "ring")
        same("window", CROSSING, "ring")


def ulysses() -> None:
    for kind in ("gqa", "mqa", "window", "alibi"):
        same(kind, CROSSING, "ulysses")
    same("gqa", FEW, "ulysses")
    if dist.get_world_size() == 4:
        config = tiny.CONFIGS["gqa"].model_copy(update={"num_heads": 6})
        attend = UlyssesAttend(config, Layout.even((0, 8), 4), dist.group.WORLD)
        with pytest.raises(ConfigError, match=r"parallel.context = 4 .* 6 query and 2 key heads; sizes that do: 1, 2, 3"):
            attend(0, torch.zeros(2, 6, 8), torch.zeros(2, 2, 8), torch.zeros(2, 2, 8))


if __name__ == "__main__":
    ranks.main(ring, ulysses)

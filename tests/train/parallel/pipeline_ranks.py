"""What ranks check of pipeline parallel: every schedule gives the loss and the gradients of one process."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gemel.config.errors import ConfigError
from gemel.config.parallel import GPipe, Interleaved, OneFOneB, Pipeline, ZeroBubble
from gemel.model.attend import PackedAttend
from gemel.model.build import LoadedModel
from gemel.ops import head_cross_entropy
from gemel.train import precision
from gemel.train.batch import Batch
from gemel.train.parallel.mesh import Axis
from gemel.train.parallel.pipeline import Pipeline as Stages
from tests import tiny
from tests.tolerance import assert_close
from tests.train import runs
from tests.train.parallel import ranks

# Micro-batches of unequal length, in which unequal shares are trained: their means have another mean.
LENGTHS = ((9, 4, 17), (30,), (2, 2, 5, 3), (11, 12))
BATCHES = [
    runs.batch(*tiny.documents(*lengths), trained=[[(i + j) % (i + 2) != 0 for j in range(n - 1)] for n in lengths])
    for i, lengths in enumerate(LENGTHS)
]


def schedules(size: int) -> list[Pipeline]:
    return [
        GPipe(kind="gpipe", stages=size),
        OneFOneB(kind="1f1b", stages=size),
        Interleaved(kind="interleaved", stages=size, chunks=2),
        ZeroBubble(kind="zero_bubble", stages=size),
        ZeroBubble(kind="zero_bubble", stages=size, chunks=2),
    ]


def built(kind: str) -> LoadedModel:
    loaded = tiny.build(kind, num_layers=2 * dist.get_world_size() + 1)
    loaded.model.requires_grad_(True)
    return loaded


def loss_of(head: torch.nn.Module, weight: float, hidden_TD: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    return head_cross_entropy(hidden_TD, head.weight, batch.targets_T, batch.weights_T / weight, z_loss=1e-3, label_smoothing=0.1)


def plain(model: torch.nn.Module, batches: list[Batch]) -> tuple[float, float, dict[str, Tensor]]:
    loss = z = 0.0
    weight = sum(batch.weight for batch in batches)
    for batch in batches:
        hidden_TD = model(batch.tokens_T, batch.positions_T, PackedAttend(model.config, batch.starts))
        batch_loss, batch_z = loss_of(model.head, weight, hidden_TD, batch)
        batch_loss.backward()
        loss, z = loss + batch_loss.item(), z + batch_z.item()
    return loss, z, {name: p.grad for name, p in model.named_parameters()}


def same(kind: str, schedule: Pipeline, batches: list[Batch], steps: int = 1) -> None:
    whole, loaded = copy.deepcopy(built(kind).model), built(kind)
    want_loss, want_z, want = plain(whole, batches)
    model, weight = loaded.model, sum(batch.weight for batch in batches)
    pipeline = Stages(model, schedule, Axis("pipeline", dist.get_rank(), schedule.stages, dist.group.WORLD), 32, torch.device("cpu"))
    precision.add_up_in_fp32(model.parameters())
    work = [(batch, PackedAttend(loaded.config, batch.starts)) for batch in batches]
    for _ in range(steps):
        assert all(p.grad is None for p in model.parameters())
        looked, _ = pipeline.look(work, partial(loss_of, model.head, weight))
        loss, z = pipeline.learn(work, partial(loss_of, model.head, weight))
        for got, number in ((looked, want_loss), (loss, want_loss), (z, want_z)):
            dist.all_reduce(got)
            assert_close(got, torch.tensor(number), "fp32_parallel")
        got_names = {name: p.grad for name, p in model.named_parameters()}
        for name, gradient in got_names.items():
            assert_close(gradient, want[name], "fp32_parallel")
        names: list[set[str]] = [set()] * dist.get_world_size()
        dist.all_gather_object(names, got_names.keys() - pipeline.spoken_for)
        assert sorted(name for some in names for name in some) == sorted(want)  # every parameter somewhere, none twice
        for parameter in model.parameters():
            parameter.grad = None


def gradients() -> None:
    """Of models with a head of their own and rotation; tied, with learned positions and biases; tied, with a norm behind the embedding."""
    for schedule in schedules(dist.get_world_size()):
        same("gqa", schedule, BATCHES)
    same("gqa", ZeroBubble(kind="zero_bubble", stages=dist.get_world_size()), BATCHES[:1], steps=2)
    same("learned", OneFOneB(kind="1f1b", stages=dist.get_world_size()), BATCHES)
    same("alibi", ZeroBubble(kind="zero_bubble", stages=dist.get_world_size()), BATCHES)


def refusals() -> None:
    size = dist.get_world_size()
    loaded = tiny.build("gqa", num_layers=2 * size - 1)
    with pytest.raises(ConfigError, match=rf"{2 * size} stages \({size} ranks with 2 each\), the model has {2 * size - 1} layers"):
        Stages(
            loaded.model,
            Interleaved(kind="interleaved", stages=size),
            Axis("pipeline", dist.get_rank(), size, dist.group.WORLD),
            32,
            torch.device("cpu"),
        )


if __name__ == "__main__":
    ranks.main(gradients, refusals)

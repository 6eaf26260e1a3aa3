"""What a recipe may ask of a mesh: what is refused, and that the way out which is named works."""

from __future__ import annotations

import copy
import itertools
import re
from typing import Any

import pytest
import torch

from gemel.config.env import Place, place
from gemel.config.errors import ConfigError
from gemel.config.parallel import ParallelConfig
from gemel.model import shard
from gemel.model.leaves.linear import Linear
from gemel.model.pieces import Pieces, Share
from gemel.train.parallel.data import shares
from gemel.train.parallel.mesh import Mesh, check
from tests import tiny
from tests.train import runs


@pytest.mark.parametrize(
    ("mesh", "num_ranks", "way_out"),
    [
        ({"replicate": 2, "tensor": 2}, 8, {"replicate": 4}),
        ({"replicate": 4}, 1, {"replicate": 1}),
        ({}, 2, {"replicate": 2}),
        ({"shard": 4, "zero": "optimizer", "context": {"kind": "ring", "size": 2}}, 16, {"replicate": 2}),
    ],
)
def test_another_number_of_processes_is_refused(mesh: dict[str, Any], num_ranks: int, way_out: dict[str, int]) -> None:
    config = ParallelConfig.parse(mesh)
    with pytest.raises(ConfigError, match=f"takes {config.num_ranks} process") as refused:
        check(config, num_ranks)
    check(config, config.num_ranks)
    check(ParallelConfig.parse(mesh | way_out), num_ranks)
    if num_ranks > 1:
        assert f"parallel.replicate = {way_out['replicate']}" in str(refused.value)


def test_a_number_that_no_replicas_make_up_is_rounded_up() -> None:
    with pytest.raises(ConfigError, match=r"start 4 and set parallel\.replicate = 2"):
        check(ParallelConfig(tensor=2), 3)
    check(ParallelConfig(tensor=2, replicate=2), 4)


@pytest.mark.parametrize(
    ("mesh", "match", "way_out"),
    [
        ({"shard": 2}, "shares nothing", {"replicate": 2, "shard": 1}),
        ({"shard": 2}, "shares nothing", {"zero": "parameters"}),
        ({"zero": "optimizer"}, "needs ranks to share between", {"shard": 2}),
        ({"sequence": True}, "needs tensor ranks", {"tensor": 2}),
        ({"context": {"kind": "ring", "size": 1}}, "greater than or equal to 2", {"context": {"kind": "none"}}),
        ({"pipeline": {"kind": "1f1b", "chunks": 2, "stages": 2}}, "has no key", {"pipeline": {"kind": "interleaved", "stages": 2}}),
    ],
)
def test_what_would_have_no_effect_is_refused(mesh: dict[str, Any], match: str, way_out: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=match):
        ParallelConfig.parse(mesh)
    ParallelConfig.parse(mesh | way_out)


def test_sequences_must_divide_among_ranks(tmp_path: Any) -> None:
    """The number of tokens that is named does, and fits the micro-batches."""
    changes = {"parallel": {"replicate": 3}, "batch__micro_tokens": 2 * runs.SEQUENCE}
    with pytest.raises(ConfigError, match="do not divide among the 3 ranks") as refused:
        runs.recipe(tmp_path, **changes)
    tokens = int(re.findall(r"(\d+) tokens would", str(refused.value))[0])
    assert runs.recipe(tmp_path, **changes, batch__tokens=tokens).batch.sequences % 3 == 0


@pytest.mark.parametrize("mesh", [{"tensor": 2}, {"shard": 2, "zero": "parameters"}, {"pipeline": {"kind": "gpipe", "stages": 2}}])
@pytest.mark.parametrize("lever", [{"offload__parameters": {"kind": "disk"}}, {"tiling": {"kind": "tokens"}}])
def test_what_needs_whole_layers_is_refused_where_they_are_cut(mesh: dict[str, Any], lever: dict[str, Any], tmp_path: Any) -> None:
    changes = {**lever, "save__asynchronous": False}
    with pytest.raises(ConfigError, match=r"which parallel\.tensor, pipeline and zero = 'parameters' cut; leave it out, or train with"):
        runs.recipe(tmp_path, parallel=mesh, **changes)
    for fits in ({"replicate": 2}, {"shard": 2, "zero": "gradients"}, {"context": {"kind": "ring", "size": 2}}):
        runs.recipe(tmp_path, parallel=fits, **changes)


def test_a_mesh_is_not_part_of_what_a_run_computes(tmp_path: Any) -> None:
    assert runs.recipe(tmp_path, parallel={"tensor": 2}).what() == runs.recipe(tmp_path).what()


@pytest.mark.parametrize(("kind", "size", "fits"), [("gqa", 4, "1, 2"), ("mha", 3, "1, 2"), ("mqa", 2, "1")])
def test_heads_are_not_cut(kind: str, size: int, fits: str) -> None:
    with pytest.raises(ConfigError, match=f"sizes that do: {fits}. More"):
        shard.check(tiny.CONFIGS[kind], size)
    shard.check(tiny.CONFIGS[kind], int(fits[-1]))


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_parts_make_up_the_whole(size: int) -> None:
    """Of every style, whether or not the vocabulary of 97 divides; a bias behind a product by rows stays with one part."""
    config = tiny.CONFIGS["learned"].model_copy(update={"num_heads": 30, "num_kv_heads": 30, "width": 30, "head_width": 1, "ffn_width": 60})
    from gemel.model.model import Model

    model = Model(config)
    cuts = shard.cuts(model)
    assert {cut.style for cut in cuts.values()} == {"column", "row", "vocabulary", "whole"}
    for name, parameter in model.named_parameters():
        boxes = [cuts[name].boxes(rank, size) for rank in range(size)]
        parts = [torch.cat([parameter[box] for box in one]) if one else None for one in boxes]
        assert [None if part is None else part.shape for part in parts] == [cuts[name].shape_of(rank, size) for rank in range(size)]
        if size == 1 or cuts[name].style == "whole":
            assert all(part is not None and torch.equal(part, parameter) for part in parts)
        else:
            Share(x=Pieces(parameter.shape, parameter.dtype, tuple((box, parameter) for one in boxes for box in one))).check()
            leaf = model.get_submodule(name.rpartition(".")[0])
            if isinstance(leaf, Linear) and name != "head.weight":
                for rank, part in enumerate(parts):
                    mine = copy.deepcopy(leaf)
                    mine.shard(cuts[name].style, rank, size)
                    got = getattr(mine, name.rpartition(".")[2])
                    assert (got is None and part is None) or torch.equal(got, part)


def test_shares_are_even_and_whole_where_they_must_be() -> None:
    """Every element has one owner; elementwise methods are cut between stretches, others not at all."""
    named = {f"p{i}": torch.nn.Parameter(torch.empty(size, device="meta")) for i, size in enumerate((10**6, 7, 3 * 10**6, 300_000))}
    sizes = {name: p.numel() for name, p in named.items()}
    for divisible in (True, False):
        found = shares(named, sizes, () if divisible else named, 4)
        assert sorted(found) == [0, 1, 2, 3]
        for name, size in sizes.items():
            spans = sorted((one.start, one.stop) for slices in found.values() for one in slices if one.name == name)
            assert spans[0][0] == 0 and spans[-1][1] == size and all(a[1] == b[0] for a, b in itertools.pairwise(spans))
            assert divisible or len(spans) == 1
            assert all(start % 2**18 == 0 for start, _ in spans)
        loads = [sum(one.stop - one.start for one in slices) for slices in found.values()]
        assert not divisible or max(loads) < 1.3 * sum(loads) / 4


def test_what_a_launcher_says() -> None:
    said = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}
    assert place({}) is None and place(said | {"WORLD_SIZE": "1"}) is None
    assert place(said) == Place(3, 1, 4, "a", 29500, False, 4)
    assert place(said | {"TORCHELASTIC_USE_AGENT_STORE": "True", "LOCAL_WORLD_SIZE": "2"}) == Place(3, 1, 4, "a", 29500, True, 2)
    for wrong, match in (
        ({"MASTER_PORT": ""}, "MASTER_PORT is not set"),
        ({"RANK": "x"}, "invalid literal"),
        ({"RANK": "4"}, "not one of"),
    ):
        with pytest.raises(ConfigError, match=match):
            place(said | wrong)


def test_alone_nothing_is_asked() -> None:
    with Mesh() as mesh:
        assert mesh.sum([1.5, 2.0]) == [1.5, 2.0] and mesh.any(True) and not mesh.any(False) and mesh.from_first("x") == "x" and mesh.first
        assert not torch.distributed.is_initialized()

"""Trainers of one tiny model on many meshes, compared with one process. Run as a program: the ranks are forked once everything is imported,
which is possible only before torch has started threads, so this process computes nothing itself.

For every mesh of so many ranks: the gradients of a step in one micro-batch and in four, the losses of some steps, weights and states behind
them, and what becomes of these when they are saved and loaded on another mesh, and saved there and loaded on the first again. Rank 0 writes
what it found to a file, for the tests to judge.
"""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # what fully_shard would import in each rank
import torch.distributed as dist
import torch.distributed.fsdp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from gemel.config.compute import ToMemory
from gemel.config.parallel import ParallelConfig
from gemel.config.train import SaveConfig
from gemel.model import build
from gemel.model.build import LoadedModel
from gemel.model.pieces import Share
from gemel.train import offload, precision
from gemel.train.checkpoint import Checkpoints
from gemel.train.loader import Step
from gemel.train.optim import optimizer
from gemel.train.parallel import data
from gemel.train.parallel.mesh import Mesh
from gemel.train.trainer import Trainer
from tests import tiny
from tests.train import runs

LENGTHS = (9, 4, 17, 2, 11, 7, 5, 13, 8, 3, 6, 12, 10, 4, 9, 15)
STRETCH = 256  # so small that tiny parameters are cut into several


@dataclass(frozen=True)
class Case:
    kind: str  # of model
    mesh: dict[str, Any]
    onto: str  # the mesh of another case, that goes on from what this one saved
    changes: dict[str, Any] = field(default_factory=dict)
    steps: int = 3
    exact: bool = False  # whether one process, with as many micro-batches as there are ranks with other sequences, has the same bits


def model(kind: str) -> LoadedModel:
    """Of a family whose checkpoints can say what it is."""
    return tiny.build(kind, **({"family": "qwen2", "qkv_bias": True} if kind == "window" else {}))


ZERO3 = {"shard": 2, "zero": "parameters"}
UNCLIPPED = {"optim__clip": {"kind": "none"}}
DROPOUT = {"dropout": {"embedding": 0.1, "residual": 0.2}}
NARROW = UNCLIPPED | {"precision": {"kind": "bf16"}}
IN_MEMORY = {"offload": {"optimizer": {"kind": "cpu"}, "parameters": {"kind": "cpu"}}}
ON_DISK = {"offload": {"optimizer": {"kind": "disk"}, "parameters": {"kind": "disk"}}, "save__asynchronous": False}
STATE_ON_DISK = {"offload": {"optimizer": {"kind": "disk"}}, "save__asynchronous": False}
STOCHASTIC = NARROW | {"optim__weights": "stochastic", "optim__state": "bf16"}
SELECTIVE = {"activations": {"kind": "selective"}}
PAIRS = {"activations": {"kind": "recompute", "blocks": 2}}
CASES: dict[int, dict[str, Case]] = {
    2: {
        "dp": Case("gqa", {"replicate": 2}, "zero3", steps=20),
        "zero1": Case("learned", {"shard": 2, "zero": "optimizer"}, "sp"),
        "zero2": Case("gqa", {"shard": 2, "zero": "gradients"}, "tp", DROPOUT | {"optim__clip": {"kind": "adagc", "warmup": 3}}),
        "zero3": Case("learned", ZERO3, "sp", DROPOUT | PAIRS | STATE_ON_DISK),
        "zero3_master": Case("gqa", ZERO3, "tp", NARROW | {"optim__weights": "master", "optim__method": {"kind": "muon"}}, exact=True),
        "zero3_stochastic": Case(
            "gqa", ZERO3, "dp", NARROW | {"optim__weights": "stochastic", "optim__state": "bf16"} | DROPOUT, exact=True
        ),
        "zero3_adafactor": Case("learned", ZERO3, "sp", {"optim__method": {"kind": "adafactor"}}),
        "zero3_int8": Case("gqa", ZERO3, "tp", UNCLIPPED | SELECTIVE | STATE_ON_DISK | {"optim__state": "int8"}, exact=True),
        "tp": Case("gqa", {"tensor": 2}, "zero2", steps=20),
        "sp": Case("learned", {"tensor": 2, "sequence": True}, "zero1", {"loss": {"z_loss": 1e-2, "label_smoothing": 0.1}}),
        "sp_qk": Case("qk_norm", {"tensor": 2, "sequence": True}, "dp", DROPOUT | {"activations": {"kind": "recompute"}}),
        "sp_adafactor": Case("learned", {"tensor": 2, "sequence": True}, "zero3", {"optim__method": {"kind": "adafactor"}}),
        "tp_muon": Case("gqa", {"tensor": 2}, "zero2", {"optim__method": {"kind": "muon"}, "optim__state": "int8"}),
        "ring": Case("window", {"context": {"kind": "ring", "size": 2}}, "pp", DROPOUT),
        "ulysses": Case("gqa", {"context": {"kind": "ulysses", "size": 2}}, "dp"),
        "pp": Case("window", {"pipeline": {"kind": "1f1b", "stages": 2}}, "ring", DROPOUT | PAIRS | STATE_ON_DISK),
        "zb": Case("learned", {"pipeline": {"kind": "zero_bubble", "stages": 2}}, "zero2", SELECTIVE | {"loss": {"z_loss": 1e-2}}),
        "muon": Case("gqa", {"shard": 2, "zero": "gradients"}, "dp", IN_MEMORY | {"optim__method": {"kind": "muon"}}),
        "on_disk": Case("gqa", {"shard": 2, "zero": "optimizer"}, "dp", ON_DISK),
    },
    4: {
        "dp_tp": Case("gqa", {"replicate": 2, "tensor": 2, "sequence": True}, "hybrid2", steps=20),
        "hybrid2": Case("gqa", {"replicate": 2, "shard": 2, "zero": "gradients"}, "zero3_tp"),
        "hybrid3": Case("learned", {"replicate": 2, "shard": 2, "zero": "parameters"}, "zero2_tp"),
        "zero2_tp": Case("learned", {"shard": 2, "zero": "gradients", "tensor": 2, "sequence": True}, "hybrid3"),
        "dp_pp": Case("gqa", {"shard": 2, "zero": "optimizer", "pipeline": {"kind": "gpipe", "stages": 2}}, "tp_pp", steps=20),
        "tp_pp": Case("learned", {"tensor": 2, "sequence": True, "pipeline": {"kind": "zero_bubble", "stages": 2}}, "dp_pp"),
        "tp_cp": Case("gqa", {"tensor": 2, "sequence": True, "context": {"kind": "ring", "size": 2}}, "cp_pp", DROPOUT),
        "cp_pp": Case("gqa", {"context": {"kind": "ulysses", "size": 2}, "pipeline": {"kind": "1f1b", "stages": 2}}, "tp_cp"),
        "zero3_tp": Case("gqa", {**ZERO3, "tensor": 2}, "dp_tp"),
        "zero3_sp_adafactor": Case("learned", {**ZERO3, "tensor": 2, "sequence": True}, "tp_pp", {"optim__method": {"kind": "adafactor"}}),
    },
}


def documents(num: int) -> tuple[list[list[int]], list[list[bool]]]:
    """Of unequal length, and not all of each trained."""
    found = tiny.documents(*LENGTHS[:num])
    return found, [[(i + j) % 3 != 0 for j in range(len(d) - 1)] for i, d in enumerate(found)]


def step(case: Case, mesh: Mesh, num_micros: int) -> Step:
    """The part of a data rank: four documents."""
    texts, trained = documents(4 * case.mesh.get("replicate", 1) * case.mesh.get("shard", 1))
    if case.exact and mesh.num_ranks == 1:
        num_micros *= len(texts) // 4
    count = len(texts) // mesh.data.size
    mine = range(mesh.data.rank * count, (mesh.data.rank + 1) * count)
    size = count // num_micros
    groups = [mine[i : i + size] for i in range(0, count, size)]
    batches = []
    for group in groups:
        places = [max(LENGTHS) * i for i in group]
        batches.append(runs.batch(*(texts[i] for i in group), trained=[trained[i] for i in group], places=places))
    return Step(tuple(batches), {}, sum(map(len, texts)) - len(texts))


def make(folder: Path, case: Case, mesh: Mesh, loaded: LoadedModel | None = None, weights: Share | None = None) -> Trainer:
    recipe = runs.recipe(folder, parallel=mesh.config.model_dump(), batch__tokens=512, steps=100, **case.changes)
    if loaded is None:
        loaded = model(case.kind)
        loaded.model.to(precision.parameter_dtype(recipe.optim))
    loaded.model.requires_grad_(True)
    return Trainer(recipe, loaded, torch.device("cpu"), mesh, weights)


def gradients(trainer: Trainer, mesh: Mesh, work: Step) -> dict[str, Tensor]:
    """Whole, on rank 0."""
    ranks = trainer._ranks
    (weight,) = ranks.total(of_tokens=(sum(batch.weight for batch in work.batches),))
    loss, z = trainer._gradients(work.batches, weight)
    grads = ranks.collect(1.0)
    loss, z, norms = ranks.norms(grads, loss, z)
    all_grads = wholes(ranks.pieces(grads), mesh)
    ranks.gradients.spread()
    return {**all_grads, "loss": torch.tensor(loss), "norm": torch.tensor(list(norms.values())).norm()}


def outcome(folder: Path, case: Case, mesh: Mesh) -> tuple[Trainer, dict[str, Any]]:
    trainer = make(folder, case, mesh)
    found: dict[str, Any] = {"before": wholes(trainer.weights(), mesh)}
    for num_micros in (1,) if case.exact else (1, 4):
        found[f"gradients{num_micros}"] = gradients(trainer, mesh, step(case, mesh, num_micros))
    reports = [trainer.learn(step(case, mesh, 4 if number % 5 == 0 and not case.exact else 1)) for number in range(case.steps)]
    found["losses"] = torch.tensor([report.loss for report in reports])
    found["norms"] = torch.tensor([report.norm for report in reports])
    found["actions"] = [report.action for report in reports]
    found["trained"] = [report.num_trained for report in reports]
    found["flops"] = [report.flops for report in reports]
    found["validation"] = trainer.validate(list(step(case, Mesh(), 4).batches)[:3])
    found["fault"] = fault(trainer, mesh, step(case, mesh, 1))
    found["blocks_bytes"] = sum(p.untyped_storage().nbytes() for p in trainer._model.layers.parameters())
    found["weights"], found["optimizer"] = wholes(trainer.weights(), mesh), wholes(trainer.state_dict()["optimizer"], mesh)
    return trainer, found


def fault(trainer: Trainer, mesh: Mesh, work: Step) -> list[str]:
    """What all ranks do with a step in which one of them computes NaN."""
    nans = trainer._model.norm.register_forward_hook(lambda _, __, x_TD: x_TD * float("nan"))
    if mesh.rank != mesh.num_ranks - 1:
        nans.remove()
    report = trainer.learn(work)
    nans.remove()
    actions: list[Any] = [None] * mesh.num_ranks
    if mesh.num_ranks == 1:
        return [f"{report.action}: {report.reason}"]
    dist.all_gather_object(actions, f"{report.action}: {report.reason}")
    return actions


def wholes(share: Share, mesh: Mesh) -> dict[str, Tensor]:
    """What the shares of all ranks make up, on rank 0."""
    shares: list[Any] = [share] * mesh.num_ranks
    if mesh.num_ranks > 1:
        dist.gather_object(share, shares if mesh.rank == 0 else None)
    if mesh.rank > 0:
        return {}
    joined = reduce(Share.join, shares)
    joined.check()
    return {name: pieces.whole().detach().clone() for name, pieces in joined.items()}


def again(folder: Path, case: Case, mesh: Mesh, onto: Mesh, trainer: Trainer) -> dict[str, Any]:
    """What a trainer on another mesh has that goes on from what this one saved; and the folders that both save."""
    found = {}
    for number, (current, target) in enumerate(((mesh, onto), (onto, mesh))):
        config = SaveConfig(asynchronous=number == 0)
        with Checkpoints(folder / str(number), config, runs.tokenizer(), current) as checkpoints:
            checkpoints.save(7, trainer.loaded, {"trainer": trainer.state_dict()}, weights=trainer.weights())
        saved = Checkpoints(folder / str(number), config, runs.tokenizer(), target).latest()
        assert saved is not None
        trainer = make(folder.parent, case, target, *build.lay_out(saved.model, trainer.dtype))
        trainer.load_state_dict(saved.state["trainer"])
        found[f"weights{number}"] = wholes(trainer.weights(), target)
        found[f"optimizer{number}"] = wholes(trainer.state_dict()["optimizer"], target)
    return found


def work(rank: int, num_ranks: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    at_home = offload._home
    offload._home = lambda what, config, device, folder: (
        offload.Remote(device) if isinstance(config, ToMemory) else at_home(what, config, device, folder)  # as if the device had its own
    )
    optimizer.STRETCH = data.STRETCH = optimizer.LEAST_FOR_INT8 = STRETCH
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=num_ranks)
    cases = CASES[num_ranks]
    meshes = {}
    for name, case in cases.items():
        config = ParallelConfig.parse(case.mesh)
        devices = init_device_mesh("cpu", tuple(config.sizes.values()), mesh_dim_names=tuple(config.sizes))
        meshes[name] = Mesh(config, devices, rank, dist.PrefixStore(name, dist.distributed_c10d._get_default_store()))
    for name, case in cases.items():
        trainer, found = outcome(folder, case, meshes[name])
        found |= again(folder / name, case, meshes[name], meshes[case.onto], trainer)
        if rank == 0:
            _, found["alone"] = outcome(folder, case, Mesh())
            alone = model(case.kind)
            alone.model.to(trainer.dtype)
            alone.model.load_state_dict(found["weights"], strict=False)
            build.save(alone, folder / name / "alone")
            found["models"] = [(folder / name / place / "model.safetensors").read_bytes() for place in ("alone", "0/latest", "1/latest")]
            torch.save(found, folder / f"{name}.pt")
        dist.barrier()
    dist.destroy_process_group()


def fork(num_ranks: int, rank_work: Callable[[int], None]) -> list[int]:
    """The exit statuses of so many processes."""
    children = []
    for rank in range(num_ranks):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                rank_work(rank)
                code = 0
            except SystemExit as exit_:
                code = int(exit_.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def main(folder: Path, num_ranks: int) -> None:
    runs.values(folder)
    port = free_port()
    statuses = fork(num_ranks, lambda rank: work(rank, num_ranks, port, folder))
    sys.exit(max(map(abs, statuses)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

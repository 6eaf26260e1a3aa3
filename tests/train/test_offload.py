"""What lives elsewhere: not a bit of difference, in whatever order things come and go, and less memory while it goes."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gemel.config.errors import ConfigError
from gemel.config.optim import Precision, WeightStorage
from gemel.model.build import load
from gemel.train import offload
from gemel.train.offload import Disk, Homes, Remote
from tests import tiny
from tests.tolerance import assert_close
from tests.train import runs
from tests.train.optim.problem import Problem, combinations, config
from tests.train.test_run import go, outcome
from tests.train.test_trainer import DOCUMENTS, assert_same_gradients, gradients, step, trainer

CPU = torch.device("cpu")
DISK = {"kind": "disk"}
KINDS = ["disk", "remote", "remote disk"]


def home(kind: str, folder: Path) -> offload.Home:
    """`remote` on a CPU comes and goes as on any device: its memory is given back, and what is not there cannot be read."""
    match kind:
        case "disk":
            return Disk(folder)
        case "remote":
            return Remote(CPU)
        case _:
            return Remote(CPU, Disk(folder))


def put_elsewhere(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a recipe wants to have on a disk."""
    real = offload._home

    def chosen(what: str, config: Any, device: torch.device, folder: Path) -> offload.Home | None:
        return None if real(what, config, device, folder) is None else home(kind, folder)

    monkeypatch.setattr(offload, "_home", chosen)


# --- homes -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_written_is_there_again(kind: str, tmp_path: Path) -> None:
    place = home(kind, tmp_path)
    tensors = [place.allocate("x", num, dtype) for num in (0, 1, 5000, 70_000) for dtype in (torch.float32, torch.bfloat16, torch.uint8)]
    want = [(torch.arange(x.numel()) % 100).to(x.dtype) for x in tensors]
    assert not any(x.count_nonzero() for x in tensors)
    for x, y in zip(tensors, want, strict=True):
        x.copy_(y)
    for _ in range(2):
        place.behind(tensors, changed=True)
        assert all(torch.equal(place.at_home(x), y) for x, y in zip(tensors, want, strict=True))
        place.ahead(tensors[:7])
        place.fetch(tensors)
        assert all(torch.equal(x, y) for x, y in zip(tensors, want, strict=True))
    place.behind([torch.ones(3)], changed=True)  # somebody else's
    assert list(tmp_path.iterdir()) == []  # the files have no names


def test_what_is_not_there_takes_no_memory() -> None:
    place = Remote(CPU)
    x = place.allocate("x", 1000, torch.float32)
    part = x[500:]
    place.behind([part], changed=True, part=(0.0, 0.5))
    assert x.untyped_storage().nbytes() == 4000
    place.behind([part], changed=True)
    place.behind([], changed=True)
    assert x.untyped_storage().nbytes() == 0
    place.fetch([part])
    assert x.untyped_storage().nbytes() == 4000


def test_a_disk_that_is_too_small(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no room for 4,611,686,018,427,387,904 bytes of state: .*; name another folder"):
        Disk(tmp_path).allocate("state", 2**60, torch.float32)
    assert list(tmp_path.iterdir()) == []


# --- the optimizer -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("method", "state", "weights"), list(combinations()))
def test_state_elsewhere_is_the_same_bits(method: str, state: Precision, weights: WeightStorage, kind: str, tmp_path: Path) -> None:
    settings = config(method, state=state, weights=weights)
    here, there = Problem(settings), Problem(settings, homes=Homes(optimizer=home(kind, tmp_path)))
    here.run(0, 3)
    there.run(0, 2)
    saved = {name: x.clone() for name, x in there.optimizer.state_dict().items()}
    again = Problem(settings, homes=Homes(optimizer=home(kind, tmp_path)))
    for name, x in again.parameters.items():
        x.data.copy_(there.parameters[name])
    again.optimizer.load_state_dict(saved)
    again.run(2, 3)
    assert all(torch.equal(x, again.weights()[name]) for name, x in here.weights().items())
    mine, theirs = here.optimizer.state_dict(), again.optimizer.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(x, theirs[name]) for name, x in mine.items())


def test_large_parameters_come_in_pieces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Pieces cover everything once, the next one is asked for before the present one is given up, and only the last piece ends a stay."""
    monkeypatch.setattr("gemel.train.optim.optimizer.STRETCH", 256)
    calls: list[tuple[str, int, offload.Part]] = []

    class Noted(Disk):
        def ahead(self, tensors: Any, part: offload.Part = offload.WHOLE) -> None:
            calls.append(("ahead", sum(x.numel() for x in tensors), part))

        def behind(self, tensors: Any, changed: bool, part: offload.Part = offload.WHOLE) -> None:
            calls.append(("behind", sum(x.numel() for x in tensors), part))

    there = Problem(config(), homes=Homes(optimizer=Noted(tmp_path)))
    calls.clear()
    there.run(0, 1)
    numbers = [5200, 6240, 96, 65]
    pieces = [(3 * num, (start / num, min(start + 2048, num) / num)) for num in numbers for start in range(0, num, 2048)]
    assert [call[1:] for call in calls if call[0] == "behind"] == pieces
    assert calls[:3] == [("ahead", *pieces[0]), ("ahead", *pieces[1]), ("behind", *pieces[0])]


# --- parameters --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "activations", [{"kind": "none"}, {"kind": "recompute"}, {"kind": "recompute", "blocks": 2}, {"kind": "selective"}]
)
def test_gradients_of_parameters_elsewhere_are_the_same_bits(
    activations: dict[str, Any], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = tiny.build("qk_norm", num_layers=3)
    want = gradients(trainer(tmp_path, loaded=copy.deepcopy(loaded)), runs.batch(*DOCUMENTS))
    put_elsewhere(kind, monkeypatch)
    made = trainer(tmp_path, loaded=loaded, activations=activations, offload={"parameters": DISK}, save__asynchronous=False)
    batches = runs.batch(*DOCUMENTS)
    loss = made.validate([batches])[0] / batches.weight
    got = gradients(made, batches)
    assert got[0] == want[0] and loss == pytest.approx(want[0])
    assert_same_gradients(got[1], want[1], "exact")


def test_blocks_are_there_only_while_they_compute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most a block and its neighbour, forwards and backwards; between steps none."""
    put_elsewhere("remote", monkeypatch)
    made = trainer(tmp_path, loaded=tiny.build(num_layers=5), offload={"parameters": DISK}, save__asynchronous=False)
    weights = [block.mlp.down.weight for block in made.loaded.model.layers]
    seen: list[tuple[bool, ...]] = []

    def look(*_: Any) -> None:
        seen.append(tuple(x.untyped_storage().nbytes() > 0 for x in weights))

    for block in made.loaded.model.layers:
        block.mlp.down.register_forward_hook(look)
        block.mlp.down.register_full_backward_hook(look)
    look()
    made.learn(step(runs.batch(*DOCUMENTS)))
    look()
    there = [[number for number, is_there in enumerate(row) if is_there] for row in seen]
    assert there == [[], [0, 1], [1, 2], [2, 3], [3, 4], [4], [3, 4], [2, 3], [1, 2], [0, 1], [0], []]


# --- whole runs --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_elsewhere_is_the_same_run(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when it goes on from a checkpoint, and where the run before had everything here."""
    changes = {"data__holdout": 0.1, "validation__every": 3, "save": {"every": 4, "keep": 1, "asynchronous": False}}
    go(runs.recipe(tmp_path, out=str(tmp_path / "here"), **changes))
    go(runs.recipe(tmp_path, out=str(tmp_path / "there"), steps=4, **changes))
    put_elsewhere(kind, monkeypatch)
    recipe = runs.recipe(tmp_path, out=str(tmp_path / "there"), offload={"optimizer": DISK, "parameters": DISK}, **changes)
    go(recipe.model_copy(update={"steps": 6}))
    assert go(recipe).finished
    assert outcome(tmp_path / "here")[:2] == outcome(tmp_path / "there")[:2]
    assert list((tmp_path / "there" / "work" / "offload").iterdir()) == []


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_a_run_on_a_gpu_is_the_same_run(kind: str, tmp_path: Path) -> None:
    """But for what the GPU adds up in an order of its own."""
    changes = {"device": "cuda", "save": {"every": 4, "keep": 1, "asynchronous": False}}
    go(runs.recipe(tmp_path, out=str(tmp_path / "here"), **changes))
    go(runs.recipe(tmp_path, out=str(tmp_path / "there"), offload={"optimizer": {"kind": kind}, "parameters": {"kind": kind}}, **changes))
    here, there = (dict(load(tmp_path / name / "latest").model.named_parameters()) for name in ("here", "there"))
    for name, x in here.items():
        assert_close(there[name], x, "fp32_reference")


@pytest.mark.parametrize("kind", KINDS)
def test_a_rollback_reaches_what_is_elsewhere(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_elsewhere(kind, monkeypatch)
    there = {"offload": {"optimizer": DISK, "parameters": DISK}, "save__asynchronous": False}
    made = trainer(tmp_path, **there)
    made.learn(step(runs.batch(*DOCUMENTS)))
    state, weights = made.state_dict(), made.weights().copy()
    state["optimizer"] = state["optimizer"].copy()
    made.learn(step(runs.batch(*DOCUMENTS)))
    assert any(not torch.equal(p.whole(), weights[name].whole()) for name, p in made.weights().items())
    made.roll_back(state, weights)
    assert all(torch.equal(p.whole(), weights[name].whole()) for name, p in made.weights().items())
    assert all(torch.equal(x.whole(), state["optimizer"][name].whole()) for name, x in made.state_dict()["optimizer"].items())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"offload": {"optimizer": {"kind": "cpu"}}}, r"offload\.optimizer\.kind = 'cpu' has no effect on device = 'cpu'"),
        ({"offload": {"parameters": DISK}}, r"set save\.asynchronous = false"),
        (
            {"offload": {"optimizer": DISK}, "optim__method": {"kind": "adafactor"}, "save__asynchronous": False},
            r"offload\.optimizer has no effect: adafactor .* set optim\.method\.beta1 = 0\.9",
        ),
        ({"offload": {"optimizer": {"kind": "nvme"}}}, r"offload\.optimizer\.kind = 'nvme' is not known: it is one of none, cpu, disk"),
    ],
)
def test_what_would_have_no_effect_is_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        go(runs.recipe(tmp_path, **changes))


# --- memory ------------------------------------------------------------------------------------------------------------------------------

MEASURE = """
import json, sys
import torch
from pathlib import Path
from gemel.config.train import TrainRecipe
from gemel.train.run import fresh
from gemel.train.trainer import Trainer
from tests.train import runs
from tests.train.test_trainer import step

torch.set_num_threads(1)
recipe = TrainRecipe.parse(json.loads(sys.argv[1]))
made = Trainer(recipe, fresh(recipe.model, 0, runs.tokenizer()), torch.device("cpu"))
work = step(runs.batch(list(range(20))))
made.learn(work)
Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
made.learn(work)
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(json.dumps({"peak_bytes": int(peak.split()[1]) * 1024, "weights": sum(p.numel() for p in made.loaded.model.layers.parameters())}))
"""


def measured(folder: Path, **changes: Any) -> dict[str, int]:
    """Peak of resident memory in a second step of a model of 12 million weights in 12 blocks, in a process of its own."""
    shape = {"num_layers": 12, "width": 256, "num_heads": 4, "num_kv_heads": 4, "head_width": 64, "ffn_width": 960}
    values = runs.values(folder, batch={"tokens": 32, "sequence": 32}, save={"asynchronous": False}, **changes)
    values["model"]["config"] |= shape
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-c", MEASURE, json.dumps(values)]
    done = subprocess.run(argv, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_memory_falls_by_what_is_elsewhere(tmp_path: Path) -> None:
    """AdamW keeps 8 bytes per weight, and weights take 4. A window of some megabytes stays."""
    here = measured(tmp_path)
    state = measured(tmp_path, offload={"optimizer": DISK})
    both = measured(tmp_path, offload={"optimizer": DISK, "parameters": DISK})
    saved = [here["peak_bytes"] - found["peak_bytes"] for found in (state, both)]
    assert saved[0] > 0.6 * 8 * here["weights"]
    assert saved[1] > saved[0] + 0.4 * 4 * here["weights"]
    assert math.isclose(here["weights"], 12e6, rel_tol=0.1)

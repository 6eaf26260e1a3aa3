"""Whole runs: they learn, they go on bitwise from wherever they were stopped, and they refuse to go on as something else."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from gemel.config import train as config
from gemel.config.errors import CheckpointError, ConfigError, GemelError
from gemel.config.train import TrainRecipe
from gemel.model.build import load
from gemel.train import metrics
from gemel.train.loader import Loader, Step
from gemel.train.prepare import Preparation
from gemel.train.progress import Progress
from gemel.train.run import run
from gemel.train.trainer import Report, Trainer
from tests.model.reference import logits
from tests.tolerance import assert_close
from tests.train import runs

BF16 = {"kind": "bf16"}
KINDS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adafactor": {"optim__method": {"kind": "adafactor"}},
    "lion": {"optim__method": {"kind": "lion"}, "optim__state": "bf16"},
    "muon": {"optim__method": {"kind": "muon"}},
    "sgd": {"optim__method": {"kind": "sgd"}, "optim__lr": 0.1},
    "autocast": {"precision": BF16},
    "master": {"precision": BF16, "optim__weights": "master", "optim__state": "int8"},
    "stochastic": {"precision": BF16, "optim__weights": "stochastic", "optim__state": "bf16"},
    "fp16": {"precision": {"kind": "fp16", "initial_scale": 2.0**24, "growth_steps": 2}},
    "adagc": {"optim__clip": {"kind": "adagc", "warmup": 3}},
    "recompute": {"activations": {"kind": "selective"}, "loss": {"z_loss": 1e-3, "label_smoothing": 0.1}},
    "dropout": {"dropout": {"embedding": 0.1, "residual": 0.1}, "activations": {"kind": "recompute", "blocks": "sqrt"}},
}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"optim__schedule": {"kind": "cosine", "warmup": 100}}, r"warmup = 100 is 100 steps, the run has steps = 8"),
        (
            {"model__config__vocab_size": 5},
            r"the model has 5 rows in its vocabulary, the tokenizer \d+ tokens; set model.config.vocab_size",
        ),
        ({"metrics": {"mlflow": {"experiment": "e"}}}, r"metrics.mlflow needs a package"),
    ],
)
def test_mistakes_are_found_before_data_is_prepared(
    changes: dict[str, Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.setattr(Preparation, "sources", None)
    with pytest.raises(GemelError, match=says):
        go(runs.recipe(tmp_path, **changes))


def test_checkpoints_that_nobody_can_read_are_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = runs.recipe(tmp_path)
    go(recipe)
    for path in recipe.out.glob("state/*/state.json"):
        path.write_text(path.read_text()[1:])
    before = (recipe.out / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=r"holds checkpoints, and none of them is whole; give another --output, or remove"):
        go(recipe)
    assert "is passed over" in capsys.readouterr().err and (recipe.out / "metrics.jsonl").read_bytes() == before


def test_a_disk_that_refuses_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    recipe = runs.recipe(tmp_path)
    with monkeypatch.context() as patched, pytest.raises(ConfigError, match=r"cannot write to \S+/out: No space left on device; mend that"):
        patched.setattr(metrics.Metrics, "step", full)
        go(recipe)
    assert go(recipe).finished


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes a person press Ctrl-C during a step."""

    def at(wanted: int | None) -> None:
        def step(self: Progress, report: Report, step_s: float) -> None:
            if report.step == wanted:
                os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr(Progress, "step", step)

    yield at


def go(recipe: TrainRecipe) -> Any:
    return run(recipe, quiet=True)


def outcome(out: Path) -> tuple[bytes, bytes, str]:
    """All bits that a run ends with, and its metrics without the clock's."""
    lines = [{key: value for key, value in line.items() if not key.endswith("_s")} for line in metrics.read(out)]
    state = json.loads((out / "state" / (out / "latest").readlink() / "state.json").read_text())
    assert state["state"]["trainer"]["step"] == max(line["step"] for line in lines)
    tensors = next((out / "state").glob("*/rank-00000.safetensors")).read_bytes()
    return (out / "latest" / "model.safetensors").read_bytes(), tensors, repr(lines)  # as text, for NaN is not NaN


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_and_taken_up_is_never_stopped(kind: str, tmp_path: Path, stop_at: Any) -> None:
    """4 + 4 steps are 8, bit by bit: weights, optimizer, scale, random numbers, loader; and so are the metrics."""
    changes = {"save": {"keep": 1}, "optim__schedule": {"kind": "cosine", "warmup": 2}, "data__holdout": 0.1, "validation__every": 3}
    stop_at(None)
    assert go(runs.recipe(tmp_path, out=str(tmp_path / "whole"), **changes, **KINDS[kind])).finished
    stop_at(4)
    recipe = runs.recipe(tmp_path, out=str(tmp_path / "halves"), **changes, **KINDS[kind])
    first = go(recipe)
    assert (first.step, first.finished) == (4, False)
    torch.manual_seed(1234)  # another process would have other random numbers
    second = go(recipe)
    assert (second.step, second.finished) == (8, True)
    assert outcome(tmp_path / "whole") == outcome(tmp_path / "halves")


def test_a_run_learns_and_others_load_it(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    result = go(runs.recipe(tmp_path, steps=60, data__holdout=0.1, optim__schedule={"kind": "cosine"}, batch__micro_tokens=None))
    losses = [line["loss"] for line in metrics.read(tmp_path / "out") if "event" not in line]
    assert losses[0] == pytest.approx(math.log(len(runs.tokenizer().bytes_of)), rel=0.05)
    assert result.finished and result.loss == losses[-1] < 0.55 * losses[0] and result.validation_loss < 0.65 * losses[0]
    tokens = torch.arange(20) * 3 % 50
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "latest")(tokens[None]).logits[0]
        assert_close(logits(load(tmp_path / "out" / "latest").model, tokens), theirs, "fp32_reference")


def test_the_resolved_recipe_repeats_the_run(tmp_path: Path) -> None:
    recipe = runs.recipe(tmp_path, data__holdout=0.1)
    go(recipe)
    again = config.load(tmp_path / "out" / "run.toml", [f"out='{tmp_path / 'again'}'"])
    assert again.model_copy(update={"out": recipe.out}) == recipe
    go(again)
    assert outcome(tmp_path / "again") == outcome(tmp_path / "out")


def test_micro_batches_make_no_difference(tmp_path: Path) -> None:
    losses = []
    for micro in (1, 2, 4):
        go(runs.recipe(tmp_path, out=str(tmp_path / f"{micro}"), batch__micro_tokens=micro * runs.SEQUENCE))
        losses.append(torch.tensor([line["loss"] for line in metrics.read(tmp_path / f"{micro}")]))
    assert_close(losses[0], losses[2], "fp32_reference")
    assert_close(losses[1], losses[2], "fp32_reference")


def test_a_finished_run_is_left_alone_and_can_be_made_longer(tmp_path: Path) -> None:
    go(runs.recipe(tmp_path))
    before = outcome(tmp_path / "out")
    assert go(runs.recipe(tmp_path)).finished and outcome(tmp_path / "out") == before
    assert go(runs.recipe(tmp_path, steps=10)).step == 10
    go(runs.recipe(tmp_path, steps=10, out=str(tmp_path / "whole")))
    assert outcome(tmp_path / "out")[0] == outcome(tmp_path / "whole")[0]  # its rate is constant, so 8 and 2 are 10


def test_another_recipe_is_refused(tmp_path: Path) -> None:
    go(runs.recipe(tmp_path))
    with pytest.raises(ConfigError, match=r"optim.lr was 0.01 and is 0.02.*another --output"):
        go(runs.recipe(tmp_path, optim__lr=0.02))
    go(runs.recipe(tmp_path, save__every=2, batch__micro_tokens=runs.SEQUENCE, steps=9))  # decides nothing about what is learnt


def test_early_stopping(tmp_path: Path) -> None:
    """A rate of nearly nothing makes no progress; a hopeless run is finished, and its best model kept."""
    changes = {"data__holdout": 0.2, "validation": {"every": 2, "patience": 2}, "optim__lr": 10.0, "save": {"best": True, "keep": 1}}
    recipe = runs.recipe(tmp_path, steps=50, stability__spikes=False, **changes)
    result = go(recipe)
    looks = {line["step"]: line["loss"] for line in metrics.read(tmp_path / "out") if line.get("event") == "validation"}
    best = min(looks, key=looks.__getitem__)
    assert result.finished and result.step == best + 4 < 50
    assert (tmp_path / "out" / "best").resolve().name == f"step-{best:08d}"
    assert go(recipe).step == result.step


def test_a_corrupt_batch_is_rolled_back_past(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps of nonsense: the first are skipped, the third leads back to the checkpoint, and what follows has other data."""
    real, made = Loader.__next__, []

    def corrupt(self: Loader) -> Step:
        step = real(self)
        made.append(step)
        if len(made) in (7, 8, 9):
            for batch in step.batches:
                batch.targets_T.copy_(torch.randint(100, 400, batch.targets_T.shape))
        return step

    monkeypatch.setattr(Loader, "__next__", corrupt)
    stability = {"least_window": 4, "patience": 3}
    result = go(runs.recipe(tmp_path, steps=12, stability=stability, optim__lr=3e-2, save={"every": 6}))
    lines = metrics.read(tmp_path / "out")
    assert actions(tmp_path / "out") == ["ok"] * 6 + ["skip", "skip", "rollback", "rollback"] + ["ok"] * 6
    assert result.finished and lines[9] == {"step": 9, "event": "rollback", "to": 6, "reason": lines[8]["reason"]}
    assert [line["step"] for line in lines[10:]] == [7, 8, 9, 10, 11, 12] and lines[-1]["loss"] < lines[0]["loss"]
    taken = [step.position["shards"]["taken"] for step in made]
    assert all(a < b for a, b in pairwise(taken))  # nothing was read twice


def actions(out: Path) -> list[str]:
    return [line.get("action", line.get("event", "ok")) for line in metrics.read(out)]


def test_a_nan_in_a_gradient_costs_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named, and the run is the one that never saw that step's data but for its place in the schedule."""
    real, seen = Trainer._gradients, []

    def poisoned(self: Trainer, *args: Any) -> Any:
        result = real(self, *args)
        seen.append({name: p.detach().clone() for name, p in self.loaded.model.named_parameters()})
        if len(seen) == 5:
            grad = self.loaded.model.layers[1].mlp.down.weight.grad
            assert grad is not None
            grad.view(-1)[7] = math.nan
        return result

    monkeypatch.setattr(Trainer, "_gradients", poisoned)
    result = go(runs.recipe(tmp_path, steps=8))
    assert result.finished and actions(tmp_path / "out") == ["ok"] * 4 + ["skip"] + ["ok"] * 3
    assert "layers.1.mlp.down.weight" in metrics.read(tmp_path / "out")[4]["reason"]
    assert all(torch.equal(x, seen[5][name]) for name, x in seen[4].items())
    assert not torch.equal(seen[6]["embed.weight"], seen[5]["embed.weight"])


def test_a_flipped_bit_is_rolled_back_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The highest bit of the exponent of one weight: every step after it is bad, until the weights are those of the checkpoint again."""
    real, steps = Trainer.learn, []

    def flipped(self: Trainer, work: Step) -> Report:
        steps.append(work)
        if len(steps) == 8:
            weight = self.loaded.model.layers[0].attn.qkv.weight.detach()
            assert abs(weight[3, 5]) < 1
            weight.view(torch.int32)[3, 5] ^= 1 << 30
            assert abs(weight[3, 5]) > 1e30
        return real(self, work)

    monkeypatch.setattr(Trainer, "learn", flipped)
    stability = {"least_window": 4, "patience": 2}
    result = go(runs.recipe(tmp_path, steps=10, stability=stability, optim__lr=3e-2, save={"every": 6}))
    assert actions(tmp_path / "out") == ["ok"] * 7 + ["skip", "rollback", "rollback"] + ["ok"] * 4
    lines = metrics.read(tmp_path / "out")
    assert lines[9]["to"] == 6 and [line["step"] for line in lines[10:]] == [7, 8, 9, 10]
    assert result.finished and result.loss is not None and result.loss < lines[0]["loss"]
    assert load(tmp_path / "out" / "latest").model.layers[0].attn.qkv.weight.abs().max() < 10


def test_a_rollback_without_a_checkpoint_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemel.ops.head_cross_entropy", lambda *args: (args[0].sum() * math.nan, torch.zeros(())))
    with pytest.raises(ConfigError, match=r"the loss is nan.* and there is no checkpoint to go back to; set save\.every"):
        go(runs.recipe(tmp_path, save={"every": 0}))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"batch__sequence": 128, "batch__tokens": 128, "batch__micro_tokens": 128}, r"sequence = 128 is more than .*max_positions = 64"),
        ({"batch__tokens": 100}, r"tokens = 100 is not a multiple of micro_tokens = 64; 128 is"),
        ({"batch__micro_tokens": 33}, r"micro_tokens = 33 is not a multiple of sequence = 32; 32 is"),
        ({"tokenizer": None}, r"a new model needs a tokenizer"),
        ({"save__best": True}, r"save.best needs something to validate on"),
        ({"device": "cuda"}, r"device = 'cuda', but torch .* finds no CUDA device"),
        ({"model__config__qk_norm": True}, r"family 'llama' cannot express qk_norm = True"),
        ({"model__config__vocab_size": 100}, r"the model has 100 rows in its vocabulary, the tokenizer"),
        ({"data__train": [{"kind": "shards", "path": "nowhere"}]}, r"there are no .tokens files in nowhere"),
    ],
)
def test_mistakes_are_named_with_a_way_out(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        go(runs.recipe(tmp_path, **changes))


def test_two_runs_do_not_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = runs.recipe(tmp_path)

    def another(*args: Any) -> None:
        with pytest.raises(ConfigError, match="another run is writing"):
            go(recipe)

    monkeypatch.setattr(Progress, "step", another)
    assert go(recipe).finished


def test_a_run_needs_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"out = '.*file' cannot be made a folder: File exists; give another --output"):
        go(runs.recipe(tmp_path, out=str(tmp_path / "file")))


SCRATCH = ("lock", "tmp", "work")  # locking clears what killed runs have left, which changes the folder it was in


def test_another_recipe_is_refused_before_it_touches_anything(tmp_path: Path) -> None:
    go(runs.recipe(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.name not in SCRATCH}
    other = runs.recipe(tmp_path, optim__lr=1.0, tokenizer={"kind": "pretrained", "path": str(tmp_path / "absent")})
    with pytest.raises(ConfigError, match=r"another recipe: .*optim\.lr was 0\.01 and is 1\.0.* Give another --output"):
        go(other)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.name not in SCRATCH}

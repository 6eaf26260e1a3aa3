"""The benchmark of training: what is worked out of what tools say, that gemel's own process runs, and what plans count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemel.bench import command, train, train_levers, train_plan, train_step
from gemel.bench.roofline import Rates
from gemel.cli.main import main
from gemel.config.errors import ConfigError
from gemel.config.train import TrainRecipe
from gemel.model.model import Model

WORK = train.Work("tiny", "fp32", num_sequences=4, num_warm_up=1, num_timed=2, num_rounds=2)


def said(step_s: list[float], losses: list[float], peak_mb: int, **more: Any) -> dict[str, Any]:
    return {"step_s": step_s, "losses": losses, "base_bytes": 100e6, "peak_bytes": peak_mb * 1e6} | more


def ours(*rounds: list[float], peak_mb: int = 300, settings: tuple[str, ...] = ()) -> train.Result:
    known: dict[str, Any] = {"base_pinned_bytes": 50e6, "pinned_bytes": (peak_mb - 50) * 1e6}
    known |= {"flops": 1e9, "peak_flops_per_s": 4e9, "read_bytes_per_s": 1e9, "planned_step_s": 0.3, "planned_bytes": {"weights": 200e6}}
    return train.Result("gemel", settings, [said(step_s, [4.0, 3.0, 2.0], peak_mb, **known) for step_s in rounds])


def test_figures_are_worked_out_of_steps_that_are_timed() -> None:
    peer = train.Result("hf", (), [said([60.0, 1.0, 2.0], [4.0, 3.0, 2.002], 600)])
    broken = train.Result("trl", error="ImportError: none")
    rows = train.figures([ours([9.0, 0.5, 0.4], [9.0, 0.5, 0.6]), peer, broken], WORK)
    assert rows[0]["tokens_per_s"] == {"median": 256 / 0.5, "min": 256 / 0.6, "max": 256 / 0.4}
    assert (rows[0]["mfu"], rows[0]["of_plan"], rows[0]["loss_error"]) == (0.5, 0.6, 0.0)
    assert (rows[1]["gemel_over_it"], rows[1]["gemel_memory_share"]) == (3.0, 0.5)
    assert rows[1]["loss_error"] == pytest.approx(1e-3)
    text = train.table(rows)
    assert "hf" in text and text.endswith("trl did not run: ImportError: none")


def test_levers_are_compared_above_the_interpreter() -> None:
    lever = train_levers.chosen(["checkpoint.each"], 64)
    [row] = train_levers.figures(lever, ours([9.0, 0.5, 0.5]), [ours([9.0, 0.6, 0.6], peak_mb=200)], WORK)
    assert (row["memory"], row["time"]) == (0.5, pytest.approx(1.2))
    assert row["pinned"] == 0.5 and "50%     50%  1.20x" in train_levers.table([row])


def test_every_lever_is_a_recipe(tmp_path: Path) -> None:
    base = job(tmp_path)
    plain = train_step.recipe(base, 4, 64)
    for name, lever in train_levers.chosen([], 64).items():
        changed = train_step.recipe(base | {"settings": lever.settings}, 4, 64)
        assert isinstance(changed, TrainRecipe) and changed != plain, name
    both = train_levers.chosen(["checkpoint.each+heap.return"], 64)["checkpoint.each+heap.return"]
    assert both.settings == ("activations={kind='recompute'}", "heap=return") and "1604.06174" in both.published
    with pytest.raises(ConfigError, match="there is no lever 'magic'; there is accumulate"):
        train_levers.chosen(["heap.return+magic"], 64)


def job(folder: Path, **changes: Any) -> dict[str, Any]:
    made = {"model": str(folder / "model"), "tokens": str(folder / "tokens.npy"), "precision": "fp32", "lr": 1e-3, "threads": 1}
    return made | {"settings": ()} | changes


def test_steps_in_a_process_of_their_own_and_micro_batches_that_change_nothing(tmp_path: Path) -> None:
    work = train.Work("tiny", "fp32", num_sequences=4, num_warm_up=0, num_timed=2, num_rounds=1, out=tmp_path / "out.json")
    whole, parts = train.compare(work, (), [(), ("batch.micro_tokens=64",)], lambda _: None)
    assert len(whole.losses) == 2 and whole.losses[0] == pytest.approx(np.log(512), abs=0.3)
    assert parts.losses == pytest.approx(whole.losses, rel=1e-6)
    assert 50e6 < whole.rounds[0]["base_bytes"] < whole.peak_bytes < 5e9
    assert [one["rounds"] for one in json.loads((tmp_path / "out.json").read_text())] == [whole.rounds, parts.rounds]
    summary = train.summary([whole], work)
    assert summary["tokens_per_step"] == 256 and summary["plan"]["tokens_per_s"] > 0
    json.dumps(summary | {"results": train.figures([whole, parts], work)})


def test_what_fails_is_told_and_not_tried_again() -> None:
    work = train.Work("tiny", "fp32", num_sequences=4, num_warm_up=0, num_timed=1, num_rounds=2)
    lines: list[str] = []
    with pytest.raises(ConfigError, match=r"gemel failed: .*optim\.lr"):
        train.compare(work, (), [("optim.lr=-1",)], lines.append)
    assert lines == ["round 1 of 2: gemel optim.lr=-1"]


def test_targets_are_the_next_tokens_of_the_same_sequence() -> None:
    made = train_step.step(np.arange(12).reshape(3, 4), micro_sequences=2)
    first, second = made.batches
    assert first.targets_T.tolist()[:3] == [1, 2, 3] and first.weights_T.tolist() == [1, 1, 1, 0] * 2
    assert (first.starts, second.starts, made.num_tokens) == ((0, 4, 8), (0, 4), 12)


@pytest.mark.parametrize("shape", train.SHAPES)
def test_a_plan_counts_the_parameters_that_there_are(shape: str) -> None:
    config = train.SHAPES[shape].model.model_copy(update={"num_layers": 2})
    matrices = sum(p.numel() for p in {id(p): p for p in Model(config).parameters()}.values() if p.ndim == 2)
    assert train_plan.num_parameters(config) == matrices


def test_plans_by_hand(tmp_path: Path) -> None:
    config = train.SHAPES["tiny"].model
    num = train_plan.num_parameters(config)
    rates = Rates(1e9, {"float32": 1e9})
    plain = train_plan.plan(train_step.recipe(job(tmp_path), 4, 64), config, 5e8, rates, "float32")
    assert plain.step_s == pytest.approx(0.5 + num * (2 * 12 + 4) / 1e9)
    assert [plain.memory_bytes[name] for name in ("weights", "gradients", "state", "casts")] == [4 * num, 4 * num, 8 * num, 0]
    # two norms' inputs, q, k, v and what comes of them with a sum per head, gate, up; of one block norms' results and what down reads
    kept, again = 4 * (2 * 64 + 2 * 64 + 2 * 32 + 2 * 128) + 4 * 4, 4 * (2 * 64 + 128)
    assert plain.memory_bytes["activations"] == 256 * (2 * kept + again)
    whole = train_step.recipe(job(tmp_path, settings=("activations={kind='none'}",)), 4, 64)
    assert train_plan.plan(whole, config, 5e8, rates, "float32").memory_bytes["activations"] == 256 * 2 * (kept + again)
    narrow = train_step.recipe(job(tmp_path, precision="bf16", settings=("optim.state=int8",)), 4, 64)
    memory = train_plan.plan(narrow, config, 5e8, rates, "float32").memory_bytes
    assert [memory[name] for name in ("weights", "gradients", "state", "casts")] == [2 * num, 2 * num, 4 * num, 0]
    again = train_step.recipe(job(tmp_path, settings=("activations={kind='recompute'}",)), 4, 64)
    assert train_plan.plan(again, config, 5e8, rates, "float32").memory_bytes["activations"] < plain.memory_bytes["activations"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["train", "--peer", "datatrove"], "--peer datatrove is not measured by train; it measures: hf"),
        (["train", "--peer", "hf"], "--peer needs --peer-python"),
        (["train", "--peer", "hf", "--levers"], "--levers compares gemel with itself"),
        (["train", "--levers", "magic"], "there is no lever 'magic'"),
        (["train", "--threads", "2"], "engine flags have no effect on train"),
        (["train", "--model", "elsewhere"], "see --shape"),
        (["train", "--profile"], "--profile has no effect on train"),
        (["decode", "--set", "steps=3"], "--set has no effect on decode; it belongs to: train"),
        (["decode", "--shape", "7m"], "--shape has no effect on decode; it belongs to: train"),
    ],
)
def test_mistakes_are_refused_before_anything_is_measured(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *argv]) != 0
    assert says in capsys.readouterr().err


def test_what_help_says_is_what_there_is() -> None:
    assert (command.PEERS["train"], command.SHAPES) == (train.PEERS, tuple(train.SHAPES))

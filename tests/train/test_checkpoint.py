"""Checkpoints are whole or absent, whatever happens; damage is noticed; what is saved is what was there when it was asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch

from gemel.config.errors import CheckpointError
from gemel.config.train import SaveConfig
from gemel.model.build import load
from gemel.train.checkpoint import Checkpoints
from tests import tiny
from tests.train import runs

STATE: dict[str, Any] = {
    "step": 3,
    "none": None,
    "text": "x",
    "nested": {"a.b/c": torch.arange(5, dtype=torch.uint8), "list": [1.5, torch.tensor(2.0, dtype=torch.bfloat16), {}]},
    "empty": torch.zeros(0),
}


def checkpoints(out: Path, **config: Any) -> Checkpoints:
    return Checkpoints(out, SaveConfig(**config), runs.tokenizer())


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return all(map(same, left, right)) and len(left) == len(right) if isinstance(left, list) else bool(left == right)


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("kind", ["gqa", "mqa"])
def test_what_is_saved_comes_back(kind: str, asynchronous: bool, tmp_path: Path) -> None:
    """As it was when `save` was called, even if the weights and the state change while it is written."""
    loaded, state = tiny.build(kind), {"x": torch.ones(3)}
    with checkpoints(tmp_path, asynchronous=asynchronous) as store:
        store.save(3, loaded, STATE | {"changing": state})
        for parameter in loaded.model.parameters():
            parameter.zero_()
        state["x"].zero_()
    found = store.latest()
    assert found is not None and found.step == 3 and found.model == tmp_path / "step-00000003"
    assert same(found.state, STATE | {"changing": {"x": torch.ones(3)}})
    want = tiny.build(kind).model.state_dict()
    got = load(found.model)
    assert got.config.tied_head == loaded.config.tied_head and got.eos_token_ids == loaded.eos_token_ids
    assert all(torch.equal(x, want[name]) for name, x in got.model.state_dict().items())
    assert (tmp_path / "latest").readlink() == Path("step-00000003")


def test_others_load_it(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with checkpoints(tmp_path) as store:
        store.save(1, tiny.build(), {})
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "latest").config.vocab_size == 97
    said = [{"role": "user", "content": "the thing"}]
    theirs = AutoTokenizer.from_pretrained(tmp_path / "latest").apply_chat_template(said, return_dict=False)
    assert theirs == runs.tokenizer().render_chat(said, add_generation_prompt=False)


def test_nothing_is_pickled(tmp_path: Path) -> None:
    with checkpoints(tmp_path) as store:
        store.save(1, tiny.build(), STATE)
    suffixes = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".safetensors", ".jinja"}


def test_only_what_the_policy_keeps_stays(tmp_path: Path) -> None:
    with checkpoints(tmp_path, keep=2, keep_every=4) as store:
        for step in range(1, 11):
            store.save(step, tiny.build(), {}, best=step == 5)
    models = {int(path.name[5:]) for path in tmp_path.glob("step-*")}
    states = {int(path.name[5:]) for path in (tmp_path / "state").iterdir()}
    assert (models, states) == ({4, 5, 8, 9, 10}, {9, 10})
    assert (tmp_path / "best").resolve().name == "step-00000005"
    assert not list((tmp_path / "work" / "tmp").iterdir())


@pytest.mark.parametrize(
    "victim", ["step-00000002/model.safetensors", "step-00000002/tokenizer.json", "state/step-00000002/rank-00000.safetensors"]
)
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_noticed_and_the_one_before_is_taken(
    damage: str, victim: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with checkpoints(tmp_path) as store:
        store.save(1, tiny.build(), {"x": torch.ones(9)})
        store.save(2, tiny.build(), {"x": torch.ones(9)})
    file = tmp_path / victim
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data[:-1] if damage == "cut" else data)
    if damage == "remove":
        file.unlink()
    found = store.latest()
    assert found is not None and found.step == 1
    assert "the checkpoint of step 2 is passed over" in capsys.readouterr().err


def test_an_error_of_the_writer_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = checkpoints(tmp_path)
    monkeypatch.setattr("gemel.train.checkpoint.sync", lambda folders: fail(OSError("no space left on device")))
    store.save(1, tiny.build(), {})
    with pytest.raises(
        CheckpointError, match=r"the checkpoint of step 1 cannot be written to .*: no space left on device; make room there"
    ):
        store.wait()
    assert store.latest() is None
    monkeypatch.undo()
    with store:
        store.save(2, tiny.build(), {})
    found = store.latest()
    assert found is not None and found.step == 2


def fail(error: Exception) -> None:
    raise error


def test_killed_at_any_moment_of_a_save(tmp_path: Path) -> None:
    """Afterwards the checkpoint that was being written is there, or the one before it; and going on ends in the same bits."""
    values = runs.values(tmp_path, steps=4, save={"every": 2, "asynchronous": False, "keep": 1})
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(plain(values)))
    (tmp_path / "out").mkdir()
    (tmp_path / "before").mkdir()
    command = [sys.executable, "-m", "tests.train.killed", str(tmp_path), "5"]
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr
    whole, *killed = map(json.loads, done.stdout.splitlines())
    assert {outcome["saving"] for outcome in killed} == {0, 2, 4}
    for outcome in killed:
        assert (outcome["found"] or 0) in (outcome["saving"], outcome["saving"] - 2)
        assert (outcome["step"], outcome["weights"], outcome["losses"]) == (4, whole["weights"], whole["losses"])
    assert {outcome["found"] for outcome in killed} == {None, 2, 4}


def plain(value: Any) -> Any:
    """What TOML can write."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items() if inner is not None}
    return list(map(plain, value)) if isinstance(value, list | tuple) else value

"""Training recipes: those that are shipped, what survives a file, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomli_w

from gemel.config import train as config
from gemel.config.errors import ConfigError
from gemel.config.train import TrainRecipe

ROOT = Path(__file__).resolve().parents[2]
LEAST: dict[str, Any] = {
    "out": "out/x",
    "steps": 3,
    "model": {"kind": "pretrained", "path": "m"},
    "data": {"train": [{"kind": "shards", "path": "t"}]},
    "batch": {"tokens": 64, "sequence": 32},
}
SHIPPED = [path for path in sorted((ROOT / "recipes").glob("*.toml")) if "steps = " in path.read_text()]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_survive_being_written(path: Path, tmp_path: Path) -> None:
    recipe = config.load(path)
    (tmp_path / "run.toml").write_text(tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True)))
    assert config.load(tmp_path / "run.toml") == recipe


def test_there_are_the_two_that_are_promised() -> None:
    assert {path.stem for path in SHIPPED} >= {"tiny_pretrain", "sft_smollm2"}


def test_settings_go_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(tomli_w.dumps(LEAST))
    recipe = config.load(tmp_path / "r.toml", ["steps=7", "optim.lr=1e-3", "data.train.0.packing=best_fit", "precision.kind=bf16"])
    assert (recipe.steps, recipe.optim.lr, recipe.data.train[0].kind, recipe.precision.kind) == (7, 1e-3, "shards", "bf16")


def test_square_roots_survive_a_file(tmp_path: Path) -> None:
    """TOML has no None, so nothing whose default is something else may mean it."""
    recipe = TrainRecipe.parse(LEAST | {"activations": {"kind": "recompute", "blocks": "sqrt"}})
    (tmp_path / "run.toml").write_text(tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True)))
    assert config.load(tmp_path / "run.toml") == recipe


def test_what_decides_the_result_and_what_does_not() -> None:
    plain = TrainRecipe.parse(LEAST)
    harmless = {"out": "b", "steps": 9, "threads": 1, "device": "cpu", "save": {"every": 1}, "heap": "return"}
    assert TrainRecipe.parse(LEAST | harmless).what() == plain.what()
    looked = LEAST | {"data": LEAST["data"] | {"holdout": 0.1}}
    assert TrainRecipe.parse(looked | {"validation": {"every": 2}}).what() == TrainRecipe.parse(looked).what()
    levers = {"tiling": {"kind": "outputs"}, "compile": {"kind": "none"}, "activations": {"kind": "selective"}}
    assert TrainRecipe.parse(LEAST | levers).what() == plain.what()
    assert TrainRecipe.parse(LEAST | {"batch": LEAST["batch"] | {"micro_tokens": 32}}).what() == plain.what()
    for change in (
        {"seed": 1},
        {"loss": {"z_loss": 0.1}},
        {"optim": {"lr": 1.0}},
        {"precision": {"kind": "bf16"}},
        {"dropout": {"residual": 0.1}},
    ):
        assert TrainRecipe.parse(LEAST | change).what() != plain.what()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"optim": {"lrr": 1}}, "OptimConfig has no key 'optim.lrr': did you mean 'lr'?"),
        ({"data": {"train": [{"kind": "shard", "path": "t"}]}}, "data.train.0.kind = 'shard' is not known: did you mean 'shards'?"),
        ({"data": {"train": []}}, "data.train"),
        ({"model": {"path": "m"}}, "model has no kind; it is one of pretrained, new"),
        ({"batch": {"tokens": 64, "sequence": 30}}, "batch: tokens = 64 is not a multiple of sequence = 30; 60 is"),
        (
            {"batch": {"tokens": 96, "sequence": 32, "micro_tokens": 64}},
            "batch: tokens = 96 is not a multiple of micro_tokens = 64; 128 is",
        ),
        ({"batch": {"tokens": 8, "sequence": 32}}, "batch: tokens = 8 is not a multiple of sequence = 32; 32 is"),
        ({"tokenizer": {"kind": "learnt"}}, "tokenizer.kind = 'learnt' needs a source of kind 'documents'"),
        ({"tokenizer": {"kind": "learnt", "end_of_document": "x"}}, "tokenizer: end_of_document = 'x' is not among special_tokens"),
        ({"validation": {"patience": 3}}, "validation.patience needs something to validate on: set data.holdout = 0.01"),
        ({"validation": {"every": 3}}, "validation.every needs something to validate on: set data.holdout = 0.01"),
        ({"dropout": {"residual": 1.0}}, "dropout.residual = 1.0: Input should be less than 1"),
        ({"optim": {"weights": "master"}, "precision": {"kind": "fp16"}}, "optim.weights = 'master' keeps parameters in bf16"),
    ],
)
def test_mistakes_are_refused_with_a_way_out(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        TrainRecipe.parse(LEAST | change)
    assert says in str(error.value)


def test_a_file_that_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the recipe"):
        config.load(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("steps = ")
    with pytest.raises(ConfigError, match="is not TOML"):
        config.load(tmp_path / "bad.toml")

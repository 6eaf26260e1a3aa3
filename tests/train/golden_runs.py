"""Three tiny recipes of 50 steps whose losses are kept, and the way to make them.

Between them they go through most of what decides a loss: both packings, conversations, three shapes of model, three methods, three
schedules, clipping, the loss's extras, narrow numbers and recomputed activations. What they are made from has no randomness of its own.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gemel.bench import machine
from gemel.tokenizer.conversation import Conversation, Message
from gemel.train import metrics
from gemel.train.run import run
from tests import tiny
from tests.train import runs

FOLDER = Path(__file__).parent / "golden"
STEPS = 50
WORDS = ("the thing", "this one", "then", "there", "the other", "where", "in the end", "here")


def pretrain(_folder: Path) -> dict[str, Any]:
    """As `recipes/tiny_pretrain.toml`: Llama, fp32, AdamW, cosine."""
    return {"optim__schedule": {"kind": "cosine", "warmup": 0.1, "final": 0.1}, "data__holdout": 0.1, "validation__every": 25}


def narrow(folder: Path) -> dict[str, Any]:
    """Qwen3 with weights in bf16 and master copies: Muon, WSD, AdaGC, z-loss, whole documents, activations computed again."""
    config = tiny.CONFIGS["qk_norm"].model_copy(update={"vocab_size": len(runs.tokenizer().bytes_of), "max_positions": 64})
    source = {"kind": "shards", "path": str(folder / "shards"), "packing": "best_fit"}
    return {
        "model__config": config.model_dump(),
        "data__train": [source],
        "precision": {"kind": "bf16"},
        "activations": {"kind": "selective"},
        "loss__z_loss": 1e-3,
        "optim__weights": "master",
        "optim__method": {"kind": "muon"},
        "optim__schedule": {"kind": "wsd", "warmup": 5, "decay": 0.3},
        "optim__clip": {"kind": "adagc", "warmup": 5},
    }


def chat(folder: Path) -> dict[str, Any]:
    """GPT-2 on conversations: only answers are trained, with label smoothing, Lion, and a linear schedule."""
    config = tiny.CONFIGS["learned"].model_copy(update={"vocab_size": len(runs.tokenizer().bytes_of), "max_positions": 64})
    path = folder / "talks.jsonl"
    talks = [
        Conversation((Message("user", WORDS[i % 8]), Message("assistant", f"{WORDS[i * 3 % 8]} {WORDS[(i + 5) % 8]}")), f"{i}", "test")
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(talk.as_json()) + "\n" for talk in talks))
    return {
        "model__config": config.model_dump(),
        "data__train": [{"kind": "conversations", "paths": [str(path)]}],
        "loss__label_smoothing": 0.1,
        "optim__lr": 2e-3,
        "optim__method": {"kind": "lion"},
        "optim__schedule": {"kind": "linear", "warmup": 5},
    }


RECIPES = {"pretrain": pretrain, "narrow": narrow, "chat": chat}


def losses(name: str, folder: Path) -> list[float]:
    """Of each step."""
    folder.mkdir(exist_ok=True)
    changes = {"steps": STEPS, "save": {}, "threads": 1} | RECIPES[name](folder)
    recipe = runs.recipe(folder, **changes)
    threads = torch.get_num_threads()
    try:
        run(recipe, quiet=True)
    finally:
        torch.set_num_threads(threads)
    return [line["loss"] for line in metrics.read(recipe.out) if "event" not in line]


def read(name: str) -> Mapping[str, Any]:
    """What is kept."""
    found: Mapping[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return found


def write(name: str, values: list[float]) -> None:
    """Keep losses, with where they come from."""
    here = machine.describe()
    about = {"cpu": here.cpu, "isa": list(here.isa), "system": platform.system(), "python": here.python, "torch": here.torch}
    (FOLDER / f"{name}.json").write_text(json.dumps(about | {"recipe": RECIPES[name].__doc__, "losses": values}, indent=1) + "\n")

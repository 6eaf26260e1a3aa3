"""A run that is killed (SIGKILL) at every point where a checkpoint changes what is on the disk, and then goes on. Run as a program, because
a process can be forked safely only before torch has started threads; this one computes nothing itself.

Prints a JSON object for each point: the step that was being saved, the step that was found afterwards, and a hash of the final weights. The
first has no point: it is the run that nobody killed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from gemel.config import train as config
from gemel.model.tensor_file import TensorFile
from gemel.train import checkpoint, run


def main(folder: Path, every: int) -> None:
    recipe = config.load(folder / "recipe.toml")
    outcome = in_child(lambda: finish(recipe, 0))
    num_points = outcome["points"]
    print(json.dumps(outcome), flush=True)
    for point in range(1, num_points + 1, every):
        shutil.rmtree(recipe.out)
        shutil.copytree(folder / "before", recipe.out)
        status = in_child(lambda point=point: finish(recipe, point))
        assert status["signal"] == signal.SIGKILL, status
        saving = int((folder / "saving").read_text())
        found = in_child(lambda: latest(recipe))
        print(json.dumps({"point": point, "saving": saving, **found, **in_child(lambda: finish(recipe, 0))}), flush=True)


def finish(recipe: config.TrainRecipe, kill_at: int) -> dict[str, Any]:
    """Do what is missing of a run; be killed at the so-manieth point, if not 0."""
    count, saving = 0, recipe.out.parent / "saving"
    saving.write_bytes(b"0")

    def point() -> None:
        nonlocal count
        count += 1
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            point()
            return function(*args, **kwargs)

        return called

    save = checkpoint.Checkpoints.save

    def noted(self: checkpoint.Checkpoints, step: int, *args: Any) -> None:
        saving.write_bytes(str(step).encode())
        save(self, step, *args)

    checkpoint.Checkpoints.save = noted  # type: ignore[method-assign,assignment]
    os.fsync = before(os.fsync)
    Path.replace = before(Path.replace)  # type: ignore[method-assign]
    Path.write_text = before(Path.write_text)  # type: ignore[method-assign]
    checkpoint.shutil.rmtree = before(shutil.rmtree)  # type: ignore[attr-defined]
    TensorFile.__enter__ = before(TensorFile.__enter__)  # type: ignore[method-assign]
    result = run.run(recipe, quiet=True)
    weights = (recipe.out / "latest" / "model.safetensors").read_bytes()
    metrics = [json.loads(line) for line in (recipe.out / "metrics.jsonl").read_text().splitlines()]
    return {"points": count, "step": result.step, "weights": xxhash.xxh3_64_hexdigest(weights), "losses": [x["loss"] for x in metrics]}


def latest(recipe: config.TrainRecipe) -> dict[str, Any]:
    from gemel.tokenizer.tokenizer import Tokenizer

    assert recipe.tokenizer is not None and recipe.tokenizer.kind == "pretrained"
    found = checkpoint.Checkpoints(recipe.out, recipe.save, Tokenizer.load(recipe.tokenizer.path)).latest()
    return {"found": None if found is None else found.step}


def in_child(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` returns in a process of its own, or the signal that ended it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.write(writing, json.dumps(work()).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as answer:
        text = answer.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return {"signal": os.WTERMSIG(status)}
    assert os.WEXITSTATUS(status) == 0, "a child failed, see above"
    return dict(json.loads(text))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

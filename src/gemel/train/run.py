"""A training run from its recipe, or from where it was left, to its end."""

from __future__ import annotations

import errno
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import tomli_w
import torch
from torch import nn

from gemel.config import env
from gemel.config import train as config
from gemel.config.compute import Resident
from gemel.config.errors import CheckpointError, ConfigError
from gemel.config.sources import NewModel, PretrainedModel
from gemel.config.train import TrainRecipe
from gemel.data import manifest
from gemel.model import build
from gemel.model.build import LoadedModel
from gemel.model.model import Model
from gemel.model.pieces import Share
from gemel.ops import hardware
from gemel.tokenizer.tokenizer import Tokenizer
from gemel.train import precision, schedule, trackers
from gemel.train.checkpoint import Checkpoints, Found
from gemel.train.loader import Loader, Source
from gemel.train.loop import Loop, Result, Watch
from gemel.train.metrics import Metrics
from gemel.train.parallel.mesh import Mesh, join
from gemel.train.prepare import Preparation
from gemel.train.progress import Progress
from gemel.train.trainer import Trainer

RECIPE = "run.toml"
REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


def run(
    recipe: TrainRecipe,
    peak_flops_per_s: float | None = None,
    quiet: bool = False,
    watch: Watch | None = None,
    prepared: Path | None = None,
) -> Result:
    """Do what is missing of a run. `peak_flops_per_s` is what utilization is measured against, of this process.

    `watch` is asked after every look at the validation data whether to give up. `prepared` is a folder for learnt tokenizers and tokenized
    data, if that is not the run's own: several runs, one after the other, can share it. Where a launcher has started several processes, all
    of them must call it; rank 0 writes and speaks.
    """
    device = device_of(recipe)
    torch.manual_seed(recipe.seed)
    if threads := threads_of(recipe, device):
        torch.set_num_threads(threads)
    with join(recipe.parallel, device) as mesh, _room(recipe.out):
        make_folder(recipe.out)
        with manifest.Lock(recipe.out, shared=False) if mesh.first else nullcontext():
            peak = None if peak_flops_per_s is None else mesh.sum([peak_flops_per_s])[0]
            return _run(recipe, device, mesh, Progress(recipe.steps, peak, quiet or not mesh.first), peak, watch, prepared)


@contextmanager
def _room(out: Path) -> Iterator[None]:
    """Turns what a disk refuses into something to read."""
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        where = error.filename or f"to {out}"
        raise ConfigError(
            f"cannot write {where}: {error.strerror}; mend that, and the same command goes on from what is saved, or give another --output"
        ) from None


def make_folder(out: Path) -> None:
    """Where a run writes. Raises ConfigError if it cannot be there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out = {str(out)!r} cannot be made a folder: {error.strerror}; give another --output") from None


def _run(
    recipe: TrainRecipe,
    device: torch.device,
    mesh: Mesh,
    progress: Progress,
    peak_flops_per_s: float | None,
    watch: Watch | None,
    prepared: Path | None,
) -> Result:
    with mesh.in_turn():
        _check_recipe(recipe)
        _check_shared(recipe, mesh)
        _check_before_long(recipe)
        preparation = Preparation(recipe, progress, progress.quiet, prepared)
        tokenizer = preparation.tokenizer()
        _check_vocabulary(recipe, tokenizer)
        training, validation = preparation.sources(tokenizer)
    with Checkpoints(recipe.out, recipe.save, tokenizer, mesh) as checkpoints:
        found = checkpoints.latest()
        _check_found(recipe, found)
        with mesh.in_turn():
            _write_recipe(recipe, mesh)
        loaded, weights = _model(recipe, tokenizer, found, mesh)
        begins = _begins(recipe, loaded, training, found)
        trainer = Trainer(recipe, loaded, device, mesh, weights)
        loader = Loader(training, recipe.batch, mesh.data.rank, mesh.data.size)
        num_bytes = 0 if found is None else found.state["metrics_bytes"]
        with Metrics(recipe.out, num_bytes, peak_flops_per_s, trackers.of(recipe)) if mesh.first else nullcontext() as metrics:
            loop = Loop(recipe, trainer, loader, validation, checkpoints, metrics, progress, mesh, watch)
            if found is not None:
                loop.resume(found)
            progress.say(begins)
            del found, weights  # files that are mapped
            return loop.run()


def _check_shared(recipe: TrainRecipe, mesh: Mesh) -> None:
    """Rank 0 leaves a sign in the run's folder for the others to find."""
    sign = recipe.out / "work" / "shared"
    if mesh.num_ranks == 1:
        return
    if mesh.first:
        sign.parent.mkdir(exist_ok=True)
        sign.touch()
    elif not sign.exists():
        raise ConfigError(
            f"out = {recipe.out} of rank {mesh.rank} is not the folder of rank 0 on another machine; set out to one that all share"
        )


def threads_of(recipe: TrainRecipe, device: torch.device) -> int | None:
    """Of one operation; None leaves what torch takes by itself. Ranks on one machine share its cores."""
    place = env.place()
    if recipe.threads is None and place is not None and device.type == "cpu":
        return max(hardware.cores().usable // place.num_local, 1)
    return recipe.threads


def device_of(recipe: TrainRecipe) -> torch.device:
    """Where a recipe is trained: of several devices of a machine, each rank has its own."""
    if recipe.device != "cpu" and torch.cuda.is_available() and (place := env.place()) is not None:
        if recipe.device not in ("auto", "cuda"):
            raise ConfigError(f"device = {recipe.device!r} is one device, and {place.num_ranks} ranks need one each; use 'cuda' or 'auto'")
        torch.cuda.set_device(place.local_rank)
        return torch.device("cuda", place.local_rank)
    if recipe.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if recipe.device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device = {recipe.device!r}, but torch {torch.__version__} finds no CUDA device here; use 'cpu' or 'auto'")
    return torch.device(recipe.device)


def _model(recipe: TrainRecipe, tokenizer: Tokenizer, found: Found | None, mesh: Mesh) -> tuple[LoadedModel, Share | None]:
    """With its weights; or without, and apart from it where each of several ranks finds those that it needs."""
    dtype, weights = precision.parameter_dtype(recipe.optim), None
    path = found.model if found is not None else recipe.model.path if isinstance(recipe.model, PretrainedModel) else None
    if path is None:
        assert isinstance(recipe.model, NewModel)
        build.described(recipe.model.config)
        loaded = fresh(recipe.model, recipe.seed, tokenizer, dtype)
    elif mesh.num_ranks == 1 or not isinstance(recipe.offload.parameters, Resident):
        loaded = build.load(path, dtype, weights="dense")
    else:
        loaded, weights = build.lay_out(path, dtype)
    return loaded, weights


def fresh(new: NewModel, seed: int, tokenizer: Tokenizer, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """A model with random weights, the same for the same seed."""
    config = new.config
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = Model(config)
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding) and not (module is model.head and config.tied_head):
                into_stream = name.endswith((".attn.out", ".mlp.down"))
                nn.init.normal_(module.weight, std=new.std / math.sqrt(2 * config.num_layers) if into_stream else new.std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for parameter in model.parameters():
            parameter.data = parameter.to(dtype)
    return LoadedModel(model, config, Path(), tokenizer.eos_ids, tokenizer.bos_id, dtype)


def _check_before_long(recipe: TrainRecipe) -> None:
    """What would otherwise come to light when the data is prepared, which may take hours."""
    trackers.require(recipe.metrics)
    schedule.rate(recipe.optim, 0, recipe.steps)
    if isinstance(recipe.model, PretrainedModel) and recipe.batch.sequence > (most := build.peek(recipe.model.path).config.max_positions):
        raise ConfigError(f"batch.sequence = {recipe.batch.sequence} is more than the model's {most} positions; lower it")


def _check_vocabulary(recipe: TrainRecipe, tokenizer: Tokenizer) -> None:
    new = isinstance(recipe.model, NewModel)
    rows = recipe.model.config.vocab_size if isinstance(recipe.model, NewModel) else build.peek(recipe.model.path).config.vocab_size
    if (num := len(tokenizer.bytes_of)) > rows:
        way_out = f"set model.config.vocab_size = {num} or more" if new else "extend the model with: gemel tokenizer extend"
        raise ConfigError(f"the model has {rows} rows in its vocabulary, the tokenizer {num} tokens; {way_out}")


def _check_found(recipe: TrainRecipe, found: Found | None) -> None:
    """Checkpoints that cannot be read are not written over: somebody may be able to repair them, or have a gemel that reads them."""
    if found is None and any((recipe.out / "state").glob("step-*")):
        raise CheckpointError(
            f"{recipe.out} holds checkpoints, and none of them is whole; give another --output, or remove that folder to begin anew"
        )


def _begins(recipe: TrainRecipe, loaded: LoadedModel, sources: Sequence[Source], found: Found | None) -> str:
    """How much is learnt by how much: whether a run sees its data a tenth of a time or fifty times is worth a line."""
    if found is not None and found.step >= recipe.steps:
        return f"all of steps = {recipe.steps} are done; with more of them, as --set steps={2 * found.step}, the run goes on"
    num_weights = sum(parameter.numel() for parameter in loaded.model.parameters())
    there, batch = sum(int(source.documents.lengths.sum()) for source in sources), recipe.batch.tokens
    times = f"go through them {recipe.steps * batch / there:.3g} times"
    goes_on = "" if found is None else f"going on from step {found.step} in {recipe.out}: "
    return f"{goes_on}{num_weights:,} weights, {there:,} tokens to learn from; {recipe.steps:,} steps of {batch:,} {times}"


def _check_recipe(recipe: TrainRecipe) -> None:
    """A run that goes on must be of the same recipe. Asked before anything is prepared, or another run's data would be made anew."""
    path = recipe.out / RECIPE
    if path.exists() and any((recipe.out / "state").glob("step-*")):
        before = config.load(path)
        if differences := list(manifest.differences("", before.what(), recipe.what())):
            raise ConfigError(
                f"{recipe.out} holds a run of another recipe: {'; '.join(_some(differences))}. "
                "Give another --output, or remove that folder to begin anew"
            )


def _write_recipe(recipe: TrainRecipe, mesh: Mesh) -> None:
    """Keep the run's recipe."""
    if not mesh.first:
        return
    path = recipe.out / RECIPE
    draft = recipe.out / "work" / RECIPE
    draft.write_text(tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True)), encoding="utf-8")
    draft.replace(path)


def _some(items: list[str]) -> Iterator[str]:
    yield from items[:5]
    if len(items) > 5:
        yield f"and {len(items) - 5} more"

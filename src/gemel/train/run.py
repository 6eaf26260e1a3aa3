"""A training run from its recipe, or from where it was left, to its end."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import tomli_w
import torch
from torch import nn

from gemel.config import train as config
from gemel.config.errors import ConfigError
from gemel.config.train import NewModel, PretrainedModel, ShardSource, TrainRecipe
from gemel.data import manifest
from gemel.data.shards import TokenShards
from gemel.model import build
from gemel.model.build import LoadedModel
from gemel.model.model import Model
from gemel.tokenizer.tokenizer import Tokenizer
from gemel.train import documents
from gemel.train.checkpoint import Checkpoints, Found
from gemel.train.loader import Documents, Loader, Source
from gemel.train.loop import Loop, Result
from gemel.train.metrics import Metrics
from gemel.train.progress import Progress
from gemel.train.trainer import Trainer

RECIPE = "run.toml"


def run(recipe: TrainRecipe, peak_flops_per_s: float | None = None, quiet: bool = False) -> Result:
    """Do what is missing of a run. `peak_flops_per_s` is what utilization is measured against."""
    device = _device(recipe)
    torch.manual_seed(recipe.seed)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    recipe.out.mkdir(parents=True, exist_ok=True)
    with manifest.Lock(recipe.out, shared=False):
        tokenizer = _tokenizer(recipe)
        training, validation = _sources(recipe)
        with Checkpoints(recipe.out, recipe.save, tokenizer) as checkpoints:
            found = checkpoints.latest()
            _write_recipe(recipe, found)
            trainer = Trainer(recipe, _model(recipe, tokenizer, found), device)
            loader = Loader(training, recipe.batch)
            num_bytes = 0
            if found is not None:
                trainer.load_state_dict(found.state["trainer"])
                loader.seek(found.state["loader"])
                num_bytes = found.state["metrics_bytes"]
            progress = Progress(recipe.steps, peak_flops_per_s, quiet)
            if found is not None:
                progress.say(f"going on from step {found.step} in {recipe.out}")
            with Metrics(recipe.out, num_bytes) as metrics:
                return Loop(recipe, trainer, loader, validation, checkpoints, metrics, progress).run()


def _device(recipe: TrainRecipe) -> torch.device:
    if recipe.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if recipe.device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device = {recipe.device!r}, but torch {torch.__version__} finds no CUDA device here; use 'cpu' or 'auto'")
    return torch.device(recipe.device)


def _tokenizer(recipe: TrainRecipe) -> Tokenizer | None:
    match recipe.tokenizer:
        case config.LoadedTokenizer(path=path):
            return Tokenizer.load(path)
        case _:
            assert isinstance(recipe.model, PretrainedModel)
            return Tokenizer.load(recipe.model.path)


def _sources(recipe: TrainRecipe) -> tuple[list[Source], list[Source]]:
    training: list[Source] = []
    validation: list[Source] = []
    for number, source in enumerate(recipe.data.train):
        assert isinstance(source, ShardSource)
        whole = documents.ShardDocuments(TokenShards.open(source.path))
        name = f"{number} {source.path}"
        seed = recipe.seed + number
        kept: Documents = whole
        if recipe.data.holdout:
            kept, held = documents.hold_out(whole, recipe.data.holdout, recipe.seed)
            validation.append(Source(f"{name} held out", held, source.packing, recipe.batch.sequence, seed))
        training.append(Source(name, kept, source.packing, recipe.batch.sequence, seed, source.weight))
    return training, validation


def _model(recipe: TrainRecipe, tokenizer: Tokenizer | None, found: Found | None) -> LoadedModel:
    if found is not None:
        return build.load(found.model)
    match recipe.model:
        case PretrainedModel(path=path):
            return build.load(path)
        case NewModel():
            assert tokenizer is not None
            return fresh(recipe.model, recipe.seed, tokenizer)


def fresh(new: NewModel, seed: int, tokenizer: Tokenizer) -> LoadedModel:
    """A model with random weights, the same for the same seed."""
    if tokenizer.vocab_size > new.config.vocab_size:
        raise ConfigError(
            f"model.config.vocab_size = {new.config.vocab_size}, less than the tokenizer's {tokenizer.vocab_size} tokens; raise it"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Model(new.config)
        with torch.no_grad():
            for name, module in model.named_modules():
                if isinstance(module, nn.Linear | nn.Embedding) and not (module is model.head and new.config.tied_head):
                    into_stream = name.endswith((".attn.out", ".mlp.down"))
                    nn.init.normal_(module.weight, std=new.std / math.sqrt(2 * new.config.num_layers) if into_stream else new.std)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
    return LoadedModel(model, new.config, Path(), tokenizer.eos_ids, tokenizer.bos_id)


def _write_recipe(recipe: TrainRecipe, found: Found | None) -> None:
    """Keep the run's recipe; a run that goes on must be of the same."""
    path = recipe.out / RECIPE
    if found is not None and path.exists():
        before = config.load(path)
        if differences := list(manifest.differences("", before.what(), recipe.what())):
            raise ConfigError(
                f"{recipe.out} holds a run of another recipe: {'; '.join(_some(differences))}. "
                "Give another --output, or remove that folder to begin anew"
            )
    draft = recipe.out / "work" / RECIPE
    draft.write_text(tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True)), encoding="utf-8")
    draft.replace(path)


def _some(items: list[str]) -> Iterator[str]:
    yield from items[:5]
    if len(items) > 5:
        yield f"and {len(items) - 5} more"

"""A training recipe: which model learns from which data, in which steps, and what is kept of it.

`[model]`, `[tokenizer]`, `[data]`, `[batch]`, `[loss]`, `[optim]`, `[precision]`, `[dropout]`, `[stability]`, `seed` and `steps` decide
what comes out; everything else decides how fast, and what is written down. A run that was stopped goes on only with the same values of the
first kind (`what`), but for `steps`: more of them make a run longer.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from gemel.config.base import Config
from gemel.config.compute import (
    BF16,
    FP8,
    FP32,
    Activations,
    Compile,
    CompileBlocks,
    Heap,
    NoCompile,
    OffloadConfig,
    Precision,
    Resident,
    SelectiveRecompute,
    TileOutputs,
    Tiling,
    Untiled,
)
from gemel.config.data.pipeline import put
from gemel.config.errors import ConfigError
from gemel.config.optim import OptimConfig, StabilityConfig
from gemel.config.parallel import ParallelConfig
from gemel.config.sources import BatchConfig, DataConfig, DocumentSource, LearntTokenizer, Model, NewModel, TokenizerSource


class LossConfig(Config):
    """What is minimized beside the cross-entropy.

    z_loss           weight of the squared logarithm of the softmax's denominator, which keeps logits from drifting (PaLM,
                     arXiv 2204.02311; usually 1e-4)
    label_smoothing  share of the target that is spread over the vocabulary (Szegedy et al. 2016, arXiv 1512.00567)
    """

    z_loss: NonNegativeFloat = 0.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0


class DropoutConfig(Config):
    """What share of numbers is zero, others at random in every step, the rest as much larger (Srivastava et al. 2014). Not when validating.
    Which ones depends on the seed, the step and the token, and not on the mesh.

    embedding  of what enters the first block
    residual   of what attention and feed-forward add to the stream
    """

    embedding: Annotated[float, Field(ge=0, lt=1)] = 0.0
    residual: Annotated[float, Field(ge=0, lt=1)] = 0.0


class ValidationConfig(Config):
    """When and how much is looked at.

    every     steps between looks; 0 looks only at the end
    tokens    at most so many of each source; None takes all there are
    patience  so many looks without a smaller loss end the run (early stopping); None never does
    """

    every: NonNegativeInt = 0
    tokens: PositiveInt | None = None
    patience: PositiveInt | None = None


class SaveConfig(Config):
    """Checkpoints: a folder with the model, as every tool reads it, and the state that a run goes on from.

    every         steps between them; 0 saves only at the end and when the run is stopped
    keep          so many of the latest are kept whole
    keep_every    models of steps that are a multiple of this are kept for good, without state; 0 keeps none
    best          the model with the least validation loss is kept, without state
    asynchronous  written while training goes on, for which a copy of model and state is held in memory
    """

    every: NonNegativeInt = 0
    keep: PositiveInt = 2
    keep_every: NonNegativeInt = 0
    best: bool = False
    asynchronous: bool = True


class WandbConfig(Config):
    """Weights & Biases. A run that goes on is the same run there.

    name  of the run; None takes that of its folder
    mode  offline writes files for `wandb sync`
    """

    project: Annotated[str, Field(min_length=1)]
    entity: str | None = None
    name: str | None = None
    mode: Literal["online", "offline"] = "online"


class MLflowConfig(Config):
    """MLflow. A run that goes on is the same run there.

    uri   of the tracking server, or a folder; None takes MLflow's own setting
    name  of the run; None takes that of its folder
    """

    experiment: Annotated[str, Field(min_length=1)]
    uri: str | None = None
    name: str | None = None


class MetricsConfig(Config):
    """What is written down beside metrics.jsonl, which has a line for every step. Each needs the package of its name.

    tensorboard  event files
    """

    tensorboard: bool = False
    wandb: WandbConfig | None = None
    mlflow: MLflowConfig | None = None


class TrainRecipe(Config):
    """A whole run.

    out      folder of everything that the run writes
    steps    of the optimizer
    device   auto takes cuda where there is one, else cpu
    threads  of one operation; None takes the cores that this process may use
    heap     what a CPU does with the memory of large tensors that nobody needs any more: keep it for the next ones, which leaves holes, or
             return it to the system, which costs time

    Activations are selective unless that is set otherwise or blocks are compiled.
    """

    out: Path
    steps: PositiveInt
    model: Model
    data: DataConfig
    batch: BatchConfig
    tokenizer: TokenizerSource | None = None
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    precision: Precision = FP32()
    offload: OffloadConfig = OffloadConfig()
    tiling: Tiling = Untiled()
    compile: Compile = NoCompile()
    activations: Activations = SelectiveRecompute(kind="selective")
    heap: Heap = "keep"
    dropout: DropoutConfig = DropoutConfig()
    stability: StabilityConfig = StabilityConfig()
    validation: ValidationConfig = ValidationConfig()
    save: SaveConfig = SaveConfig()
    metrics: MetricsConfig = MetricsConfig()
    parallel: ParallelConfig = ParallelConfig()
    seed: NonNegativeInt = 0
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    threads: PositiveInt | None = None

    @model_validator(mode="before")
    @classmethod
    def _let_compiling_choose(cls, values: Any) -> Any:
        """What compiled blocks keep."""
        compiled = isinstance(values, dict) and isinstance(values.get("compile"), dict) and values["compile"].get("kind") == "blocks"
        return {"activations": {"kind": "none"}} | values if compiled else values

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if isinstance(self.model, NewModel) and self.tokenizer is None:
            raise ValueError("a new model needs a tokenizer: add [tokenizer] with kind = 'pretrained' or 'learnt'")
        if isinstance(self.model, NewModel) and self.batch.sequence > self.model.config.max_positions:
            raise ValueError(
                f"batch.sequence = {self.batch.sequence} is more than model.config.max_positions = {self.model.config.max_positions}; "
                "lower it"
            )
        sources = (*self.data.train, *self.data.validation)
        if isinstance(self.tokenizer, LearntTokenizer) and not any(isinstance(source, DocumentSource) for source in sources):
            raise ValueError("tokenizer.kind = 'learnt' needs a source of kind 'documents' to learn from; there is none")
        if self.optim.weights != "fp32" and not isinstance(self.precision, BF16 | FP8):
            raise ValueError(f"optim.weights = {self.optim.weights!r} keeps parameters in bf16, which needs precision.kind = 'bf16'")
        if isinstance(self.compile, CompileBlocks) and isinstance(self.activations, SelectiveRecompute):
            raise ValueError(
                "activations.kind = 'selective' is about operations that a compiled block does not show, and compiling chooses by itself "
                "what to keep; leave activations or compile out"
            )
        if isinstance(self.compile, CompileBlocks) and not isinstance(self.tiling, Untiled):
            raise ValueError("tiling has no place in compiled blocks, where other kernels do the products; leave tiling or compile out")
        if isinstance(self.precision, FP8) and isinstance(self.tiling, TileOutputs):
            raise ValueError("tiling.kind = 'outputs' and precision.kind = 'fp8' both say how products are done; leave one of them out")
        self._check_offload()
        looks = {"save.best": self.save.best, **{f"validation.{name}": value for name, value in self.validation}}
        if (name := next((name for name, value in looks.items() if value), None)) and not (self.data.validation or self.data.holdout):
            raise ValueError(f"{name} needs something to validate on: set data.holdout = 0.01, or give data.validation")
        if self.validation.patience and not self.validation.every:
            raise ValueError(f"validation.patience = {self.validation.patience} counts looks on the way: set validation.every, too")
        self._check_parallel()
        if self.batch.sequences % self.parallel.data:
            unit = math.lcm(self.parallel.data * self.batch.sequence, self.batch.micro_tokens or 1)
            raise ValueError(
                f"batch.tokens = {self.batch.tokens} are {self.batch.sequences} sequences, which do not divide among the "
                f"{self.parallel.data} ranks of parallel.replicate and shard; {-(-self.batch.tokens // unit) * unit} tokens would"
            )
        return self

    def _check_offload(self) -> None:
        keeps = self.optim.method.has_state or self.optim.weights == "master"
        if not isinstance(self.offload.optimizer, Resident) and not keeps:
            raise ValueError(
                f"offload.optimizer has no effect: {self.optim.method.kind} as it is set keeps no state of the size of the weights; leave "
                f"it out or set optim.method.{self.optim.way_to_state}"
            )
        if self.offload.to_disk and self.save.asynchronous:
            raise ValueError(
                "offload to disk is there to save memory, and save.asynchronous = true holds a copy of everything in memory while it is "
                "written; set save.asynchronous = false"
            )

    def _check_parallel(self) -> None:
        """Refuse what is built for a model whose layers and products are whole."""
        mesh = self.parallel
        whole = {
            "offload.parameters": not isinstance(self.offload.parameters, Resident),
            "tiling": not isinstance(self.tiling, Untiled),
            "compile": isinstance(self.compile, CompileBlocks),
            "precision.kind = 'fp8'": isinstance(self.precision, FP8),
        }
        cut = mesh.tensor > 1 or mesh.sizes["pipeline"] > 1 or mesh.zero == "parameters"
        if cut and (found := [name for name, there in whole.items() if there]):
            raise ValueError(
                f"{found[0]} needs products and layers that are whole, which parallel.tensor, pipeline and zero = 'parameters' cut; leave "
                "it out, or train with replicate, shard or context"
            )

    def what(self) -> dict[str, Any]:
        """All that decides the numbers that come out, but for how many steps there are."""
        decides = {"model", "tokenizer", "data", "batch", "loss", "optim", "precision", "dropout", "stability", "seed"}
        values = self.model_dump(mode="json", include=decides)
        values["batch"].pop("micro_tokens")
        return values


def load(path: Path, settings: Iterable[str] = ()) -> TrainRecipe:
    """The recipe in a TOML file, with `key=value` settings put over it. Errors: `ConfigError`."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    for setting in settings:
        put(values, setting)
    return TrainRecipe.parse(values)

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

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from gemel.config.base import Config
from gemel.config.data.pipeline import put
from gemel.config.errors import ConfigError
from gemel.config.model import ModelConfig
from gemel.config.optim import OptimConfig, StabilityConfig
from gemel.config.parallel import ParallelConfig
from gemel.config.tokenizer import TrainConfig


class PretrainedModel(Config):
    """A model to go on from.

    path  Hugging Face directory or .gguf file
    """

    kind: Literal["pretrained"]
    path: Path


class NewModel(Config):
    """A model with random weights: normal with standard deviation `std`, matrices that write into the residual stream with less, by
    1 / sqrt(2 layers), so that the stream does not grow with depth (GPT-2).
    """

    kind: Literal["new"]
    config: ModelConfig
    std: PositiveFloat = 0.02


Model = Annotated[PretrainedModel | NewModel, Field(discriminator="kind")]


class LoadedTokenizer(Config):
    """A tokenizer that exists.

    path  folder with a tokenizer.json, or a .gguf file
    """

    kind: Literal["pretrained"]
    path: Path


class LearntTokenizer(Config):
    """A tokenizer that is learnt first, from all sources of kind `documents`.

    config           see `TrainConfig`
    end_of_document  which of its special tokens ends a document
    """

    kind: Literal["learnt"]
    config: TrainConfig = TrainConfig()
    end_of_document: str = "<|endoftext|>"

    @model_validator(mode="after")
    def _ends(self) -> Self:
        if self.end_of_document not in self.config.special_tokens:
            raise ValueError(f"end_of_document = {self.end_of_document!r} is not among special_tokens = {self.config.special_tokens!r}")
        return self


TokenizerSource = Annotated[LoadedTokenizer | LearntTokenizer, Field(discriminator="kind")]
Packing = Literal["cut", "best_fit"]


class Source(Config):
    """What all sources share.

    name    what metrics call it; empty takes the last part of its path
    weight  its share of what is trained, relative to the other sources' weights
    """

    name: str = ""
    weight: PositiveFloat = 1.0


class ShardSource(Source):
    """Token shards, as `gemel data` writes them with output.kind = "tokens".

    path     folder of them
    packing  cut: documents run on from one sequence into the next; best_fit: those that fit into a sequence stay whole
    """

    kind: Literal["shards"]
    path: Path
    packing: Packing = "cut"


class DocumentSource(Source):
    """Text, through a data recipe whose output is JSON lines, tokenized when the run begins.

    recipe           the data recipe
    packing          see `ShardSource`
    end_of_document  special token that ends each of them; None takes the tokenizer's EOS
    """

    kind: Literal["documents"]
    recipe: Path
    packing: Packing = "cut"
    end_of_document: str | None = None


class ConversationSource(Source):
    """Conversations, as `gemel data sft` writes them. Trained is what the assistant says, and the token that ends it.

    They are packed whole.

    paths     files of JSON lines
    too_long  what becomes of conversations longer than a sequence: drop them, or cut off their end; either is reported
    """

    kind: Literal["conversations"]
    paths: Annotated[tuple[Path, ...], Field(min_length=1)]
    too_long: Literal["drop", "cut"] = "drop"


AnySource = Annotated[ShardSource | DocumentSource | ConversationSource, Field(discriminator="kind")]


class DataConfig(Config):
    """What is learnt from, and what is only looked at.

    train       sources, mixed by weight
    validation  sources that are not trained
    holdout     share of each training source's documents that is kept for validation instead
    """

    train: Annotated[tuple[AnySource, ...], Field(min_length=1)]
    validation: tuple[AnySource, ...] = ()
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.0


class BatchConfig(Config):
    """How much is learnt at once, in tokens.

    tokens        of one step of the optimizer
    micro_tokens  the most that goes through the model at once: memory grows with it, results do not depend on it. None takes all that a
                  rank has of `tokens`
    sequence      the most that a document may see of itself; no more than the model has positions
    """

    tokens: PositiveInt
    sequence: PositiveInt
    micro_tokens: PositiveInt | None = None

    @property
    def sequences(self) -> int:
        """In a step."""
        return self.tokens // self.sequence

    @property
    def micro_sequences(self) -> int:
        """In a micro-batch."""
        return (self.micro_tokens or self.tokens) // self.sequence

    @model_validator(mode="after")
    def _divides(self) -> Self:
        micro_tokens = self.micro_tokens or self.tokens
        if micro_tokens % self.sequence:
            near = max(micro_tokens // self.sequence, 1) * self.sequence
            name = "tokens" if self.micro_tokens is None else "micro_tokens"
            raise ValueError(f"{name} = {micro_tokens} is not a multiple of sequence = {self.sequence}; {near} is")
        if self.tokens % micro_tokens:
            near = -(-self.tokens // micro_tokens) * micro_tokens
            raise ValueError(f"tokens = {self.tokens} is not a multiple of micro_tokens = {micro_tokens}; {near} is")
        return self


class LossConfig(Config):
    """What is minimized beside the cross-entropy.

    z_loss           weight of the squared logarithm of the softmax's denominator, which keeps logits from drifting (PaLM,
                     arXiv 2204.02311; usually 1e-4)
    label_smoothing  share of the target that is spread over the vocabulary (Szegedy et al. 2016, arXiv 1512.00567)
    """

    z_loss: NonNegativeFloat = 0.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0


class FP32(Config):
    """Everything in fp32."""

    kind: Literal["fp32"] = "fp32"


class BF16(Config):
    """Products in bf16, sums over them, norms and the loss in fp32."""

    kind: Literal["bf16"]


class FP16(Config):
    """As bf16 with fp16, whose range is small: the loss is scaled so that gradients stay within it (Micikevicius et al. 2018,
    arXiv 1710.03740).

    initial_scale   of the loss; halved whenever a gradient overflows, whose step is left out
    growth_steps    doubled after so many steps without an overflow
    """

    kind: Literal["fp16"]
    initial_scale: PositiveFloat = 2.0**16
    growth_steps: PositiveInt = 2000


class FP8(Config):
    """As bf16, with products of the blocks in fp8, forwards and backwards, which needs the package torchao and a GPU that has such products
    (Micikevicius et al. 2022, arXiv 2209.05433). Worth it for large matrices, and only together with `compile`.

    scaling  one scale for a whole tensor, or one for each of its rows, which loses less and costs more
    """

    kind: Literal["fp8"]
    scaling: Literal["tensorwise", "rowwise"] = "tensorwise"


Precision = Annotated[FP32 | BF16 | FP16 | FP8, Field(discriminator="kind")]


class KeepActivations(Config):
    """All activations are kept for the backward pass."""

    kind: Literal["none"] = "none"


class RecomputeBlocks(Config):
    """Only the input of every `blocks` blocks is kept, the rest is computed again (Chen et al. 2016, arXiv 1604.06174).

    blocks  1 recomputes each block on its own; more keep fewer inputs, and hold more at once while going back; "sqrt" takes the square
            root of their number, where both are least
    """

    kind: Literal["recompute"]
    blocks: PositiveInt | Literal["sqrt"] = 1

    def size(self, num_blocks: int) -> int:
        """Of each group, but perhaps the last."""
        return round(math.sqrt(num_blocks)) if self.blocks == "sqrt" else min(self.blocks, num_blocks)


class SelectiveRecompute(Config):
    """Results of matrix products and attention are kept, the cheap rest of each block is computed again (Korthikanti et al. 2022,
    arXiv 2205.05198).
    """

    kind: Literal["selective"]


Activations = Annotated[KeepActivations | RecomputeBlocks | SelectiveRecompute, Field(discriminator="kind")]


class NoCompile(Config):
    """The model runs as it is written."""

    kind: Literal["none"] = "none"


class CompileBlocks(Config):
    """Blocks are compiled by torch (Ansel et al. 2024), attention apart: about a minute on a CPU, which needs a C++ compiler, for the first
    run of its kind on a machine, seconds after that, for what was compiled is kept in the cache folder. Sums may be in another order.
    """

    kind: Literal["blocks"]


Compile = Annotated[NoCompile | CompileBlocks, Field(discriminator="kind")]


class Untiled(Config):
    """Products as they are."""

    kind: Literal["none"] = "none"


class TileOutputs(Config):
    """Large products are done in parts of their outputs, so that what is made of a weight besides itself, such as its copy in bf16, exists
    for one part at a time (memory-centric tiling, Rajbhandari et al. 2021, arXiv 2104.07857).

    match  shell pattern of the names of matrices
    tiles  parts of each
    """

    kind: Literal["outputs"]
    match: Annotated[str, Field(min_length=1)] = "layers.*"
    tiles: Annotated[int, Field(ge=2)] = 4


class TileTokens(Config):
    """Feed-forwards take so many tokens at a time, and their inner activations, the widest of a block, are computed again for the backward
    pass: they are there for one tile at a time (Bekman et al. 2025, arXiv 2506.13996).
    """

    kind: Literal["tokens"]
    tokens: PositiveInt = 1024


Tiling = Annotated[Untiled | TileOutputs | TileTokens, Field(discriminator="kind")]


class DropoutConfig(Config):
    """What share of numbers is zero, others at random in every step, the rest as much larger (Srivastava et al. 2014). Not when validating.

    embedding  of what enters the first block
    residual   of what attention and feed-forward add to the stream
    """

    embedding: Annotated[float, Field(ge=0, lt=1)] = 0.0
    residual: Annotated[float, Field(ge=0, lt=1)] = 0.0


class Resident(Config):
    """Where it is used: in the device's memory."""

    kind: Literal["none"] = "none"


class ToMemory(Config):
    """In the CPU's memory, for devices that have less of their own."""

    kind: Literal["cpu"]


class ToDisk(Config):
    """In files, which should lie on a fast disk. They need no care: a run that was killed leaves none behind.

    folder  of these files; None takes work/offload in the run's folder
    """

    kind: Literal["disk"]
    folder: Path | None = None


Where = Annotated[Resident | ToMemory | ToDisk, Field(discriminator="kind")]


class OffloadConfig(Config):
    """What lives elsewhere and comes when it is needed, the next while one is worked on. No bit of the result depends on it.

    optimizer   what the optimizer keeps
    parameters  those of the blocks
    """

    optimizer: Where = Resident()
    parameters: Where = Resident()

    @property
    def to_disk(self) -> bool:
        """Whether anything lives in files."""
        return isinstance(self.optimizer, ToDisk) or isinstance(self.parameters, ToDisk)


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
    activations: Activations = KeepActivations()
    offload: OffloadConfig = OffloadConfig()
    tiling: Tiling = Untiled()
    compile: Compile = NoCompile()
    dropout: DropoutConfig = DropoutConfig()
    stability: StabilityConfig = StabilityConfig()
    validation: ValidationConfig = ValidationConfig()
    save: SaveConfig = SaveConfig()
    metrics: MetricsConfig = MetricsConfig()
    parallel: ParallelConfig = ParallelConfig()
    seed: NonNegativeInt = 0
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    threads: PositiveInt | None = None

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
                "activations.kind = 'selective' chooses among operations that a compiled block does not show, and compiling chooses by "
                "itself what to keep; set activations.kind = 'none' or 'recompute', or leave compile out"
            )
        if isinstance(self.compile, CompileBlocks) and not isinstance(self.tiling, Untiled):
            raise ValueError("tiling has no place in compiled blocks, where other kernels do the products; leave tiling or compile out")
        if isinstance(self.precision, FP8) and isinstance(self.tiling, TileOutputs):
            raise ValueError("tiling.kind = 'outputs' and precision.kind = 'fp8' both say how products are done; leave one of them out")
        self._check_offload()
        if (self.save.best or self.validation.patience) and not (self.data.validation or self.data.holdout):
            name = "save.best" if self.save.best else "validation.patience"
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
        """Refuse what is built for one process, or for a model whose layers and products are whole."""
        mesh = self.parallel
        alone = {"offload": self.offload != OffloadConfig(), "dropout": self.dropout != DropoutConfig()}
        whole = {
            "tiling": not isinstance(self.tiling, Untiled),
            "compile": isinstance(self.compile, CompileBlocks),
            "precision.kind = 'fp8'": isinstance(self.precision, FP8),
        }
        if mesh.num_ranks > 1 and (found := [name for name, there in alone.items() if there]):
            raise ValueError(f"{found[0]} is for one process, and [parallel] asks for {mesh.num_ranks}; leave one of them out")
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

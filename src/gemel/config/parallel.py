"""How a run is spread over processes: the sizes of the axes of a mesh, and what is cut along each.

    [parallel]
    replicate = 2                                 # copies that see different sequences
    shard = 4                                     # ranks of a copy that see different sequences and share what `zero` says
    zero = "gradients"
    tensor = 2                                    # ranks that compute parts of every matrix product
    sequence = true
    context = { kind = "ring", size = 2 }         # ranks that hold parts of every sequence
    pipeline = { kind = "1f1b", stages = 2 }      # ranks that hold parts of the layers

The product of all sizes is the number of processes. What comes out does not depend on any of this, but for the order in which sums are
rounded, so a run may go on with other sizes.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from gemel.config.base import Config

AtLeastTwo = Annotated[int, Field(ge=2)]
Zero = Literal["none", "optimizer", "gradients", "parameters"]


# --- context: parts of every sequence ------------------------------------------------------------------------------------------------


class WholeContext(Config):
    """Every rank holds whole sequences."""

    kind: Literal["none"] = "none"

    @property
    def size(self) -> int:
        """Ranks that share a sequence."""
        return 1


class Ring(Config):
    """Keys and values travel around the ranks while each works on its own queries (Liu et al. 2023, arXiv 2310.01889)."""

    kind: Literal["ring"]
    size: AtLeastTwo


class Ulysses(Config):
    """Each rank trades its part of the tokens for a part of the heads and back (Jacobs et al. 2023, arXiv 2309.14509)."""

    kind: Literal["ulysses"]
    size: AtLeastTwo


Context = Annotated[WholeContext | Ring | Ulysses, Field(discriminator="kind")]


# --- pipeline: parts of the layers. Micro-batches are those of `batch.micro_tokens` ----------------------------------------------------


class NoPipeline(Config):
    """Every rank holds all layers."""

    kind: Literal["none"] = "none"

    @property
    def stages(self) -> int:
        """Ranks that share the layers."""
        return 1


class GPipe(Config):
    """All forward passes, then all backward passes (Huang et al. 2018, arXiv 1811.06965)."""

    kind: Literal["gpipe"]
    stages: AtLeastTwo


class OneFOneB(Config):
    """Forward and backward passes in turn, so that a stage keeps activations of at most `stages` micro-batches (Narayanan et al. 2019,
    arXiv 1806.03377).
    """

    kind: Literal["1f1b"]
    stages: AtLeastTwo


class Interleaved(Config):
    """1F1B with several runs of layers on every rank, which idles less and sends more (Narayanan et al. 2021, arXiv 2104.04473).

    chunks  runs of layers per rank
    """

    kind: Literal["interleaved"]
    stages: AtLeastTwo
    chunks: AtLeastTwo = 2


class ZeroBubble(Config):
    """1F1B in which gradients of weights wait until there is nothing else to do (Qi et al. 2023, arXiv 2401.10241).

    chunks  runs of layers per rank
    """

    kind: Literal["zero_bubble"]
    stages: AtLeastTwo
    chunks: PositiveInt = 1


Pipeline = Annotated[NoPipeline | GPipe | OneFOneB | Interleaved | ZeroBubble, Field(discriminator="kind")]


# --- the whole -----------------------------------------------------------------------------------------------------------------------


class ParallelConfig(Config):
    """The mesh of a run.

    replicate  copies of the model that learn from different sequences
    shard      ranks of each copy that learn from different sequences too, and share what `zero` says. With both: hybrid sharding
    zero       what the ranks of `shard` and `context` share instead of each having it whole (Rajbhandari et al. 2019, arXiv 1910.02054):
               optimizer states (stage 1), gradients too (stage 2), parameters too (stage 3)
    tensor     ranks that compute parts of the heads, of the feed-forward's width and of the vocabulary (Shoeybi et al. 2019,
               arXiv 1909.08053)
    sequence   between these products each of the `tensor` ranks holds a part of the tokens (Korthikanti et al. 2022, arXiv 2205.05198)
    context    ranks that hold parts of every sequence
    pipeline   ranks that hold parts of the layers
    timeout_s  a rank that has not moved for so long ends the job
    """

    replicate: PositiveInt = 1
    shard: PositiveInt = 1
    zero: Zero = "none"
    tensor: PositiveInt = 1
    sequence: bool = False
    context: Context = WholeContext()
    pipeline: Pipeline = NoPipeline()
    timeout_s: PositiveFloat = 600.0

    @property
    def sizes(self) -> dict[str, int]:
        """Of the axes, outermost first: neighbours on the last ones should be near each other, for they speak most."""
        return {
            "pipeline": self.pipeline.stages,
            "replicate": self.replicate,
            "shard": self.shard,
            "context": self.context.size,
            "tensor": self.tensor,
        }

    @property
    def num_ranks(self) -> int:
        """Processes that the mesh takes."""
        product = 1
        for size in self.sizes.values():
            product *= size
        return product

    @property
    def data(self) -> int:
        """Parts into which the sequences of a step are divided."""
        return self.replicate * self.shard

    @model_validator(mode="after")
    def _nothing_is_without_effect(self) -> Self:
        if self.shard > 1 and self.zero == "none":
            raise ValueError(
                f"shard = {self.shard} with zero = 'none' shares nothing; set zero = 'optimizer', 'gradients' or 'parameters', "
                f"or replicate = {self.replicate * self.shard} and shard = 1"
            )
        if self.pipeline.stages > 1 and self.zero in ("gradients", "parameters"):
            raise ValueError(
                f"zero = {self.zero!r} sends with every micro-batch what a pipeline with micro-batches under way still needs; set "
                "zero = 'optimizer', or leave out [parallel.pipeline]"
            )
        if self.zero != "none" and self.shard * self.context.size == 1:
            raise ValueError(f"zero = {self.zero!r} needs ranks to share between; set shard = 2 or more, or zero = 'none'")
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence = true needs tensor ranks to cut the tokens for; set tensor = 2 or more, or sequence = false")
        return self

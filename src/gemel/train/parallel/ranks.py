"""What this process has of a run's model, and what all have together: the trainer's view of the mesh.

The trainer works on what is here, with names and numbers as if it were alone. What concerns all goes through this: whose batches, whose
gradients, whose norms count, and whole weights and states for checkpoints. On one process each of these is the plain thing itself.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor, nn

from gemel import ops
from gemel.config.model import ModelConfig
from gemel.config.parallel import ParallelConfig, Ring, Ulysses
from gemel.config.train import TrainRecipe
from gemel.model import shard
from gemel.model.attend import Attend, PackedAttend
from gemel.model.build import LoadedModel
from gemel.model.model import Model
from gemel.train import optim, precision, recompute, stability
from gemel.train.batch import Batch
from gemel.train.offload import Homes
from gemel.train.optim import Optimizer
from gemel.train.parallel import data, layout, matrices, sharded, tensor, vocabulary
from gemel.train.parallel.collectives import enter, keep_own
from gemel.train.parallel.context import Layout, RingAttend, UlyssesAttend, check_heads
from gemel.train.parallel.data import Gradients, Write
from gemel.train.parallel.layout import Held
from gemel.train.parallel.mesh import Mesh
from gemel.train.parallel.pipeline import Pipeline
from gemel.train.parallel.sums import add_up


class Ranks:
    """Cuts a model in place, to what this process has of it.

    gradients     of what is here
    parameters    of the whole model that are trained, by name, without memory
    pipeline      of whose stages this process has some, if there is one
    counts        whether this process counts the tokens of its batches: one of those that see the same
    """

    def __init__(self, recipe: TrainRecipe, loaded: LoadedModel, mesh: Mesh, homes: Homes):
        self._config, self._mesh, self._homes, self._loaded, model = recipe.parallel, mesh, homes, loaded, loaded.model
        self._model, self._cuts = model, shard.cuts(model)
        self._hull = model if mesh.num_ranks == 1 else _hull(model)
        self.parameters = {name: torch.empty_like(p, device="meta") for name, p in model.named_parameters() if p.requires_grad}
        self._partial: frozenset[str] = frozenset()
        if mesh.tensor.size > 1:
            self._partial = tensor.cut(model, mesh.tensor, self._config.sequence)
        _check_context(model.config, self._config)
        self.pipeline = self._stages(recipe) if mesh.pipeline.size > 1 else None
        named = {name: p for name, p in model.named_parameters() if name in self.parameters}
        if mesh.num_ranks > 1:
            precision.add_up_in_fp32(named.values())
        self._names = tuple(named)
        self.gradients = self._shared(recipe, named)
        self.counts = mesh.tensor.rank == mesh.context.rank == mesh.pipeline.rank == 0

    def _stages(self, recipe: TrainRecipe) -> Pipeline:
        mesh = self._mesh
        parts = mesh.tensor.size if self._config.sequence else 1
        pipeline = Pipeline(self._model, self._config.pipeline, mesh.pipeline, recipe.batch.sequence, parts)
        for blocks in pipeline.blocks():
            recompute.apply(recipe.activations, blocks)
        return pipeline

    @property
    def num_micros(self) -> int:
        """Batches that had better go through together."""
        return 1 if self.pipeline is None else 2 * self._mesh.pipeline.size

    def _shared(self, recipe: TrainRecipe, named: dict[str, nn.Parameter]) -> Gradients:
        mesh, zero = self._mesh, self._config.zero
        spoken_for = frozenset() if self.pipeline is None else self.pipeline.spoken_for
        speaks = {name: (mesh.tensor.rank == 0 or self._cuts[name].style != "whole") and name not in spoken_for for name in named}
        by_rows = zero == "parameters"
        whole = optim.indivisible(recipe.optim, self.parameters, by_rows or mesh.tensor.size > 1)
        here = [name for name in self.parameters if self.pipeline is None or self.pipeline.has(name)]
        gradients: Gradients
        if zero == "none":
            gradients = data.Everything(named, mesh, speaks)
        elif by_rows:
            gradients = sharded.Sharded(self._model, named, mesh, speaks, recipe.activations)
        else:
            shapes = {name: self._cuts[name].shape_of(0, mesh.tensor.size) for name in here}
            sizes = {name: shape.numel() for name, shape in shapes.items() if shape is not None}
            kind = data.OwnedStates if zero == "optimizer" else data.OwnedGradients
            gradients = kind(named, mesh, self._homes, speaks, data.shares(named, sizes, whole, mesh.shards.size))
        return matrices.put_together(gradients, [name for name in here if name in whole], self._cuts, mesh, by_rows)

    # --- batches and their loss ------------------------------------------------------------------------------------------------------

    def here(self, batch: Batch) -> tuple[Batch, Attend]:
        """What this process sees of a micro-batch of its data rank, and how its tokens look at each other."""
        self._mesh.at("computing a micro-batch")
        axis, config = self._mesh.context, self._model.config
        ring = isinstance(self._config.context, Ring)
        if self._config.sequence:
            batch = tensor.padded(batch, self._mesh.tensor.size * axis.size * (1 + ring))
        if axis.group is None:
            return batch, PackedAttend(config, batch.starts)
        layout = (Layout.zigzag if ring else Layout.even)(batch.starts, axis.size)
        return layout.part(batch, axis.rank), (RingAttend if ring else UlyssesAttend)(config, layout, axis.group)

    def between(self, x_T: Tensor) -> Tensor:
        """Of numbers for the tokens that this process sees, those for the ones that it has between products."""
        return keep_own(x_T, self._mesh.tensor) if self._config.sequence else x_T

    def head_loss(self, hidden_TD: Tensor, batch: Batch, weights_T: Tensor, z_loss: float, label_smoothing: float) -> tuple[Tensor, Tensor]:
        """See `ops.head_cross_entropy`; the same on all tensor ranks."""
        weight_VD, axis = self._model.head.weight, self._mesh.tensor
        if axis.size == 1:
            return ops.head_cross_entropy(hidden_TD, weight_VD, batch.targets_T, weights_T, z_loss, label_smoothing)
        hidden_TD = enter(hidden_TD, axis, self._config.sequence)
        num_rows = self._model.config.vocab_size
        return vocabulary.cross_entropy(hidden_TD, weight_VD, batch.targets_T, weights_T, num_rows, axis, z_loss, label_smoothing)

    def own(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Of some batches that all have, those of this data rank. All ranks get as many, the last ones perhaps of no weight."""
        axis, rest = self._mesh.data, iter(batches)
        while group := list(islice(rest, axis.size)):
            yield group[axis.rank] if axis.rank < len(group) else replace(group[0], weights_T=torch.zeros_like(group[0].weights_T))

    def total(self, of_tokens: Sequence[float] = (), of_loss: Sequence[float] = ()) -> list[float]:
        """Sums over the run: of numbers that belong to a batch, and of numbers that belong to a loss, of which every part has its own."""
        self._mesh.at("adding up numbers of tokens")
        counted = [x if self.counts else 0.0 for x in of_tokens]
        return self._mesh.sum([*counted, *(x if self._mesh.tensor.rank == 0 else 0.0 for x in of_loss)])

    # --- gradients -------------------------------------------------------------------------------------------------------------------

    def collect(self, scale: float) -> dict[str, Tensor]:
        """The gradients of what this process moves, summed over all ranks and divided by `scale`."""
        self._mesh.at("adding up gradients")
        grads = self.gradients.collect()
        if shared := [grads[name] for name in grads if name in self._partial]:
            add_up(shared, self._mesh.tensor)
        if scale != 1:
            torch._foreach_div_(list(grads.values()), scale)
        return grads

    def norms(self, grads: Mapping[str, Tensor], loss: float, z: float) -> tuple[float, float, dict[str, float]]:
        """Loss, z and the norm of each gradient as a whole: the same numbers on every rank, and not finite if they are not on any."""
        norms = stability.measure(grads)
        if self._mesh.num_ranks == 1:
            return loss, z, norms
        pieces = self.gradients.pieces
        counted = [
            norms[name] if name in norms and (pieces[name].speaks or not math.isfinite(norms[name])) else 0.0 for name in self.parameters
        ]
        loss, z, *squares = self.total(of_tokens=(), of_loss=(loss, z)) + self._mesh.sum([norm * norm for norm in counted])
        return loss, z, dict(zip(self.parameters, map(math.sqrt, squares), strict=True))

    # --- whole weights and states ----------------------------------------------------------------------------------------------------

    def whole(self) -> LoadedModel:
        """The model as if it were of one process, on rank 0; elsewhere something of no use. All ranks must call it."""
        if self._mesh.num_ranks == 1:
            return self._loaded
        found = self.gathered({name: self._homes.at_home(piece.tensor.detach()) for name, piece in self.gradients.pieces.items()})
        weights = {id(p): nn.Parameter(found.get(name, p), requires_grad=False) for name, p in self._hull.named_parameters()}
        return replace(self._loaded, model=copy.deepcopy(self._hull, weights))

    def gathered(self, pieces: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors by parameter from what each process has of them, on rank 0; elsewhere nothing. All ranks must call it."""
        self._mesh.at("collecting weights")
        held = ((self._held(name, name, x), x) for name, x in pieces.items() if self.gradients.pieces[name].speaks)
        return layout.gather(held, self._cuts, self._mesh)

    def put(self, weights: Model, write: Write) -> None:
        """Other weights, of the same model as a whole. `write` changes a tensor, wherever it lives."""
        for name in self._names:
            part = self._cuts[name].part(weights.get_parameter(name).detach(), self._mesh.tensor.rank, self._mesh.tensor.size)
            assert part is not None
            self.gradients.put(name, part, write)

    def whole_state(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """What the optimizer of one process would have to save, on rank 0; elsewhere nothing. All ranks must call it."""
        state = optimizer.state_dict()
        if self._mesh.num_ranks == 1:
            return state
        self._mesh.at("collecting the optimizer's state")
        pieces, owners = self.gradients.pieces, optimizer.parameters
        held = ((self._held(key, owners[key], x), x) for key, x in state.items() if pieces[owners[key]].speaks)
        return layout.gather(held, self._cuts, self._mesh)

    def own_state(self, optimizer: Optimizer, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What this process needs of that. Names that nobody needs stay, for the optimizer to refuse."""
        if self._mesh.num_ranks == 1:
            return dict(whole)
        mine, owners, pieces, axis = optimizer.state_dict(), optimizer.parameters, self.gradients.pieces, self._mesh.tensor
        return {
            key: layout.share(whole[key], like, self._cuts[owners[key]], pieces[owners[key]].start, axis)
            for key, like in mine.items()
            if key in whole
        }

    def _held(self, name: str, parameter: str, x: Tensor) -> Held:
        return Held(name, parameter, self._mesh.tensor.rank, self.gradients.pieces[parameter].start, tuple(x.shape), x.dtype)


def _check_context(model: ModelConfig, parallel: ParallelConfig) -> None:
    if isinstance(parallel.context, Ulysses):
        check_heads(model.num_heads // parallel.tensor, model.num_kv_heads // parallel.tensor, parallel.context.size)


def _hull(model: Model) -> Model:
    """The model without its weights; parameters that are one stay one."""
    return copy.deepcopy(model, {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in model.parameters()})

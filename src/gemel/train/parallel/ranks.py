"""What this process has of a run's model, and what all have together: the trainer's view of the mesh.

The trainer works on what is here, with names and numbers as if it were alone. What concerns all goes through this: whose batches, whose
gradients, whose norms count, and which pieces of weights and states are this process's to save. On one process each of these is the plain
thing itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn

from gemel import ops
from gemel.config.model import ModelConfig
from gemel.config.parallel import ParallelConfig, Ring, Ulysses
from gemel.config.train import TrainRecipe
from gemel.model import build, shard
from gemel.model.attend import Attend, PackedAttend
from gemel.model.build import LoadedModel
from gemel.model.pieces import Pieces, Share
from gemel.model.stored import Stored
from gemel.train import optim, precision, recompute, stability
from gemel.train.batch import Batch
from gemel.train.offload import Homes
from gemel.train.optim import Optimizer
from gemel.train.parallel import data, layout, matrices, sharded, tensor, vocabulary
from gemel.train.parallel.collectives import enter, keep_own
from gemel.train.parallel.context import Layout, RingAttend, UlyssesAttend, check_heads
from gemel.train.parallel.data import Gradients
from gemel.train.parallel.layout import Piece
from gemel.train.parallel.mesh import Mesh
from gemel.train.parallel.pipeline import Pipeline
from gemel.train.parallel.sums import add_up


class Ranks:
    """Cuts a model in place, to what this process has of it. Of a model without memory only that gets some, for `load_weights` to fill.

    gradients     of what is here
    parameters    of the whole model that are trained, by name, without memory
    pipeline      of whose stages this process has some, if there is one
    counts        whether this process counts the tokens of its batches: one of those that see the same
    """

    def __init__(self, recipe: TrainRecipe, loaded: LoadedModel, mesh: Mesh, device: torch.device, homes: Homes):
        self._config, self._mesh, self._homes, model = recipe.parallel, mesh, homes, loaded.model
        self._model, self._cuts = model, shard.cuts(model)
        self.parameters = {name: torch.empty_like(p, device="meta") for name, p in model.named_parameters() if p.requires_grad}
        self._partial: frozenset[str] = frozenset()
        if mesh.tensor.size > 1:
            self._partial = tensor.cut(model, mesh.tensor, self._config.sequence)
        _check_context(model.config, self._config)
        self.pipeline = self._stages(recipe, device) if mesh.pipeline.size > 1 else None
        if self._config.zero != "parameters":  # which takes memory a block at a time
            build.allocate(model, device)
        named = {name: p for name, p in model.named_parameters() if name in self.parameters}
        if mesh.num_ranks > 1:
            precision.add_up_in_fp32(named.values())
        self.gradients = self._shared(recipe, named, device)
        self.counts = mesh.tensor.rank == mesh.context.rank == mesh.pipeline.rank == 0

    def _stages(self, recipe: TrainRecipe, device: torch.device) -> Pipeline:
        mesh = self._mesh
        parts = mesh.tensor.size if self._config.sequence else 1
        pipeline = Pipeline(self._model, self._config.pipeline, mesh.pipeline, recipe.batch.sequence, device, parts)
        for blocks in pipeline.blocks():
            recompute.apply(recipe.activations, blocks)
        return pipeline

    @property
    def num_micros(self) -> int:
        """Batches that had better go through together."""
        return 1 if self.pipeline is None else 2 * self._mesh.pipeline.size

    def _shared(self, recipe: TrainRecipe, named: dict[str, nn.Parameter], device: torch.device) -> Gradients:
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
            gradients = sharded.Sharded(self._model, named, mesh, speaks, recipe.activations, device)
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

    # --- checkpoints -----------------------------------------------------------------------------------------------------------------

    def weights(self) -> Share:
        """What this process saves of the model. Each element is one process's to save."""
        held = {name: piece for name, piece in self.gradients.weights().items() if piece.speaks}
        return Share({name: self._pieces(name, self._homes.at_home(piece.tensor.detach()), piece) for name, piece in held.items()})

    def load_weights(self, saved: Share) -> None:
        """Take what this process has of a model, a parameter at a time."""
        for name, piece in self.gradients.weights().items():
            self._homes.write(piece.tensor, self._read(saved[name], name, piece.tensor, piece))
        self.gradients.refresh(self._homes.write)

    def state(self, optimizer: Optimizer) -> Share:
        """What this process saves of the optimizer's state."""
        pieces, owners, axis = self.gradients.pieces, optimizer.parameters, self._mesh.tensor
        held = ((key, owners[key], x) for key, x in optimizer.state_dict().items())
        mine = ((key, name, x) for key, name, x in held if layout.saves(x, pieces[name], self._cuts[name], axis))
        return Share({key: self._pieces(name, x, pieces[name]) for key, name, x in mine})

    def load_state(self, optimizer: Optimizer, saved: Share) -> None:
        """Take what this process needs of that, a tensor at a time. Raises `CheckpointError` if it is of another model or optimizer."""
        pieces, owners = self.gradients.pieces, optimizer.parameters
        mine = {key: (owners[key], x, pieces[owners[key]]) for key, x in optimizer.state_dict().items() if key in saved}
        state = {
            key: Stored(self._fits(saved[key], *at), saved[key].dtype, partial(self._read, saved[key], *at)) for key, at in mine.items()
        }
        if self._mesh.num_ranks == 1:  # of several, each has names that others do not need
            state |= {key: Stored(x.shape, x.dtype, x.whole) for key, x in saved.items() if key not in mine}
        optimizer.load_state_dict(state)

    def pieces(self, tensors: Mapping[str, Tensor]) -> Share:
        """Of tensors like those that this process moves (their gradients, say), those for which it speaks."""
        spoken = {name: x for name, x in tensors.items() if self.gradients.pieces[name].speaks}
        return Share({name: self._pieces(name, x, self.gradients.pieces[name]) for name, x in spoken.items()})

    def _pieces(self, name: str, x: Tensor, piece: Piece) -> Pieces:
        return Pieces.of(x, *layout.place(x, piece, self._cuts[name], self._mesh.tensor))

    def _read(self, saved: Pieces, name: str, x: Tensor, piece: Piece) -> Tensor:
        return saved.read(layout.place(x, piece, self._cuts[name], self._mesh.tensor)[1]).view(x.shape)

    def _fits(self, saved: Pieces, name: str, x: Tensor, piece: Piece) -> tuple[int, ...]:
        """The shape of what `_read` would give, or what is there if that is of another whole."""
        return tuple(x.shape) if saved.shape == layout.place(x, piece, self._cuts[name], self._mesh.tensor)[0] else saved.shape


def _check_context(model: ModelConfig, parallel: ParallelConfig) -> None:
    if isinstance(parallel.context, Ulysses):
        check_heads(model.num_heads // parallel.tensor, model.num_kv_heads // parallel.tensor, parallel.context.size)

"""Pipeline parallel: each rank has some of the layers, and micro-batches go from rank to rank.

    pipeline = Pipeline(model, recipe.parallel.pipeline, mesh.pipeline, sequence, device)  # the model keeps what this rank has of it
    loss, z = pipeline.learn(batches_with_their_attends, loss_of)                     # gradients of all micro-batches

A stage is a run of layers, the first with the embedding, the last with the final norm and the head. Borders are where the slowest stage
is fastest. All ranks of a pipeline are given the same batches: the first needs their tokens, the last their targets, and all need positions
and document bounds, which is less than would have to be sent.

torch.distributed.pipelining is not used. It wants all micro-batches to be of one shape, and ours have as many tokens as their documents; it
splits arguments by itself where ours are a batch each, with its own bounds; and its zero-bubble schedules find gradients of weights by
walking the graph, which for operations with a backward pass of their own means to run that twice. Here a timetable (`timetable`) is read
line by line, and a matrix product defers the gradient of its weight by not computing it yet.

T tokens, D model width, E output width of a product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gemel.config import parallel as config
from gemel.config.errors import ConfigError
from gemel.model.attend import Attend
from gemel.model.leaves.linear import Leaf, Linear
from gemel.model.model import Model
from gemel.ops.train import linear
from gemel.train.batch import Batch
from gemel.train.parallel.mesh import Axis
from gemel.train.parallel.timetable import Pass, Timetable, Transfer, num_stages, timetable

Loss = Callable[[Tensor, Batch], tuple[Tensor, Tensor]]  # of hidden states: the loss, and the part of it that is not cross-entropy
Cast = Callable[[], AbstractContextManager[Any]]


# --- where the borders are ----------------------------------------------------------------------------------------------------------------


def balance(costs: Sequence[float], num_parts: int) -> list[tuple[int, int]]:
    """The cut into runs of at least one element whose largest sum is least; of equals the one whose later runs are shorter."""
    assert 1 <= num_parts <= len(costs)
    sums = list(accumulate(costs, initial=0.0))
    least = [(total, 0) for total in sums]  # of the elements before: the largest sum of the best cut so far, and where its last run begins
    rows = [least]
    for part in range(1, num_parts):
        least = [
            min(((max(rows[-1][first][0], sums[stop] - sums[first]), first) for first in range(part, stop)), default=(float("inf"), 0))
            for stop in range(len(sums))
        ]
        rows.append(least)
    stop, runs = len(costs), []
    for row in reversed(rows):
        runs.append((row[stop][1], stop))
        stop = row[stop][1]
    return runs[::-1]


def layer_costs(model: Model, sequence: int) -> list[float]:
    """Products per token of each layer, the head's with the last one's, for documents of `sequence` tokens."""
    costs = []
    for layer, block in enumerate(model.layers):
        window = model.config.window(layer)
        seen = sequence / 2 if window is None else min(window, sequence / 2)
        heads = model.get_submodule(f"layers.{layer}.attn.out")
        assert isinstance(heads, Leaf)
        costs.append(_weights(block) + 2 * heads.in_features * seen)  # a score and a value for every key and channel
    costs[-1] += _weights(model.head)
    return costs


def _weights(module: nn.Module) -> float:
    return float(sum(leaf.in_features * leaf.out_features for leaf in module.modules() if isinstance(leaf, Leaf)))


# --- a rank's part ------------------------------------------------------------------------------------------------------------------------


class Elsewhere(nn.Module):
    """The place of a module that another rank has."""


class Pipeline:
    """The stages of one rank, and what it does with them.

    spoken_for  names of parameters that are here and whose copy on an earlier rank speaks for both: of a tied head. Their gradients are
                sums over both, so both move alike
    """

    def __init__(self, model: Model, cfg: config.Pipeline, axis: Axis, sequence: int, device: torch.device, token_parts: int = 1):
        assert axis.group is not None and axis.size == cfg.stages
        count = num_stages(cfg)
        if count > len(model.layers):
            raise ConfigError(
                f"[parallel.pipeline] cuts into {count} stages ({cfg.stages} ranks with {count // cfg.stages} each), the model has "
                f"{len(model.layers)} layers; lower stages or chunks so that their product is at most that"
            )
        self._model, self._config, self._axis, self._group = model, cfg, axis, axis.group
        self._token_parts = token_parts
        self.rank, self.last = axis.rank, count - 1
        self.bounds = balance(layer_costs(model, sequence), count)
        self._stages = range(axis.rank, count, axis.size)
        self._dtype, self._width, self.device = model.embed.weight.dtype, model.config.width, device
        first, last = 0 in self._stages, self.last in self._stages
        self._tied = model.config.tied_head and first != last
        self.spoken_for = frozenset({"embed.weight"} if self._tied and last else ())
        self._keep_own(first, last)
        self._debts = _Debts()
        if isinstance(cfg, config.ZeroBubble):
            self._debts.take_from(model.layers)

    def _keep_own(self, first: bool, last: bool) -> None:
        model, gone = self._model, [] if last else ["norm", "head"]
        mine = {layer for stage in self._stages for layer in range(*self.bounds[stage])}
        if not first:
            gone += ["positions", "embed_norm"] if last and model.config.tied_head else ["positions", "embed_norm", "embed"]
        gone = [name for name in gone if getattr(model, name) is not None]
        gone += [f"layers.{layer}" for layer in range(len(model.layers)) if layer not in mine]
        for name in gone:
            model.set_submodule(name, Elsewhere())
        self._gone = tuple(f"{name}." for name in gone)

    def has(self, parameter: str) -> bool:
        """Whether a parameter of the whole model is one of this rank's stages."""
        return not parameter.startswith(self._gone)

    def blocks(self) -> Iterator[list[nn.Module]]:
        """The layers of each of this rank's stages."""
        for stage in self._stages:
            yield list(self._model.layers[slice(*self.bounds[stage])])

    def learn(self, work: Sequence[tuple[Batch, Attend]], loss_of: Loss, cast: Cast = nullcontext) -> tuple[Tensor, Tensor]:
        """Add the gradients of all micro-batches to the parameters of this rank.

        Returns the sums of what `loss_of` gives, in fp64; zeros on ranks without the last stage. `cast` is what forward passes run in.
        """
        run = _Run(self, work, loss_of, cast, learn=True)
        run.do(timetable(self._config, len(work)))
        if self._tied:
            self._sum_tied()
        return run.loss, run.z

    @torch.no_grad()
    def look(self, work: Sequence[tuple[Batch, Attend]], loss_of: Loss, cast: Cast = nullcontext) -> tuple[Tensor, Tensor]:
        """The same without gradients."""
        run = _Run(self, work, loss_of, cast, learn=False)
        run.do(timetable(self._config, len(work), learn=False))
        return run.loss, run.z

    def _sum_tied(self) -> None:
        """Embedding and head are one matrix on two ranks: each adds the other's gradient to its own."""
        weight = self._model.embed.weight
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight, dtype=weight.grad_dtype or weight.dtype)
        own = weight.grad
        other = torch.empty_like(own)
        peer = self.last % self._axis.size if self._axis.rank == 0 else 0
        ends = ((dist.isend, own), (dist.irecv, other))
        for work in dist.batch_isend_irecv([dist.P2POp(act, x, group=self._group, group_peer=peer) for act, x in ends]):
            work.wait()
        own += other

    def forward(self, stage: int, x_TD: Tensor | None, batch: Batch, attend: Attend) -> Tensor:
        """Through one stage; the first takes the tokens of the batch."""
        model = self._model
        if x_TD is None:
            x_TD = model.enter(batch.tokens_T, batch.positions_T)
        x_TD = model.through(model.layers[slice(*self.bounds[stage])], x_TD, batch.positions_T, attend)
        if stage == self.last:
            hidden_TD: Tensor = model.norm(x_TD)
            return hidden_TD
        return x_TD

    def owed(self) -> Callable[[], None]:
        """What backward passes have left to do since the last call."""
        return self._debts.collect()

    def buffer(self, batch: Batch) -> Tensor:
        """For the residual stream of a batch, or its gradient."""
        return torch.empty(batch.num_tokens // self._token_parts, self._width, dtype=self._dtype, device=self.device)

    def start(self, transfer: Transfer, tensor: Tensor) -> dist.Work:
        """Begin to send or to receive."""
        tag = 2 * transfer.made_by.micro * (self.last + 1) + 2 * transfer.stage + (transfer.made_by.kind == "forward")
        if transfer.sender == self._axis.rank:
            work = dist.isend(tensor, group=self._group, group_dst=transfer.receiver, tag=tag)
        else:
            work = dist.irecv(tensor, group=self._group, group_src=transfer.sender, tag=tag)
        assert work is not None
        return work

    def sends(self, transfer: Transfer) -> bool:
        """Whether this rank is where it comes from."""
        return transfer.sender == self._axis.rank


class _Run:
    """One walk through a timetable."""

    def __init__(self, pipeline: Pipeline, work: Sequence[tuple[Batch, Attend]], loss_of: Loss, cast: Cast, learn: bool):
        self._pipeline, self._work, self._loss_of, self._cast, self._learn = pipeline, work, loss_of, cast, learn
        self._coming: dict[Pass, tuple[dist.Work, Tensor]] = {}  # by the pass that needs it
        self._sent: list[tuple[dist.Work, Tensor]] = []
        self._inputs: dict[tuple[int, int], Tensor] = {}
        self._outputs: dict[tuple[int, int], Tensor] = {}
        self._results: dict[Pass, Tensor] = {}  # that are to be sent
        self._owed: dict[tuple[int, int], Callable[[], None]] = {}
        self.loss, self.z = (torch.zeros((), dtype=torch.float64, device=pipeline.device) for _ in range(2))

    def do(self, table: Timetable) -> None:
        """The lines of this rank; then wait until what was sent has left."""
        for line in table.programs[self._pipeline.rank]:
            match line:
                case Transfer():
                    self._transfer(line)
                case Pass(kind="forward"):
                    self._forward(line)
                case Pass(kind="backward"):
                    self._backward(line)
                case Pass():
                    self._owed.pop((line.stage, line.micro))()
        for work, _ in self._sent:
            work.wait()

    def _transfer(self, one: Transfer) -> None:
        if self._pipeline.sends(one):
            result = self._results.pop(one.made_by)
            self._sent.append((self._pipeline.start(one, result), result))
        else:
            buffer = self._pipeline.buffer(self._work[one.made_by.micro][0])
            self._coming[Pass(one.made_by.kind, one.stage, one.made_by.micro)] = (self._pipeline.start(one, buffer), buffer)

    def _arrived(self, needed_by: Pass) -> Tensor | None:
        if needed_by not in self._coming:
            return None
        work, buffer = self._coming.pop(needed_by)
        work.wait()
        return buffer

    def _forward(self, one: Pass) -> None:
        (batch, attend), key = self._work[one.micro], (one.stage, one.micro)
        x_TD = self._arrived(one)
        if x_TD is not None and self._learn:
            self._inputs[key] = x_TD.requires_grad_()
        with self._cast():
            out = self._pipeline.forward(one.stage, x_TD, batch, attend)
            if one.stage == self._pipeline.last:
                out, z = self._loss_of(out, batch)
                self.loss += out.detach()
                self.z += z
            else:
                self._results[one] = out.detach().contiguous()
        if self._learn:
            self._outputs[key] = out

    def _backward(self, one: Pass) -> None:
        key = (one.stage, one.micro)
        out, grad = self._outputs.pop(key), self._arrived(one)
        if out.requires_grad:
            torch.autograd.backward(out, grad)
        self._owed[key] = self._pipeline.owed()
        if one.stage > 0:
            grad_TD = self._inputs.pop(key).grad
            assert grad_TD is not None
            self._results[one] = grad_TD.contiguous()


# --- gradients of weights, later ----------------------------------------------------------------------------------------------------------


class _Debts:
    """Products whose gradient of the weight was not computed yet."""

    def __init__(self) -> None:
        self._waiting: list[Callable[[], None]] = []

    def take_from(self, layers: nn.Module) -> None:
        """Let all plain products of these layers defer. Others compute all gradients at once, which is as right."""
        for module in layers.modules():
            if type(module) is Linear and module.weight.requires_grad:
                module.forward = partial(_deferring, module.forward, module, self._waiting)  # type: ignore[method-assign]

    def collect(self) -> Callable[[], None]:
        """What waits now, as one thing to do."""
        waiting, self._waiting[:] = list(self._waiting), []

        def pay() -> None:
            for one in waiting:
                one()

        return pay


def _deferring(forward: Callable[[Tensor], Tensor], leaf: Linear, waiting: list[Callable[[], None]], x_TD: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(x_TD)
    kind = x_TD.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_TD.dtype
    # The weight goes in as data, or autograd would want its gradient at once; what is cast is cast here, where autograd sees it.
    y_TE: Tensor = _Deferred.apply(x_TD.to(dtype), leaf.weight.detach().to(dtype), leaf, waiting)  # type: ignore[no-untyped-call]
    return y_TE if leaf.bias is None else y_TE + leaf.bias.to(dtype)


class _Deferred(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor, leaf: Linear, waiting: list[Callable[[], None]]) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        ctx.leaf, ctx.waiting = leaf, waiting
        return linear(x_TD, weight_ED)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y_TE: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_ED = ctx.saved_tensors
        ctx.waiting.append(partial(_add_gradient, ctx.leaf.weight, d_y_TE, x_TD))
        return linear(d_y_TE, weight_ED.t()), None, None, None


@torch.no_grad()
def _add_gradient(weight: nn.Parameter, d_y_TE: Tensor, x_TD: Tensor) -> None:
    grad_ED = linear(d_y_TE.t(), x_TD.t())
    if weight.grad is None:
        weight.grad = grad_ED.to(weight.grad_dtype or weight.dtype)
    else:
        weight.grad += grad_ED

"""Context parallel: the tokens of one run are cut over ranks, each of which holds the whole model.

Everything in the model but attention treats tokens alone, so all of it is an `Attend` whose keys and values lie on other ranks. Two ways:

Ring (Liu et al. 2023, arXiv 2310.01889): queries stay, keys and values go from rank to rank until everybody has seen everybody's. Each
encounter gives a part of the softmax and the logarithm of its sum, with which parts are put together exactly; the backward pass goes round
once more, and the gradients of keys and values travel with them until they are home. The run is cut into two pieces per rank, of which a
rank holds one from the front and one from the back ("zigzag"): later tokens see more, and so each rank has about as much to do.

Ulysses (Jacobs et al. 2023, arXiv 2309.14509): ranks exchange tokens for heads, attend to all tokens with some of the heads, and exchange
back. Two exchanges instead of a round of messages, but no more ranks than there are heads.

Documents keep apart as they do on one rank, and where ranks' tokens meet means nothing to them. Of two different pieces at most one
document lies in both, so an encounter is nothing or one rectangle of scores.

T tokens of this rank, S queries and C keys of an encounter, N query heads, K key/value heads, M = S N / K queries that share a key head,
H head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, pairwise
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemel import ops
from gemel.config.errors import ConfigError
from gemel.config.model import Alibi, ModelConfig
from gemel.ops.cpu.autograd import fit
from gemel.ops.train import packed_attention
from gemel.train.batch import Batch

SCORE_BYTES = 2**23  # of an encounter's scores that are held at a time


@dataclass(frozen=True, slots=True)
class Layout:
    """Which tokens of a run each rank holds.

    starts  document bounds of the whole run; the last entry is its number of tokens
    spans   of each rank: the ranges of the run that it holds, in the order in which they lie there
    """

    starts: tuple[int, ...]
    spans: tuple[tuple[tuple[int, int], ...], ...]

    @classmethod
    def zigzag(cls, starts: Sequence[int], num_ranks: int) -> Self:
        """Of 2 R pieces, rank r holds r and 2 R - 1 - r."""
        pieces = _cut(starts[-1], 2 * num_ranks)
        return cls(tuple(starts), tuple((pieces[rank], pieces[-1 - rank]) for rank in range(num_ranks)))

    @classmethod
    def even(cls, starts: Sequence[int], num_ranks: int) -> Self:
        """One piece for each rank."""
        return cls(tuple(starts), tuple((piece,) for piece in _cut(starts[-1], num_ranks)))

    def num_tokens(self, rank: int) -> int:
        """That a rank holds."""
        return sum(stop - start for start, stop in self.spans[rank])

    def places(self, rank: int) -> Tensor:
        """Of a rank's tokens in the run, int64 [T]."""
        return torch.cat([torch.arange(start, stop) for start, stop in self.spans[rank]])

    def part(self, batch: Batch, rank: int) -> Batch:
        """A rank's tokens of a batch. Its document bounds are those of what is here: parts of documents, perhaps."""
        places_T = self.places(rank).to(batch.tokens_T.device)
        lengths = [b - a for start, stop in self.spans[rank] for a, b in _within(self.starts, start, stop)]
        taken = {name: getattr(batch, name)[places_T] for name in ("tokens_T", "positions_T", "targets_T", "weights_T")}
        streams = {name: stream[places_T] for name, stream in batch.streams.items()}
        return replace(batch, **taken, streams=streams, starts=tuple(accumulate(lengths, initial=0)))


def _cut(length: int, num_pieces: int) -> list[tuple[int, int]]:
    """Pieces whose lengths differ by at most one."""
    return list(pairwise(length * i // num_pieces for i in range(num_pieces + 1)))


def _within(starts: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The documents of a range, cut where it ends."""
    for a, b in pairwise(starts):
        if max(a, start) < min(b, stop):
            yield max(a, start), min(b, stop)


# --- ring ---------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Own:
    """A piece with itself: documents packed end to end. Rows are those of this rank."""

    rows: slice
    starts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Meeting:
    """Queries of this rank and keys of some rank, all of one document. `distance` is from the first key to the first query."""

    queries: slice
    keys: slice
    distance: int


def encounters(layout: Layout, rank: int, source: int, window: int | None) -> list[Own | Meeting]:
    """What of `source`'s keys the queries of `rank` can see. Pieces with themselves come first, so that every query has a key at once."""
    own: list[Own | Meeting] = []
    others: list[Own | Meeting] = []
    for query_offset, queries in _offsets(layout.spans[rank]):
        for key_offset, keys in _offsets(layout.spans[source]):
            if queries == keys:
                bounds = [a for a, _ in _within(layout.starts, *queries)]
                own.append(
                    Own(
                        slice(query_offset, query_offset + queries[1] - queries[0]),
                        (*(a - queries[0] for a in bounds), queries[1] - queries[0]),
                    )
                )
            elif keys < queries and (shared := _shared(layout.starts, queries, keys, window)):
                (q_start, q_stop), (k_start, k_stop) = shared
                others.append(
                    Meeting(
                        slice(query_offset + q_start - queries[0], query_offset + q_stop - queries[0]),
                        slice(key_offset + k_start - keys[0], key_offset + k_stop - keys[0]),
                        q_start - k_start,
                    )
                )
    return own + others


def _offsets(spans: Sequence[tuple[int, int]]) -> Iterator[tuple[int, tuple[int, int]]]:
    """The spans that are not empty, each behind the row at which it begins."""
    offset = 0
    for start, stop in spans:
        if start < stop:
            yield offset, (start, stop)
        offset += stop - start


def _shared(
    starts: Sequence[int], queries: tuple[int, int], keys: tuple[int, int], window: int | None
) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """The queries and the keys of the one document that may lie in both pieces; what no window reaches is left out."""
    first, last = next((a, b) for a, b in pairwise(starts) if a <= queries[0] < b)
    k_start, k_stop, q_stop = max(keys[0], first), keys[1], min(queries[1], last)
    if window is not None:
        k_start, q_stop = max(k_start, queries[0] - window + 1), min(q_stop, keys[1] - 1 + window)
    return ((queries[0], q_stop), (k_start, k_stop)) if k_start < k_stop and queries[0] < q_stop else None


class RingAttend:
    """Attention to keys and values that go round a process group. `layout` is `Layout.zigzag`, `group` has one rank per part of it.

    All ranks must call it for the same layers in the same order, forward and backward, as they do if they run the same model.
    """

    def __init__(self, config: ModelConfig, layout: Layout, group: dist.ProcessGroup, slopes_N: Tensor | None = None):
        self._windows = [config.window(layer) for layer in range(config.num_layers)]
        self._slopes_N = _slopes(config) if slopes_N is None else slopes_N
        self._layout, self._group = layout, group
        self._rank = dist.get_rank(group)
        self._seen = cache(lambda source, window: encounters(layout, self._rank, source, window))

    def __call__(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        """Outputs [T, N, H] of this rank's tokens."""
        window = self._windows[layer]
        out_TNH: Tensor = _Ring.apply(q_TNH, k_TKH, v_TKH, self, window)  # type: ignore[no-untyped-call]
        return out_TNH

    def seen(self, source: int, window: int | None, device: torch.device) -> list[_Part]:
        """What this rank computes with the keys of `source`."""
        slopes_N = None if self._slopes_N is None else self._slopes_N.to(device)
        return [_Part(one, window, slopes_N) for one in self._seen(source, window)]

    def round(self) -> Iterator[int]:
        """Whose keys and values are here, one after the other; this rank's own come first."""
        size = len(self._layout.spans)
        return ((self._rank - hop) % size for hop in range(size))

    def pass_on(self, tensor: Tensor, source: int) -> Callable[[], Tensor]:
        """Give what is `source`'s to the next rank, and return what waits for the previous rank's.

        Tensors are [..., T of their source, K, H].
        """
        size = len(self._layout.spans)
        num_tokens = self._layout.num_tokens((source - 1) % size)
        coming = tensor.new_empty(*tensor.shape[:-3], num_tokens, *tensor.shape[-2:])
        transfers = []
        if tensor.numel():
            transfers.append(dist.P2POp(dist.isend, tensor, group=self._group, group_peer=(self._rank + 1) % size))
        if coming.numel():
            transfers.append(dist.P2POp(dist.irecv, coming, group=self._group, group_peer=(self._rank - 1) % size))
        works = dist.batch_isend_irecv(transfers) if transfers else []

        def wait() -> Tensor:
            for work in works:
                work.wait()
            return coming

        return wait


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, ring: RingAttend, window: int | None) -> Tensor:
        q_TNH = q_TNH.contiguous()
        kv_2TKH = torch.stack((k_TKH, v_TKH))
        mine_2TKH = kv_2TKH
        out_TNH = torch.zeros(q_TNH.shape, dtype=torch.float32, device=q_TNH.device)
        lse_TN = out_TNH.new_full(q_TNH.shape[:2], -math.inf)
        sources = list(ring.round())
        for source in sources:
            coming = ring.pass_on(kv_2TKH, source) if source != sources[-1] else None
            for part in ring.seen(source, window, q_TNH.device):
                part.forward(q_TNH, kv_2TKH[0], kv_2TKH[1], out_TNH, lse_TN)
            kv_2TKH = kv_2TKH if coming is None else coming()
        out_TNH = out_TNH.to(q_TNH.dtype)
        ctx.save_for_backward(q_TNH, mine_2TKH, out_TNH, lse_TN)
        ctx.ring, ctx.window = ring, window
        return out_TNH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_TNH: Tensor) -> tuple[Tensor | None, ...]:
        ring, window = ctx.ring, ctx.window
        q_TNH, kv_2TKH, out_TNH, lse_TN = ctx.saved_tensors
        d_out_TNH = d_out_TNH.contiguous()
        grads = _Gradients(torch.zeros_like(q_TNH, dtype=torch.float32), (d_out_TNH.float() * out_TNH).sum(-1))
        homeward: Callable[[], Tensor] | None = None
        sources = list(ring.round())
        for source in sources:
            coming = ring.pass_on(kv_2TKH, source) if source != sources[-1] else None
            d_kv_2TKH = torch.zeros_like(kv_2TKH, dtype=torch.float32)
            for part in ring.seen(source, window, q_TNH.device):
                part.backward(q_TNH, kv_2TKH[0], kv_2TKH[1], out_TNH, lse_TN, d_out_TNH, grads, d_kv_2TKH[0], d_kv_2TKH[1])
            if homeward is not None:
                d_kv_2TKH += homeward()
            homeward = ring.pass_on(d_kv_2TKH, source)
            kv_2TKH = kv_2TKH if coming is None else coming()
        assert homeward is not None
        d_k_TKH, d_v_TKH = homeward().to(q_TNH.dtype)
        return grads.q_TNH.to(q_TNH.dtype), d_k_TKH, d_v_TKH, None, None


@dataclass(frozen=True, slots=True)
class _Gradients:
    """`q_TNH` is added to; `delta_TN` is what every score of a query has in common, the product of its output and that one's gradient."""

    q_TNH: Tensor
    delta_TN: Tensor


@dataclass(frozen=True, slots=True)
class _Part:
    """One encounter's share of the softmax and of its gradients."""

    place: Own | Meeting
    window: int | None
    slopes_N: Tensor | None

    def forward(self, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, out_TNH: Tensor, lse_TN: Tensor) -> None:
        """Merge into `out_TNH` and `lse_TN`, the results from the keys that were seen before (both fp32)."""
        if isinstance(self.place, Own) and (kernels := fit(q_TNH, k_TKH, v_TKH)):
            rows = self.place.rows
            out_SNH, lse2_NS = kernels.packed_attention(q_TNH[rows], k_TKH[rows], v_TKH[rows], *self._packed(self.place))
            _merge(out_TNH[rows], lse_TN[rows], out_SNH, lse2_NS.t() * math.log(2))
            return
        num_kv_heads = k_TKH.shape[1]
        for queries, keys, distance in self._rectangles(q_TNH.shape[1]):
            num_queries = queries.stop - queries.start
            scores_KMC = self._scores(_grouped(q_TNH[queries], num_kv_heads), k_TKH[keys], num_queries, distance)
            lse_KM = scores_KMC.logsumexp(-1)
            weights_KMC = scores_KMC.sub_(lse_KM.clamp_min(torch.finfo().min)[..., None]).exp_()  # whose window ends before, sees nothing
            out_KMH = weights_KMC @ v_TKH[keys].float().transpose(0, 1)
            _merge(out_TNH[queries], lse_TN[queries], _ungrouped(out_KMH, num_queries), lse_KM.view(-1, num_queries).t())

    def backward(
        self,
        q_TNH: Tensor,
        k_TKH: Tensor,
        v_TKH: Tensor,
        out_TNH: Tensor,
        lse_TN: Tensor,
        d_out_TNH: Tensor,
        grads: _Gradients,
        d_k_TKH: Tensor,
        d_v_TKH: Tensor,
    ) -> None:
        """Add to the gradients; outputs and logarithms are those of all keys."""
        if isinstance(self.place, Own) and (kernels := fit(q_TNH, k_TKH, v_TKH, d_out_TNH)):
            rows = self.place.rows
            lse2_NS = (lse_TN[rows].t() / math.log(2)).contiguous()
            inputs = (q_TNH[rows], k_TKH[rows], v_TKH[rows], *self._packed(self.place), out_TNH[rows], lse2_NS, d_out_TNH[rows])
            for total, share in zip((grads.q_TNH, d_k_TKH, d_v_TKH), kernels.packed_attention_backward(*inputs), strict=True):
                total[rows] += share
            return
        num_kv_heads, scale = k_TKH.shape[1], q_TNH.shape[2] ** -0.5
        for queries, keys, distance in self._rectangles(q_TNH.shape[1]):
            num_queries = queries.stop - queries.start
            q_KMH, d_out_KMH = (_grouped(x[queries], num_kv_heads) for x in (q_TNH, d_out_TNH))
            k_KCH, v_KCH = (x[keys].float().transpose(0, 1) for x in (k_TKH, v_TKH))
            lse_KM1, delta_KM1 = (x[queries].t().reshape(num_kv_heads, -1, 1) for x in (lse_TN, grads.delta_TN))
            weights_KMC = self._scores(q_KMH, k_TKH[keys], num_queries, distance).sub_(lse_KM1).exp_()
            d_v_TKH[keys] += (weights_KMC.mT @ d_out_KMH).transpose(0, 1)
            slopes_KMC = (d_out_KMH @ v_KCH.mT).sub_(delta_KM1).mul_(weights_KMC).mul_(scale)
            grads.q_TNH[queries] += _ungrouped(slopes_KMC @ k_KCH, num_queries)
            d_k_TKH[keys] += (slopes_KMC.mT @ q_KMH).transpose(0, 1)

    def _scores(self, q_KMH: Tensor, k_CKH: Tensor, num_queries: int, distance: int) -> Tensor:
        """[K, M, C] in fp32; -inf where a query does not see a key."""
        scores_KMC: Tensor = (q_KMH * q_KMH.shape[2] ** -0.5) @ k_CKH.float().permute(1, 2, 0)
        num_keys = len(k_CKH)
        ahead = distance < num_keys - 1
        behind = self.window is not None and distance + num_queries > self.window
        if self.slopes_N is None and not ahead and not behind:
            return scores_KMC
        queries_S, keys_C = (torch.arange(n, device=q_KMH.device) for n in (num_queries, num_keys))
        distance_SC = queries_S[:, None] + distance - keys_C
        scores_NSC = scores_KMC.view(-1, num_queries, num_keys)  # the same memory
        if self.slopes_N is not None:
            scores_NSC -= self.slopes_N[:, None, None] * distance_SC
        hidden_SC = distance_SC < 0
        if self.window is not None:
            hidden_SC |= distance_SC >= self.window
        scores_NSC.masked_fill_(hidden_SC, -math.inf)
        return scores_KMC

    def _packed(self, place: Own) -> tuple[Tensor, int, Tensor | None]:
        return torch.tensor(place.starts, dtype=torch.int32), self.window or 0, self.slopes_N

    def _rectangles(self, num_heads: int) -> Iterator[tuple[slice, slice, int]]:
        """Queries, keys, and the distance from the first of these to the first of those; never too many scores at once."""
        if isinstance(self.place, Own):
            first = self.place.rows.start
            whole = [(slice(first + a, first + b), slice(first + a, first + b), 0) for a, b in pairwise(self.place.starts)]
        else:
            whole = [(self.place.queries, self.place.keys, self.place.distance)]
        for queries, keys, distance in whole:
            size = max(SCORE_BYTES // (4 * num_heads * (keys.stop - keys.start)), 1)
            for start in range(queries.start, queries.stop, size):
                yield slice(start, min(start + size, queries.stop)), keys, distance + start - queries.start


def _grouped(x_SNH: Tensor, num_kv_heads: int) -> Tensor:
    """[K, M, H] in fp32: the queries of all heads of a group, one head after the other."""
    return x_SNH.float().transpose(0, 1).reshape(num_kv_heads, -1, x_SNH.shape[2])


def _ungrouped(x_KMH: Tensor, num_queries: int) -> Tensor:
    """[S, N, H]."""
    return x_KMH.reshape(-1, num_queries, x_KMH.shape[2]).transpose(0, 1)


def _merge(out_SNH: Tensor, lse_SN: Tensor, other_SNH: Tensor, other_lse_SN: Tensor) -> None:
    """Put two parts of a softmax together, into the first: each counts as much as its sum is of both sums."""
    both_SN = torch.logaddexp(lse_SN, other_lse_SN)
    out_SNH.mul_((lse_SN - both_SN).exp_()[..., None]).add_(other_SNH * (other_lse_SN - both_SN).exp_()[..., None])
    lse_SN.copy_(both_SN)


# --- ulysses ------------------------------------------------------------------------------------------------------------------------------


def check_heads(num_heads: int, num_kv_heads: int, num_ranks: int) -> None:
    """Raises ConfigError unless query heads divide over the ranks, and with key heads repeated as often as needed, whole groups do."""
    if num_heads % num_ranks or num_heads % (num_kv_heads * _repeats(num_kv_heads, num_ranks)):
        fits = [n for n in range(1, num_ranks) if num_heads % n == 0 and num_heads % (num_kv_heads * _repeats(num_kv_heads, n)) == 0]
        raise ConfigError(
            f"parallel.context = {num_ranks} ranks that exchange tokens for heads do not divide {num_heads} query and {num_kv_heads} key "
            f"heads; sizes that do: {', '.join(map(str, fits))}; the ring takes any"
        )


def _repeats(num_kv_heads: int, num_ranks: int) -> int:
    """How often each key head must be there so that they divide over the ranks."""
    return num_ranks // math.gcd(num_kv_heads, num_ranks)


class UlyssesAttend:
    """Attention to all tokens with some heads, between two exchanges in a process group. `layout` is `Layout.even`.

    Key heads that are fewer than the ranks are sent to several. Errors: ConfigError if heads do not divide.
    """

    def __init__(self, config: ModelConfig, layout: Layout, group: dist.ProcessGroup, slopes_N: Tensor | None = None):
        self._windows = [config.window(layer) for layer in range(config.num_layers)]
        self._slopes_N = _slopes(config) if slopes_N is None else slopes_N
        self._layout, self._group = layout, group
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)
        self._num_tokens = [layout.num_tokens(rank) for rank in range(self._size)]

    def __call__(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        """Outputs [T, N, H] of this rank's tokens."""
        num_heads, num_kv_heads, size = q_TNH.shape[1], k_TKH.shape[1], self._size
        check_heads(num_heads, num_kv_heads, size)
        repeats = _repeats(num_kv_heads, size)
        if repeats > 1:
            k_TKH, v_TKH = k_TKH.repeat_interleave(repeats, 1), v_TKH.repeat_interleave(repeats, 1)
        width = q_TNH.shape[2]
        parts = torch.cat(
            [x.reshape(len(x), size, x.shape[1] // size, width) for x in (q_TNH, k_TKH, v_TKH)], 2
        )  # heads of a rank together
        mine = [self._num_tokens[self._rank]] * size
        qkv = self._exchange(parts.transpose(0, 1).flatten(0, 1), mine, self._num_tokens)
        heads = [num_heads // size, num_kv_heads * repeats // size, num_kv_heads * repeats // size]
        slopes_N = None if self._slopes_N is None else self._slopes_N.chunk(size)[self._rank].to(q_TNH.device)
        q, k, v = torch.split(qkv, heads, 1)
        out = packed_attention(q, k, v, self._layout.starts, self._windows[layer], slopes_N)
        back = self._exchange(out, self._num_tokens, mine)
        return back.reshape(size, len(q_TNH), num_heads // size, width).transpose(0, 1).flatten(1, 2)

    def _exchange(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """`send[r]` rows go to rank r, `receive[r]` come from it."""
        received: Tensor = _Exchange.apply(rows, send, receive, self._group)  # type: ignore[no-untyped-call]
        return received


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        received = rows.new_empty(sum(receive), *rows.shape[1:])
        dist.all_to_all_single(received, rows.contiguous(), receive, send, group=group)
        return received

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_received: Tensor) -> tuple[Tensor | None, ...]:
        d_rows = d_received.new_empty(sum(ctx.send), *d_received.shape[1:])
        dist.all_to_all_single(d_rows, d_received.contiguous(), ctx.send, ctx.receive, group=ctx.group)
        return d_rows, None, None, None


def _slopes(config: ModelConfig) -> Tensor | None:
    return ops.alibi_slopes(config.num_heads) if isinstance(config.positions, Alibi) else None

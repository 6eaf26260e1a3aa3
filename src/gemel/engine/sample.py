"""Choosing the next token of every sequence in the step, vectorized over the batch.

All rows go through the same few tensor operations; Python touches no vocabulary. Randomness is a function of (seed,
output index, position) and of nothing else: one uniform number per token, turned into a token by inverting the
cumulative distribution. So the same seed gives the same text whatever else is in the batch, and a preempted sequence
needs no generator state to go on.

Order of operations, as in the reference implementations: bias, penalties and bans, then temperature, top-k, top-p,
min-p. Log-probabilities are those of the model itself, before any of these. A whole distribution is inverted in the
order of its tokens; what top-k, top-p and min-p leave of one, likeliest first.

Where a native program has made the logits, it also draws from them (`gemel.ops.cpu.sampler`), by the same rules and with
the same numbers. Its weights differ in their last bit, so that it draws the same token as the tensors here unless the
random number is within rounding of where one token ends and the next begins, or equal logits lie at the edge of what is
kept: there it takes the smaller token, and `topk` any.

Shapes: S rows (sequences that sample in this step), V vocabulary, C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from math import isfinite
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gemel.config.sampling import SamplingParams
from gemel.engine.draw import Draws
from gemel.engine.logits import Logits
from gemel.engine.request import Sequence, TokenLogprob
from gemel.ops.cpu.sampler import Sampler

Words = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float64]

CANDIDATES = 256  # tried first for nucleus and min-p; rows that need more are sorted whole
CHUNK = 256  # vocabulary entries summed together when a whole distribution is inverted


@dataclass(eq=False, slots=True)
class Row:
    """How one sequence draws: the seed of its request, and the tokens that would end it. Made once per sequence.

    `plain`: the likeliest token as the model has it is taken, and nothing is said about the others.
    """

    sequence: Sequence
    seed: int
    end_tokens: tuple[int, ...]
    plain: bool = field(init=False)
    _draws: Draws | None = None

    def __post_init__(self) -> None:
        params = self.params
        penalized = params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty
        self.plain = params.temperature == 0.0 and params.logprobs is None and not params.logit_bias and not penalized

    @property
    def params(self) -> SamplingParams:
        """The request's sampling parameters."""
        return self.sequence.request.params

    @property
    def may_end(self) -> bool:
        """False while end tokens are banned."""
        return self.sequence.num_output >= self.params.min_tokens

    @property
    def draws(self) -> Draws:
        """What a native sampler is asked."""
        if self._draws is None:
            self._draws = Draws(self.sequence, self.seed, self.end_tokens)
        return self._draws


class Drawn(NamedTuple):
    """The token of one row, or None when the row's logits were not finite."""

    token: int | None
    logprob: TokenLogprob | None = None


_NOTHING = Drawn(None)


def sample(logits: Logits, rows: Seq[Row], at: Seq[int]) -> list[Drawn]:
    """Draw one token per row, from the logits in row `at` of the step's; several rows may draw from the same ones.

    A row of which the largest logit is not finite draws None; the others are not affected. `logits` are not changed.
    """
    tokens, largest = logits.argmax_S, logits.largest_S
    drawn = [Drawn(tokens[i]) if isfinite(largest[i]) else _NOTHING for i in at]
    rest = [i for i, row in enumerate(rows) if not (row.plain and row.may_end) and drawn[i] is not _NOTHING]
    if rest:
        rest_rows, rest_at = [rows[i] for i in rest], [at[i] for i in rest]
        if logits.sampler is not None:
            rest_drawn = _draw_natively(logits.sampler, logits, rest_rows, rest_at)
        else:
            rest_drawn = _draw(logits.values_SV[rest_at], rest_rows)  # of a copy, to be written to
        for i, one in zip(rest, rest_drawn, strict=True):
            drawn[i] = one
    return drawn


def _draw_natively(sampler: Sampler, logits: Logits, rows: Seq[Row], at: Seq[int]) -> list[Drawn]:
    """Draw from finite rows by all rules, in one native call."""
    asked = [row.draws.next(i, logits.argmax_S[i], logits.largest_S[i]) for row, i in zip(rows, at, strict=True)]
    numbers = [row.params.logprobs for row in rows]
    drawn_R, likeliest_RN = sampler.run(logits.values_SV.numpy(), asked, max(number or 0 for number in numbers))
    out = []
    for (token, logprob), number, likeliest in zip(drawn_R.tolist(), numbers, likeliest_RN, strict=True):
        if token < 0:
            out.append(_NOTHING)
        elif number is None:
            out.append(Drawn(token))
        else:
            out.append(Drawn(token, TokenLogprob(token, logprob, tuple(likeliest[:number].tolist()))))
    return out


def _draw(logits_RV: Tensor, rows: Seq[Row]) -> list[Drawn]:
    """Draw from finite rows by all rules. Overwrites `logits_RV`."""
    reported = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    model_logprobs = torch.log_softmax(logits_RV[reported], -1) if reported else None
    adjust(logits_RV, rows)
    tokens = _choose(logits_RV, rows)
    logprobs: dict[int, TokenLogprob] = {}
    if model_logprobs is not None:
        logprobs = dict(zip(reported, _report(model_logprobs, [rows[i] for i in reported], [tokens[i] for i in reported]), strict=True))
    return [Drawn(token, logprobs.get(i)) for i, token in enumerate(tokens)]


def uniform(seeds: Seq[int], streams: Seq[int], counters: Seq[int]) -> Floats:
    """Uniform float64 in [0, 1), a pure function of (seed, stream, counter): three rounds of SplitMix64 (Steele et al. 2014)."""
    mask = 2**64 - 1
    state = np.array([seed & mask for seed in seeds], dtype=np.uint64)
    for word in (streams, counters):
        state = _splitmix(state ^ _splitmix(np.array(word, dtype=np.uint64)))
    return np.ldexp((state >> np.uint64(11)).astype(np.float64), -53)


def _splitmix(x: Words) -> Words:
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


# --- bias, penalties, bans ------------------------------------------------------------------------------------------------------------


def adjust(logits_SV: Tensor, rows: Seq[Row]) -> None:
    """Apply bias, penalties and the ban on early ends to the logits, in place."""
    _add_bias(logits_SV, rows)
    _penalize(logits_SV, rows)
    banned = [(i, token) for i, row in enumerate(rows) if not row.may_end for token in row.end_tokens]
    if banned:
        index = torch.tensor(banned, device=logits_SV.device).T
        logits_SV[index[0], index[1]] = -torch.inf


def _add_bias(logits_SV: Tensor, rows: Seq[Row]) -> None:
    biases = [(i, token, bias) for i, row in enumerate(rows) for token, bias in row.params.logit_bias.items()]
    if biases:
        where = torch.tensor([(i, token) for i, token, _ in biases], device=logits_SV.device).T
        logits_SV.index_put_((where[0], where[1]), torch.tensor([bias for *_, bias in biases], device=logits_SV.device), accumulate=True)


def _penalize(logits_SV: Tensor, rows: Seq[Row]) -> None:
    chosen = [i for i, row in enumerate(rows) if row.params.repetition_penalty != 1.0]
    if chosen:
        seen_RV = _occurrences([rows[i].sequence.tokens for i in chosen], logits_SV) > 0
        part = logits_SV[chosen]
        penalty_R1 = _column([rows[i].params.repetition_penalty for i in chosen], logits_SV)
        logits_SV[chosen] = torch.where(seen_RV, torch.where(part > 0, part / penalty_R1, part * penalty_R1), part)
    chosen = [i for i, row in enumerate(rows) if row.params.presence_penalty or row.params.frequency_penalty]
    if chosen:
        count_RV = _occurrences([rows[i].sequence.output for i in chosen], logits_SV)
        presence_R1 = _column([rows[i].params.presence_penalty for i in chosen], logits_SV)
        frequency_R1 = _column([rows[i].params.frequency_penalty for i in chosen], logits_SV)
        logits_SV[chosen] -= presence_R1 * (count_RV > 0) + frequency_R1 * count_RV


def _occurrences(tokens: Seq[Seq[int]], like_SV: Tensor) -> Tensor:
    """How often each token occurs, [rows, V] in the type of `like_SV`."""
    count_RV = torch.zeros(len(tokens), like_SV.shape[1], dtype=like_SV.dtype, device=like_SV.device)
    row = np.repeat(np.arange(len(tokens)), [len(t) for t in tokens])
    flat = np.concatenate([np.asarray(t, dtype=np.int64) for t in tokens])
    where = (torch.from_numpy(row).to(like_SV.device), torch.from_numpy(flat).to(like_SV.device))
    return count_RV.index_put_(where, torch.ones((), dtype=like_SV.dtype, device=like_SV.device), accumulate=True)


def _column(values: Seq[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


# --- choosing -------------------------------------------------------------------------------------------------------------------------


def _choose(logits_SV: Tensor, rows: Seq[Row]) -> list[int]:
    """A token per row."""
    tokens = [0] * len(rows)
    kinds: dict[str, list[int]] = {"greedy": [], "filtered": [], "full": []}
    for i, row in enumerate(rows):
        kinds[_kind(row.params)].append(i)
    if kinds["greedy"]:
        greedy = logits_SV.argmax(-1) if len(kinds["greedy"]) == len(rows) else logits_SV[kinds["greedy"]].argmax(-1)
        _assign(tokens, kinds["greedy"], greedy)
    for kind, draw in (("filtered", _draw_filtered), ("full", _draw_full)):
        if index := kinds[kind]:
            params = [rows[i].params for i in index]
            numbers = uniform(
                [rows[i].seed for i in index], [rows[i].sequence.index for i in index], [rows[i].sequence.num_output for i in index]
            )
            part = logits_SV[index]
            # From the largest on, so that no temperature is too low for the type.
            temperature_R1 = _column([p.temperature for p in params], logits_SV).clamp_min(torch.finfo(logits_SV.dtype).tiny)
            scaled = (part - part.amax(-1, keepdim=True)) / temperature_R1
            _assign(tokens, index, draw(scaled, params, torch.from_numpy(numbers).to(logits_SV.device)))
    return tokens


def _kind(params: SamplingParams) -> str:
    if params.greedy:
        return "greedy"
    return "filtered" if params.top_k or params.top_p < 1.0 or params.min_p > 0.0 else "full"


def _assign(tokens: list[int], index: Seq[int], values: Tensor) -> None:
    for i, token in zip(index, values.tolist(), strict=True):
        tokens[i] = token


def _draw_full(scaled_RV: Tensor, _params: Seq[SamplingParams], u_R: Tensor) -> Tensor:
    """Invert the whole distribution in two levels: which chunk of the vocabulary, then which entry of it."""
    weight_RV = scaled_RV.exp()
    pad = -weight_RV.shape[1] % CHUNK
    weight_RNC = torch.nn.functional.pad(weight_RV, (0, pad)).view(len(weight_RV), -1, CHUNK)
    sum_RN = weight_RNC.sum(-1, dtype=torch.float64)
    chunk_R1, rest_R1 = _invert(sum_RN, u_R[:, None] * sum_RN.sum(-1, keepdim=True))
    inside_RC = weight_RNC[torch.arange(len(chunk_R1), device=chunk_R1.device), chunk_R1[:, 0]].double()
    entry_R1, _ = _invert(inside_RC, rest_R1)
    return (chunk_R1 * CHUNK + entry_R1)[:, 0]


def _invert(weight_RC: Tensor, target_R1: Tensor) -> tuple[Tensor, Tensor]:
    """The first column at which the running sum exceeds the target, always one with weight, and what the target
    exceeds the sum before it by.
    """
    running_RC = weight_RC.cumsum(-1)
    last_R1 = (weight_RC > 0).to(torch.int64).mul_(torch.arange(weight_RC.shape[1], device=weight_RC.device)).amax(-1, keepdim=True)
    column_R1 = torch.searchsorted(running_RC, target_R1, right=True).minimum(last_R1)
    before_R1 = running_RC.gather(-1, column_R1) - weight_RC.gather(-1, column_R1)
    return column_R1, target_R1 - before_R1


def _draw_filtered(scaled_RV: Tensor, params: Seq[SamplingParams], u_R: Tensor) -> Tensor:
    """Top-k, top-p and min-p over candidates sorted by likelihood.

    A row's kept set is known once the candidates reach past its end. Rows for which CANDIDATES do not are sorted whole.
    """
    num_candidates = min(scaled_RV.shape[1], max(CANDIDATES, *(p.top_k for p in params)))
    token_R, known_R = _draw_candidates(scaled_RV, params, u_R, num_candidates)
    again = [i for i, known in enumerate(known_R.tolist()) if not known]
    if again:
        token_R[again] = _draw_candidates(scaled_RV[again], [params[i] for i in again], u_R[again], scaled_RV.shape[1])[0]
    return token_R


def _draw_candidates(scaled_RV: Tensor, params: Seq[SamplingParams], u_R: Tensor, num_candidates: int) -> tuple[Tensor, Tensor]:
    vocab_size = scaled_RV.shape[1]
    value_RC, index_RC = scaled_RV.topk(num_candidates, dim=-1)
    weight_RC = value_RC.exp().double()
    top_k_R1 = torch.tensor([min(p.top_k, vocab_size) or vocab_size for p in params], device=scaled_RV.device)[:, None]
    rank_C = torch.arange(num_candidates, device=scaled_RV.device)
    in_top_k_RC = rank_C < top_k_R1
    weight_RC = weight_RC * in_top_k_RC
    total_R1 = torch.where(
        top_k_R1 < vocab_size,
        weight_RC.sum(-1, keepdim=True),
        scaled_RV.exp().sum(-1, keepdim=True, dtype=torch.float64),
    )
    before_RC = weight_RC.cumsum(-1) - weight_RC
    top_p_R1 = _column([p.top_p for p in params], before_RC)
    min_p_R1 = _column([p.min_p for p in params], before_RC)
    beyond_RC = (before_RC >= top_p_R1 * total_R1) | (weight_RC < min_p_R1)
    kept_RC = in_top_k_RC & ~(beyond_RC & (rank_C > 0))
    known_R = ~kept_RC[:, -1] | torch.tensor(
        [num_candidates == vocab_size or 0 < p.top_k <= num_candidates for p in params], device=u_R.device
    )
    kept_weight_RC = weight_RC * kept_RC
    column_R1, _ = _invert(kept_weight_RC, u_R[:, None] * kept_weight_RC.sum(-1, keepdim=True))
    return index_RC.gather(-1, column_R1)[:, 0], known_R


# --- reporting ------------------------------------------------------------------------------------------------------------------------


def _report(logprob_RV: Tensor, rows: Seq[Row], tokens: Seq[int]) -> list[TokenLogprob]:
    chosen = logprob_RV.gather(-1, torch.tensor(tokens, device=logprob_RV.device)[:, None])[:, 0].tolist()
    most = max(row.params.logprobs or 0 for row in rows)
    values, ids = logprob_RV.topk(min(most, logprob_RV.shape[1]), dim=-1) if most else (logprob_RV[:, :0], logprob_RV[:, :0].long())
    return [
        TokenLogprob(token, logprob, tuple(zip(top_ids, top_values, strict=True))[: row.params.logprobs])
        for row, token, logprob, top_ids, top_values in zip(rows, tokens, chosen, ids.tolist(), values.tolist(), strict=True)
    ]

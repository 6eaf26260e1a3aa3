"""What may be drawn, worked out in float64 and by sorting: the rules of sampling at their plainest."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gemel.engine.sample import Row, uniform
from tests.tolerance import DRAW_BORDER


def adjusted(logits_V: npt.NDArray[np.float32], row: Row) -> npt.NDArray[np.float32]:
    """Bias, penalties and bans, in the type and the order in which they are defined."""
    params, sequence = row.params, row.sequence
    out_V = logits_V.copy()
    for token, bias in params.logit_bias.items():
        out_V[token] += np.float32(bias)
    for token in set(sequence.tokens) if params.repetition_penalty != 1.0 else ():
        penalty = np.float32(params.repetition_penalty)
        out_V[token] = out_V[token] / penalty if out_V[token] > 0 else out_V[token] * penalty
    for token in set(sequence.output):
        count = np.float32(sequence.output.count(token))
        out_V[token] -= np.float32(params.presence_penalty) + np.float32(params.frequency_penalty) * count
    if not row.may_end:
        out_V[list(row.end_tokens)] = -np.inf
    return out_V


def accepts(logits_V: npt.NDArray[np.float32], row: Row, token: int | None) -> bool:
    """Whether a row's random number means this token, give or take `DRAW_BORDER`. Of equal tokens the smaller id comes first."""
    params = row.params
    own_V = adjusted(logits_V, row).astype(np.float64)
    if params.temperature == 0.0:
        return token == own_V.argmax()
    weight_V = np.exp((own_V - own_V.max()) / params.temperature)
    [number] = uniform([row.seed], [row.sequence.index], [row.sequence.num_output])
    if not (params.top_k or params.top_p < 1.0 or params.min_p > 0.0):
        return _means(weight_V, number, token)
    order = np.lexsort((np.arange(len(own_V)), -own_V))[: params.top_k or None]
    weight_R = weight_V[order]
    before_R = (weight_R.cumsum() - weight_R) / weight_R.sum()
    place = int(np.flatnonzero(order == token)[0]) if token in order else None

    def kept(give: float) -> int:
        """How many are, if borders lie further out by so much."""
        in_top_p = before_R < params.top_p + give if params.top_p < 1.0 else np.ones(len(before_R), bool)
        return max(1, int((in_top_p & (weight_R >= params.min_p * (1 - give))).sum()))

    return any(_means(weight_R[:num], number, place) for num in range(kept(-DRAW_BORDER), kept(DRAW_BORDER) + 1))


def _means(weight_N: npt.NDArray[np.float64], number: float, place: int | None) -> bool:
    """Whether inverting the distribution at `number` gives `place`."""
    if place is None or place >= len(weight_N) or weight_N[place] == 0:
        return False
    running_N = weight_N.cumsum() / weight_N.sum()
    begin, end = running_N[place] - weight_N[place] / weight_N.sum(), running_N[place]
    return bool(begin - DRAW_BORDER <= number <= end + DRAW_BORDER)

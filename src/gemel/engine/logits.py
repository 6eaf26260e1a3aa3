"""What a step of the model leaves for the sampler: the contract between the runner and whoever chooses tokens.

Most steps are greedy, and all that they need of a row of V logits is which is the largest. Whoever computes the logits sees each of them
anyway and finds that on the way; the sampler then never touches the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from torch import Tensor

from gemel.ops.cpu.sampler import Sampler


@dataclass(frozen=True, slots=True)
class Logits:
    """Logits of the S sequences that sample in a step, in the plan's order.

    `values_SV` are fp32, on any device; they may be memory that the next step overwrites. `argmax_S` holds each row's likeliest token, of
    equal ones that with the smallest id, and `largest_S` its logit. **NaN anywhere in a row makes its `largest_S` NaN**, as torch's `max`
    does, so that "is the largest finite?" tells whether a row can be sampled from. A native step also brings what draws from its rows
    natively.
    """

    values_SV: Tensor
    argmax_S: list[int]
    largest_S: list[float]
    sampler: Sampler | None = None

    @classmethod
    def of(cls, values_SV: Tensor) -> Self:
        """Of logits that nobody has looked at yet: one pass over them."""
        largest_S, argmax_S = values_SV.max(-1)
        return cls(values_SV, argmax_S.tolist(), largest_S.tolist())

"""What goes through the model at once: a flat run of tokens, documents end to end, no padding.

T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from gemel.data.pack import Packed

TRAINED = 1 << 31  # bit of a token, in documents of which not all is trained
PLACE = "place"  # stream: which token of its step it is, of all ranks, however they cut it


@dataclass(frozen=True, slots=True)
class Batch:
    """A micro-batch.

    tokens_T     ids
    positions_T  of each token in its document, or in the part of it that is here
    targets_T    the id that is to be predicted at each place
    weights_T    what each prediction counts, in fp32; 0 is not trained
    starts       where documents start; the last entry is T
    streams      more numbers per token, by name: `PLACE`, and what an objective needs
    """

    tokens_T: Tensor
    positions_T: Tensor
    targets_T: Tensor
    weights_T: Tensor
    starts: tuple[int, ...]
    streams: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, sequences: Sequence[Packed], marked: Sequence[bool], places: Sequence[int] | None = None) -> Self:
        """Sequences end to end. `marked` says of each whether `TRAINED` tells which of its tokens are trained; else all are. `places` are
        those of their first tokens in the step, if it has other batches.
        """
        offsets = np.cumsum([0, *(len(sequence.inputs) for sequence in sequences)])
        starts = np.concatenate([*(sequence.starts + offset for sequence, offset in zip(sequences, offsets, strict=False)), offsets[-1:]])
        positions = np.arange(starts[-1]) - np.repeat(starts[:-1], np.diff(starts))
        inputs, targets = (np.concatenate([getattr(s, name) for s in sequences]) for name in ("inputs", "targets"))
        counts = np.repeat(np.logical_not(marked), np.diff(offsets)) | (targets & TRAINED != 0)
        ahead = np.zeros(len(sequences), np.int64) if places is None else np.asarray(places) - offsets[:-1]
        return cls(
            torch.from_numpy(inputs & (TRAINED - 1)),
            torch.from_numpy(positions),
            torch.from_numpy(targets & (TRAINED - 1)),
            torch.from_numpy(counts.astype(np.float32)),
            tuple(starts.tolist()),
            {PLACE: torch.from_numpy(np.arange(offsets[-1]) + np.repeat(ahead, np.diff(offsets)))},
        )

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.starts[-1]

    @property
    def weight(self) -> float:
        """What all predictions count together: the denominator of the loss, once summed over the micro-batches of a step."""
        return float(self.weights_T.sum(dtype=torch.float64))

    def to(self, device: torch.device) -> Self:
        """On another device. From pinned memory the copies do not wait for each other."""
        if device == self.tokens_T.device:
            return self
        return self._map(lambda x: x.to(device, non_blocking=True))

    def pinned(self) -> Self:
        """In memory that a GPU can read by itself."""
        return self._map(Tensor.pin_memory)

    def _map(self, move: Callable[[Tensor], Tensor]) -> Self:
        return replace(
            self,
            tokens_T=move(self.tokens_T),
            positions_T=move(self.positions_T),
            targets_T=move(self.targets_T),
            weights_T=move(self.weights_T),
            streams={name: move(stream) for name, stream in self.streams.items()},
        )

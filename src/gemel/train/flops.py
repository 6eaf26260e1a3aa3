"""How many operations a batch takes, for utilization: what the mathematics needs, whatever is computed twice on the way.

A product of a token with a matrix is a multiplication and an addition per weight; the backward pass does two such products. Attention
looks at every pair of tokens of a document once for its score and once for its value. What is recomputed to save memory is not counted, and
neither is anything that is not a product (the convention of PaLM, arXiv 2204.02311, but for masked pairs, which are not counted here).
"""

from __future__ import annotations

from itertools import pairwise

from gemel.config.model import ModelConfig
from gemel.model.leaves.linear import Leaf
from gemel.model.model import Model
from gemel.train.batch import Batch


class Flops:
    """Of forward and backward pass."""

    def __init__(self, model: Model):
        self._config = model.config
        leaves = {name: module for name, module in model.named_modules() if isinstance(module, Leaf)}
        weights = {name: leaf.in_features * leaf.out_features for name, leaf in leaves.items()}
        self._head = weights.pop("head")
        self._blocks = sum(weights.values())

    def of(self, batch: Batch) -> float:
        """Of one micro-batch. The head meets only tokens that are trained."""
        num_trained = int(batch.weights_T.count_nonzero())
        pair_flops = 4 * self._config.num_heads * self._config.head_width
        pairs = sum(_pairs(stop - start, self._config) for start, stop in pairwise(batch.starts))
        return 3.0 * (2 * self._blocks * batch.num_tokens + 2 * self._head * num_trained + pair_flops * pairs)


def _pairs(length: int, config: ModelConfig) -> int:
    """(query, key) pairs of a document over all layers: the token at position p sees p + 1 keys, or its window."""

    def of(window: int | None) -> int:
        full = length if window is None else min(length, window)
        return full * (full + 1) // 2 + (length - full) * (window or 0)

    return sum(of(config.window(layer)) for layer in range(config.num_layers))

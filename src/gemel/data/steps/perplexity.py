"""How surprising a text is to a model of good text: little where it is like it, much where it is lists, code or another dialect.

CCNet (Wenzek et al. 2020, arXiv 1911.00359) sorted the web by this. Perplexity is 10 ** (-log10 P / tokens), where the end of a line
is a token too. Figures of two models, or of two languages, cannot be compared.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gemel.config.data.rules import PerplexityConfig
from gemel.config.errors import ConfigError
from gemel.data.document import Document, Dropped
from gemel.data.steps.arpa import KenLm, load_arpa
from gemel.data.steps.ngram import NgramModel, Scorer
from gemel.data.steps.segment import batches


class Perplexity:
    """Notes how surprising documents are, and drops those that are too much so, or too little."""

    def __init__(self, config: PerplexityConfig):
        self.config = config
        self._model = load(config.model, config)

    def __call__(self, documents: Sequence[Document]) -> Iterable[Document | Dropped]:
        """One answer per document, in order."""
        for batch in batches(documents):
            asked = [document for document in batch if self._speaks(document)]
            values = iter(perplexities(self._model, [document.text for document in asked]).tolist())
            for document in batch:
                yield self._judge(document, next(values)) if self._speaks(document) else document

    def _speaks(self, document: Document) -> bool:
        return not self.config.language or document.metadata.get("language") == self.config.language

    def _judge(self, document: Document, value: float) -> Document | Dropped:
        document.metadata["perplexity"] = round(value, 2)
        if self.config.buckets:
            document.metadata["perplexity_bucket"] = bisect_right(self.config.buckets, value)
        if value > self.config.max_perplexity:
            return Dropped(document, "perplexity.high", f"{value:.1f} > {self.config.max_perplexity:.1f}")
        if value < self.config.min_perplexity:
            return Dropped(document, "perplexity.low", f"{value:.1f} < {self.config.min_perplexity:.1f}")
        return document


def perplexities(model: Scorer, texts: Sequence[str]) -> npt.NDArray[np.float64]:
    """One figure per text; a text without a token is as unlikely as can be."""
    log_p, num_tokens = model.score(texts)
    values = np.full(len(texts), np.inf)
    np.power(10.0, -log_p / np.maximum(num_tokens, 1), out=values, where=num_tokens > 0)
    return values


def load(file: Path, config: PerplexityConfig) -> Scorer:
    """A model of whatever form: our own, ARPA, or KenLM's binary."""
    if not file.is_file():
        raise ConfigError(f"no n-gram model at {str(file)!r}: train one with `gemel data ngram`, or give an ARPA or KenLM file")
    if file.suffix == ".safetensors":
        return NgramModel.load(file)
    with file.open("rb") as opened:
        magic = opened.read(8)
    if magic.startswith(b"mmap lm "):
        return KenLm(file, config.unit, config.fold)
    return load_arpa(file, config.unit, config.fold)

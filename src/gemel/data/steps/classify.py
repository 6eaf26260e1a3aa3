"""A small classifier of texts: which words and pairs of words occur, weighed by logistic regression. Good, bad, and how sure.

This is how DCLM (Li et al. 2024, arXiv 2406.11794) chooses its web pages, with fastText in the place of this, and how FineWeb-Edu does: a
large model labels some thousand texts, a small one learns from them and reads the rest. Features are which words and pairs occur, not how
often (Wang and Manning 2012, "Baselines and bigrams"), hashed into 2**bits places and scaled to length 1.

A part of the labelled texts, chosen by a hash of their text, is kept out of training; precision and recall are of that part.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gemel.config.data.rules import ClassifyConfig
from gemel.config.errors import CheckpointError, ConfigError
from gemel.data.document import Document, Dropped
from gemel.data.steps.minimise import minimise
from gemel.data.steps.segment import Index, RunningHash, Segments, batches, sums

Floats = npt.NDArray[np.float64]

FORMAT = "gemel text classifier 1"
MAX_CHARACTERS = 20_000  # of each text, from its beginning: a page is judged by its first ten pages


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text and whether it is wanted."""

    text: str
    good: bool


@dataclass(frozen=True, slots=True)
class HeldOut:
    """How well a threshold separates texts that were not trained on. Precision is nan where nothing was accepted."""

    threshold: float
    precision: float
    recall: float
    accuracy: float
    num_texts: int


class Classifier:
    """Weights of hashed words and pairs, and the report of its training."""

    def __init__(self, weights: npt.NDArray[np.float32], bias: float, report: Sequence[HeldOut] = ()):
        self.weights = weights
        self.bias = bias
        self.report = tuple(report)

    def scores(self, texts: Sequence[str]) -> Floats:
        """Probabilities that texts are good, from 0 to 1."""
        features, bounds = _features(texts, len(self.weights).bit_length() - 1)
        return _sigmoid(_weigh(self.weights, features, bounds) + self.bias)

    def save(self, file: Path) -> None:
        """Writes one safetensors file, with the report in its header."""
        from safetensors.numpy import save_file

        about = {"format": FORMAT, "bias": repr(self.bias), "report": json.dumps([asdict(row) for row in self.report])}
        save_file({"weights": self.weights}, file, about)

    @classmethod
    def load(cls, file: Path) -> Classifier:
        """Reads what `save` wrote.

        Raises CheckpointError: the file is missing or something else.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, "numpy") as opened:
                about = opened.metadata() or {}
                if about.get("format") != FORMAT:
                    raise CheckpointError(f"{file} holds no text classifier: train one with `gemel data classify`")
                return cls(opened.get_tensor("weights"), float(about["bias"]), [HeldOut(**row) for row in json.loads(about["report"])])
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read the classifier {file}: {error}") from None


class Classify:
    """Notes the score of each document, and drops those below the least one wanted."""

    def __init__(self, config: ClassifyConfig):
        self.config = config
        self._classifier = Classifier.load(config.model)

    def __call__(self, documents: Sequence[Document]) -> Iterable[Document | Dropped]:
        """One answer per document, in order."""
        for batch in batches(documents):
            for document, score in zip(batch, self._classifier.scores([d.text for d in batch]).tolist(), strict=True):
                document.metadata[self.config.name] = round(score, 4)
                if score < self.config.min_score:
                    yield Dropped(document, "classify.low", f"{self.config.name} {score:.3f} < {self.config.min_score:.3f}")
                else:
                    yield document


def train(labelled: Iterable[Labelled], bits: int = 20, l2: float = 0.1, held_out: float = 0.2) -> Classifier:
    """A classifier of two kinds of text, and how good it is on the share `held_out` of them.

    l2      strength of regularisation: the loss is the sum over texts of their log-loss, plus l2 / 2 times the squared weights
    Raises ConfigError: one of the kinds has no texts to train on or to judge by.
    """
    learn: list[Labelled] = []
    judge: list[Labelled] = []
    for one in labelled:
        (judge if _draw(one.text) < held_out else learn).append(one)
    for part, name in ((learn, "to train on"), (judge, "held out to judge by")):
        good = sum(one.good for one in part)
        if not 0 < good < len(part):
            raise ConfigError(f"{good} good and {len(part) - good} bad texts {name}: both kinds are needed; label more texts")
    features, bounds = _features([one.text for one in learn], bits)
    weights, bias = _fit(features, bounds, np.array([one.good for one in learn], np.float64), 1 << bits, l2)
    classifier = Classifier(weights.astype(np.float32), bias)
    scores = classifier.scores([one.text for one in judge])
    truth = np.array([one.good for one in judge])
    report = [_held_out(scores, truth, threshold) for threshold in (0.1, 0.25, 0.5, 0.75, 0.9)]
    return Classifier(classifier.weights, bias, report)


def _draw(text: str) -> float:
    """From 0 to 1, the same for the same text: copies of a text are never on both sides of the split."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little") / 2**64


def _held_out(scores: Floats, truth: npt.NDArray[np.bool_], threshold: float) -> HeldOut:
    accepted = scores >= threshold
    hits = int((accepted & truth).sum())
    precision = hits / int(accepted.sum()) if accepted.any() else float("nan")
    return HeldOut(
        threshold, round(precision, 4), round(hits / int(truth.sum()), 4), round(float((accepted == truth).mean()), 4), len(truth)
    )


def _features(texts: Sequence[str], bits: int) -> tuple[Index, Index]:
    """The different places that each text fills, ascending, and the bounds between texts."""
    parts, counts = [], []
    for batch in batches([Document(text[:MAX_CHARACTERS].lower(), "", "") for text in texts]):
        segments = Segments([document.text for document in batch])
        running, owner = RunningHash(segments.token_hash), segments.tokens.document.astype(np.uint64)
        pairs = np.flatnonzero(owner[:-1] == owner[1:])
        hashes = np.concatenate((segments.token_hash, running.windows(2)[pairs] if len(pairs) else segments.token_hash[:0]))
        owners = np.concatenate((owner, owner[pairs]))
        places = hashes >> np.uint64(64 - bits)
        filled = np.unique((owners << np.uint64(bits)) | places)
        parts.append((filled & np.uint64((1 << bits) - 1)).astype(np.int64))
        counts.append(np.bincount((filled >> np.uint64(bits)).astype(np.int64), minlength=len(batch)))
    if not parts:
        return np.empty(0, np.int64), np.zeros(1, np.int64)
    return np.concatenate(parts), np.concatenate(([0], np.cumsum(np.concatenate(counts))))


def _weigh(weights: npt.NDArray[np.floating], features: Index, bounds: Index) -> Floats:
    """The product of each text's features, scaled to length 1, and the weights."""
    return sums(weights[features].astype(np.float64), bounds) / np.sqrt(np.maximum(np.diff(bounds), 1))


def _sigmoid(x: Floats) -> Floats:
    return np.exp(-np.logaddexp(0.0, -x))


def _fit(features: Index, bounds: Index, truth: Floats, size: int, l2: float) -> tuple[Floats, float]:
    """The weights and bias of least loss: convex, so found by L-BFGS (Nocedal 1980) with no learning rate to choose."""
    used, columns = np.unique(features, return_inverse=True)
    scale = np.repeat(1 / np.sqrt(np.maximum(np.diff(bounds), 1)), np.diff(bounds))
    owner = np.repeat(np.arange(len(truth)), np.diff(bounds))

    def loss(x: Floats) -> tuple[float, Floats]:
        margin = sums(x[:-1][columns] * scale, bounds) + x[-1]
        error = _sigmoid(margin) - truth
        value = float(np.logaddexp(0.0, np.where(truth > 0, -margin, margin)).sum() + l2 / 2 * (x[:-1] ** 2).sum())
        gradient = np.bincount(columns, error[owner] * scale, len(used)) + l2 * x[:-1]
        return value, np.append(gradient, error.sum())

    found = minimise(loss, np.zeros(len(used) + 1))
    weights = np.zeros(size)
    weights[used] = found[:-1]
    return weights, float(found[-1])

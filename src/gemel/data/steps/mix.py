"""Mixing: every source is sampled so that it has its share of the whole, exactly counted.

A document's draw is a hash of its id and text, a number below 2^64; of a source, those with the smallest draws are taken until the
source's budget is met. Draws are counted in 2^16 slots per source, so the tables are small however large the corpus is, and a source
misses its budget by at most half a slot (or one document, where slots hold no more). A source that must be repeated is given whole as many
times as it takes, and the rest of the way as above; how often a document counts is written to `metadata.repeat`, for whoever writes
tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa
import xxhash

from gemel.config.data.dedup import MixConfig
from gemel.config.errors import ConfigError
from gemel.data.document import Document, Dropped
from gemel.data.step import Places

_SLOT_BITS = 16

_KEYS = pa.schema([("key", pa.uint64()), ("place", pa.uint64()), ("source", pa.large_string()), ("size", pa.uint64())])
_SLOTS = pa.schema([("source", pa.large_string()), ("slot", pa.uint64()), ("documents", pa.uint64()), ("size", pa.uint64())])
_BUDGET = pa.schema(
    [
        ("source", pa.large_string()),
        ("documents", pa.uint64()),  # there are
        ("size", pa.uint64()),  # of these, in the recipe's unit
        ("share", pa.float64()),  # wanted, of the whole
        ("target", pa.float64()),  # size that this is
        ("repeats", pa.uint64()),  # all documents count so often
        ("slots", pa.uint64()),  # those that are drawn below so many slots count once more
        ("taken_documents", pa.uint64()),  # repeats counted
        ("taken_size", pa.uint64()),  # repeats counted
    ]
)


class Mix:
    """The step. Reason: `mix.sampled`. Its verdicts are the budget report, a row for each source; see `report`."""

    def __init__(self, config: MixConfig):
        self._config = config

    def keys(self, documents: Sequence[Document], places: Places) -> pa.Table:
        """One row for each document, under its draw."""
        sources = [document.source for document in documents]
        sizes = [self._size(document) for document in documents]
        return pa.table([self._draws(documents), places, sources, sizes], schema=_KEYS)

    def resolve(self, rows: pa.Table) -> pa.Table:
        """Documents and sizes of each source and slot."""
        slot = pa.array(rows["key"].to_numpy() >> np.uint64(64 - _SLOT_BITS))
        grouped = rows.select(["source", "size"]).append_column("slot", slot).group_by(["source", "slot"])
        sums = grouped.aggregate([([], "count_all"), ("size", "sum")])
        return pa.table([sums[name] for name in ("source", "slot", "count_all", "size_sum")], names=_SLOTS.names).cast(_SLOTS)

    def conclude(self, findings: pa.Table) -> pa.Table:
        """Every source's budget, and how it is met. Raises ConfigError for one that cannot be."""
        slots = {source: self._histogram(findings, source) for source in sorted(set(findings["source"].to_pylist()))}
        sizes = {source: int(size.sum()) for source, (_, size) in slots.items()}
        shares = self._shares(sizes)
        total = self._total(sizes, shares)
        rows = []
        for source, (documents, size) in slots.items():
            target = total * shares[source]
            repeats, rest = divmod(target, sizes[source]) if sizes[source] else (0, 0.0)
            taken = np.concatenate([[0], np.cumsum(size)])
            slot = int(np.abs(taken - rest).argmin())
            if slot == len(size) or (sizes[source] and taken[slot] == sizes[source]):
                repeats, slot = repeats + 1, 0
            counts = int(repeats) * int(documents.sum()) + int(documents[:slot].sum()), int(repeats) * sizes[source] + int(taken[slot])
            rows.append((source, int(documents.sum()), sizes[source], shares[source], target, int(repeats), slot, *counts))
        return pa.table([list(column) for column in zip(*rows, strict=True)] or [[]] * len(_BUDGET), schema=_BUDGET)

    def apply(self, documents: Sequence[Document], places: Places, verdicts: pa.Table) -> Iterable[Document | Dropped]:  # noqa: ARG002
        """Keep what is drawn."""
        budgets = {row["source"]: row for row in verdicts.to_pylist()}
        slots = self._draws(documents) >> np.uint64(64 - _SLOT_BITS)
        for document, slot in zip(documents, slots.tolist(), strict=True):
            budget = budgets[document.source]
            repeat = budget["repeats"] + (slot < budget["slots"])
            if repeat > 1:
                document.metadata["repeat"] = repeat
            taken = f"{budget['taken_size']} of {budget['size']} {self._config.unit} of {document.source!r} are taken"
            yield document if repeat else Dropped(document, "mix.sampled", taken)

    def report(self, verdicts: pa.Table) -> dict[str, dict[str, float]]:
        """The budget by source: what there is, its wanted share, the size that this is, what is taken, and that share."""
        whole = sum(verdicts["taken_size"].to_pylist()) or 1
        names = ("documents", "size", "share", "target", "taken_documents", "taken_size")
        rows = {row["source"]: {name: row[name] for name in names} for row in verdicts.to_pylist()}
        return {source: row | {"taken_share": row["taken_size"] / whole} for source, row in rows.items()}

    def _draws(self, documents: Sequence[Document]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
        draws = (
            xxhash.xxh3_64_intdigest(document.text.encode("utf-8", "surrogatepass"), xxhash.xxh3_64_intdigest(name, self._config.seed))
            for document in documents
            for name in [f"{document.source}\0{document.id}".encode("utf-8", "surrogatepass")]
        )
        return np.fromiter(draws, np.uint64, len(documents))

    def _size(self, document: Document) -> int:
        match self._config.unit:
            case "documents":
                return 1
            case "characters":
                return len(document.text)
            case "bytes":
                return len(document.text.encode("utf-8", "surrogatepass"))

    def _histogram(self, findings: pa.Table, source: str) -> tuple[np.ndarray[tuple[int], np.dtype[np.int64]], ...]:
        """Documents and size in each slot of a source."""
        rows = findings.filter(pa.array(np.array(findings["source"].to_pylist()) == source))
        slot = rows["slot"].to_numpy().astype(np.int64)
        sums = []
        for name in ("documents", "size"):
            sums.append(np.zeros(1 << _SLOT_BITS, np.int64))
            np.add.at(sums[-1], slot, rows[name].to_numpy().astype(np.int64))
        return tuple(sums)

    def _shares(self, sizes: Mapping[str, int]) -> dict[str, float]:
        weights = dict(self._config.weights)
        if not weights:
            weights = {source: size ** (1 / self._config.temperature) for source, size in sizes.items()}
        if missing := sorted(sizes.keys() - weights.keys()):
            raise ConfigError(
                f"mix.weights has no weight for {', '.join(map(repr, missing))}; name every source of the corpus, 0 leaves it out"
            )
        if absent := sorted(source for source, weight in weights.items() if weight and not sizes.get(source)):
            raise ConfigError(
                f"mix.weights names {', '.join(map(repr, absent))}, but there is nothing left of it; sources: {', '.join(sizes)}"
            )
        whole = sum(weights.values())
        return {source: weights[source] / whole if whole else 0.0 for source in sizes}

    def _total(self, sizes: Mapping[str, int], shares: Mapping[str, float]) -> float:
        """The size of the whole: the budget, or the most that `epochs` allows."""
        epochs, unit = self._config.epochs, self._config.unit
        most, scarce = min(((sizes[source] * epochs / share, source) for source, share in shares.items() if share), default=(0.0, ""))
        budget = self._config.budget
        if budget is not None and budget > most * (1 + 1e-12):
            raise ConfigError(
                f"mix.budget = {budget} {unit} asks for {budget * shares[scarce]:.0f} of source {scarce!r}, which has {sizes[scarce]}; "
                f"with epochs = {epochs:g} a budget of at most {int(most)} can be met: lower it, or set epochs = "
                f"{np.ceil(budget * shares[scarce] / sizes[scarce] * 1000) / 1000:g}, or change the weights"
            )
        return most if budget is None else float(budget)

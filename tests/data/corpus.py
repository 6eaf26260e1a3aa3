"""An executor of corpus steps in memory, cut as one likes: the oracle for "the result does not depend on the cutting"."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from gemel.data.document import Document, Dropped
from gemel.data.step import CorpusStep


def documents(*texts: str, source: str = "s", **metadata: Any) -> list[Document]:
    return [Document(text, f"d{number}", source, dict(metadata)) for number, text in enumerate(texts)]


def run(
    step: CorpusStep, corpus: Sequence[Document], units: int = 2, ranges: int = 3, batch: int = 3
) -> tuple[list[Document | Dropped], pa.Table]:
    """Every document's answer, in order, and the verdicts."""
    batches = _batches(corpus, units, batch)
    tables = [step.keys(copy.deepcopy(part), places) for part, places in batches]
    rows = pa.concat_tables(tables)
    keys = rows["key"].to_numpy()
    findings = []
    for number in range(ranges):
        low, high = number * 2**64 // ranges, (number + 1) * 2**64 // ranges
        inside = (keys >= np.uint64(low)) & (keys <= np.uint64(high - 1))
        findings.append(step.resolve(rows.filter(pa.array(inside)).sort_by([("key", "ascending"), ("place", "ascending")])))
    verdicts = step.conclude(pa.concat_tables(findings))
    answers: list[Document | Dropped] = []
    for part, places in batches:
        own = verdicts
        if "place" in verdicts.column_names:
            unit = verdicts["place"].to_numpy() >> np.uint64(32)
            own = verdicts.filter(pa.array(unit == places[0] >> np.uint64(32)))
        answers += step.apply(copy.deepcopy(part), places, own)
    return answers, verdicts


def _batches(corpus: Sequence[Document], units: int, batch: int) -> list[tuple[list[Document], np.ndarray]]:
    parts = []
    cuts = [len(corpus) * unit // units for unit in range(units + 1)]
    for unit, (first, last) in enumerate(pairwise(cuts)):
        places = np.arange(last - first, dtype=np.uint64) + (np.uint64(unit) << np.uint64(32))
        parts += [(list(corpus[first + i : min(first + i + batch, last)]), places[i : i + batch]) for i in range(0, last - first, batch)]
    return parts


def outcome(answers: Sequence[Document | Dropped]) -> list[tuple[str, str, str]]:
    """Id, reason, text: what must not depend on the cutting."""
    return [(a.document.id, a.reason, a.document.text) if isinstance(a, Dropped) else (a.id, "", a.text) for a in answers]


def kept(answers: Sequence[Document | Dropped]) -> list[str]:
    return [answer.id for answer in answers if isinstance(answer, Document)]


CUTTINGS = [(1, 1, 1000), (1, 5, 2), (2, 3, 3), (4, 2, 1), (3, 16, 7)]  # units, ranges of keys, documents in a batch

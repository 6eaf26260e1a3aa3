"""What steps do to a document without dropping it is counted in its metadata, and summed up over the corpus by the pipeline."""

from __future__ import annotations

from gemel.data.document import Document


def count(document: Document, name: str, times: int = 1) -> None:
    """`times` more of `name` under the document's `counts`."""
    if times:
        counts = document.metadata.setdefault("counts", {})
        counts[name] = counts.get(name, 0) + times

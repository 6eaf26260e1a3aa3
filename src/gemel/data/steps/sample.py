"""A share of the documents, chosen by a hash of their ids: the same ones in whatever order, by however many workers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b

from gemel.config.data.rules import SampleConfig
from gemel.data.document import Document, Dropped


class Sample:
    """Keeps documents whose hash falls below the share."""

    def __init__(self, config: SampleConfig):
        self.config = config
        self._limit = round(config.share * 2**64)
        self._key = config.seed.to_bytes(16, "little")

    def __call__(self, documents: Sequence[Document]) -> Iterable[Document | Dropped]:
        """One answer per document, in order."""
        for document in documents:
            digest = blake2b(f"{document.source}\0{document.id}".encode("utf-8", "surrogatepass"), digest_size=8, key=self._key).digest()
            if int.from_bytes(digest, "little") < self._limit:
                yield document
            else:
                yield Dropped(document, "sample.left_out")

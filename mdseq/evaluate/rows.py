"""What is scored of a dataset: every target once, in rows that the model can take.

Shapes: r rows, d documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mdseq.data.corpus import Corpus


@dataclass(frozen=True)
class ScoredRows:
    """Stretches of documents, each scored on its own, int64 [r] each.

    Attributes:
        row: Id, counted in the order of the documents.
        document: Index among the documents that are scored.
        part: Which stretch of its document.
        position: Of its first token in the corpus' stream of tokens.
        length: Its tokens.
        source_length: How many of them, leading, are given.
    """

    row: np.ndarray
    document: np.ndarray
    part: np.ndarray
    position: np.ndarray
    length: np.ndarray
    source_length: np.ndarray

    @classmethod
    def of(cls, corpus: Corpus, documents: np.ndarray, row_length: int) -> ScoredRows:
        """Cut texts every `row_length` tokens; a pair stays whole, for its target needs its source."""
        begins, ends = corpus.extents(documents)
        length_d = ends - begins
        stride = row_length if corpus.manifest.kind == "text" else max(int(length_d.max()), 1)
        parts_d = -(-length_d // stride)
        document = np.repeat(np.arange(len(documents)), parts_d)
        part = np.arange(len(document)) - np.repeat(np.cumsum(parts_d) - parts_d, parts_d)
        start = part * stride
        length = np.minimum(length_d[document] - start, stride)
        source_length = np.clip(corpus.target_starts(documents)[document] - start, 0, length)
        return cls(np.arange(len(document)), document, part, begins[document] + start, length, source_length)

    def __len__(self) -> int:
        return len(self.row)

    def take(self, index: np.ndarray) -> ScoredRows:
        return ScoredRows(
            self.row[index],
            self.document[index],
            self.part[index],
            self.position[index],
            self.length[index],
            self.source_length[index],
        )

    def batches(self, size: int) -> Iterator[ScoredRows]:
        """Rows of like length together, the longest first: little padding, and what does not fit shows at once."""
        order = np.argsort(-self.length, kind="stable")
        for first in range(0, len(order), size):
            yield self.take(order[first : first + size])

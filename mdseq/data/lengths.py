"""How long targets are: the quantiles of their lengths, by the length of their source.

A diffusion model fills as many tokens as it is told to. What it is told may come from the training data: the median
length of targets whose source is about as long, or a draw from their distribution (as in length models for DiffuSeq,
arXiv 2503.10683).

Shapes: n documents, k bins of source length, q quantiles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mdseq.data.corpus import Corpus
from mdseq.data.format import Kind
from mdseq.errors import UserError

BINS_PER_DOUBLING = 2
NUM_QUANTILES = 17
# Quantiles of a million documents are those of all of them, for all that is done with them here.
MAX_DOCUMENTS = 2**20


def check_sources(corpus: Corpus, sources: Sequence[str]) -> None:
    """Raise UserError unless the corpus has documents of each of these sources."""
    unknown = [name for name in sources if name not in corpus.sources]
    if unknown:
        raise UserError(
            f"data.lengths_of: there is no training text of {', '.join(unknown)}; allowed: {', '.join(corpus.sources)}"
        )


@dataclass(frozen=True)
class LengthTable:
    """Quantiles of target length, in bins of source length.

    Texts have no source: all of them are in one bin, and their target is the whole document.

    Attributes:
        kind: What the documents are.
        sources_k: Mean log2 of the source lengths in each bin, ascending; a single 0 for texts.
        quantiles_kq: Tokens to generate, the end of the text included: evenly spaced quantiles, from the least to the
            largest.
    """

    kind: Kind
    sources_k: tuple[float, ...]
    quantiles_kq: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, corpus: Corpus, sources: Sequence[str] = ()) -> LengthTable:
        """The table of some sources of a corpus, or of all, from its index alone: no token is read.

        Raises UserError like `check_sources`.
        """
        check_sources(corpus, sources)
        documents = [corpus.sources[name] for name in dict.fromkeys(sources or corpus.sources)]
        ends = np.cumsum([len(part) for part in documents])
        place_n = np.linspace(0, ends[-1] - 1, min(int(ends[-1]), MAX_DOCUMENTS)).astype(np.int64)
        part_n = np.searchsorted(ends, place_n, side="right")
        document_n = place_n + np.array([part.stop for part in documents])[part_n] - ends[part_n]
        begin_n, end_n = corpus.extents(document_n)
        length_n = end_n - begin_n
        if corpus.manifest.kind == "text":
            return cls.of_lengths("text", np.ones_like(length_n), length_n - 1)  # all but the BOS
        start_n = corpus.target_starts(document_n)
        return cls.of_lengths("pair", start_n, length_n - start_n)

    @classmethod
    def of_lengths(cls, kind: Kind, source_n: np.ndarray, target_n: np.ndarray) -> LengthTable:
        """The table of documents with these numbers of source tokens (at least 1) and of target tokens."""
        log_source_n = np.log2(source_n)
        bin_n = np.floor(log_source_n * BINS_PER_DOUBLING).astype(np.int64)
        order = np.argsort(bin_n, kind="stable")
        firsts = np.flatnonzero(np.diff(bin_n[order], prepend=-1))
        bins = np.split(order, firsts[1:])
        share_q = np.linspace(0, 1, NUM_QUANTILES)
        return cls(
            kind,
            tuple(float(log_source_n[members].mean()) for members in bins),
            tuple(tuple(np.quantile(target_n[members], share_q).tolist()) for members in bins),
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LengthTable:
        return cls(values["kind"], tuple(values["sources_k"]), tuple(map(tuple, values["quantiles_kq"])))

    def to_dict(self) -> dict[str, Any]:
        """As JSON gives it back."""
        values = asdict(self)
        return values | {"sources_k": list(self.sources_k), "quantiles_kq": list(map(list, self.quantiles_kq))}

    def predicted(self, num_source: int) -> int:
        """The median number of tokens to generate after `num_source` tokens, BOS and separator included."""
        return self.at(num_source, 0.5)

    def at(self, num_source: int, uniform: float) -> int:
        """The inverse of the distribution of lengths after `num_source` tokens, at a number in [0, 1].

        For texts, that is the distribution of what is left of the documents that are longer than what is given; where
        none is, of whole documents.
        """
        quantile_q = self._quantiles(num_source)
        share_q = np.linspace(0, 1, len(quantile_q))
        given = num_source - 1 if self.kind == "text" else 0  # less the BOS
        if given >= quantile_q[-1]:
            given = 0
        passed = float(np.interp(given, quantile_q, share_q, left=0.0))
        length = float(np.interp(passed + uniform * (1 - passed), share_q, quantile_q)) - given
        return max(1, round(length))

    def _quantiles(self, num_source: int) -> np.ndarray:
        """Between bins, each quantile is linear in log2 of the source length."""
        log_source = math.log2(max(num_source, 1))
        return np.array([np.interp(log_source, self.sources_k, column_k) for column_k in np.array(self.quantiles_kq).T])

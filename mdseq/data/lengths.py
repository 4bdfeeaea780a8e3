"""How long targets are: the quantiles of their lengths, by how much their source has to say.

A diffusion model fills as many tokens as it is told to. What it is told may come from the training data: the median
length of targets with such a source, or a draw from their distribution (as in length models for DiffuSeq, arXiv
2503.10683). Not all tokens of a source ask for as many of the target: each has a worth, and theirs add up.

Shapes: n documents, v vocabulary, k bins of source worth, q quantiles.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mdseq.data.corpus import Corpus
from mdseq.data.format import Kind
from mdseq.errors import UserError

BINS_PER_DOUBLING = 2
NUM_QUANTILES = 17
# Quantiles of a million documents are those of all of them, for all that is done with them here.
MAX_DOCUMENTS = 2**20
# What a token is worth is told from sources of about so many tokens in all.
MAX_TOKENS = 2**21
# Tokens that are seen less often than about this are worth what the average token is.
RIDGE = 30.0
WORTH_TYPE = np.dtype("<f4")


def check_sources(corpus: Corpus, sources: Sequence[str]) -> None:
    """Raise UserError unless the corpus has documents of each of these sources."""
    unknown = [name for name in sources if name not in corpus.sources]
    if unknown:
        raise UserError(
            f"data.lengths_of: there is no training text of {', '.join(unknown)}; allowed: {', '.join(corpus.sources)}"
        )


@dataclass(frozen=True)
class LengthTable:
    """Quantiles of target length, in bins of source worth.

    Texts have no source: all of them are in one bin, and their target is the whole document.

    Attributes:
        kind: What the documents are.
        worth_v: Target tokens that each token of a source adds; none for texts.
        sources_k: Mean log2 of the sources' worth in each bin, ascending; a single 0 for texts.
        quantiles_kq: Tokens to generate, the end of the text included: evenly spaced quantiles, from the least to the
            largest.
    """

    kind: Kind
    worth_v: tuple[float, ...]
    sources_k: tuple[float, ...]
    quantiles_kq: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, corpus: Corpus, sources: Sequence[str] = ()) -> LengthTable:
        """The table of some sources of a corpus, or of all.

        Reads the index, and of pairs the sources of some documents.

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
            return cls.of_lengths("text", np.empty(0), np.ones_like(length_n), length_n - 1)  # all but the BOS
        start_n = corpus.target_starts(document_n)
        some = slice(None, None, -(-int(start_n.sum()) // MAX_TOKENS))
        sources_n = [corpus.tokens(int(n), 0, int(stop)) for n, stop in zip(document_n[some], start_n[some], strict=True)]
        target_n = (length_n - start_n)[some]
        worth_v = worth_of_tokens(sources_n, target_n, corpus.manifest.vocab_size)
        return cls.of_lengths("pair", worth_v, [_worth(source_l, worth_v) for source_l in sources_n], target_n)

    @classmethod
    def of_lengths(
        cls, kind: Kind, worth_v: np.ndarray, source_n: Sequence[float] | np.ndarray, target_n: np.ndarray
    ) -> LengthTable:
        """The table of documents whose sources have this worth (at least 1), with these numbers of target tokens."""
        log_source_n = np.log2(source_n)
        bin_n = np.floor(log_source_n * BINS_PER_DOUBLING).astype(np.int64)
        order = np.argsort(bin_n, kind="stable")
        firsts = np.flatnonzero(np.diff(bin_n[order], prepend=-1))
        bins = np.split(order, firsts[1:])
        share_q = np.linspace(0, 1, NUM_QUANTILES)
        return cls(
            kind,
            tuple(worth_v.tolist()),
            tuple(float(log_source_n[members].mean()) for members in bins),
            tuple(tuple(np.quantile(target_n[members], share_q).tolist()) for members in bins),
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LengthTable:
        worth_v = np.frombuffer(base64.b64decode(values["worth_v"]), WORTH_TYPE).tolist()
        return cls(values["kind"], tuple(worth_v), tuple(values["sources_k"]), tuple(map(tuple, values["quantiles_kq"])))

    def to_dict(self) -> dict[str, Any]:
        """As JSON gives it back; the worth of tokens in base64."""
        return {
            "kind": self.kind,
            "worth_v": base64.b64encode(np.array(self.worth_v, WORTH_TYPE).tobytes()).decode(),
            "sources_k": list(self.sources_k),
            "quantiles_kq": list(map(list, self.quantiles_kq)),
        }

    def at(self, given_l: np.ndarray, share: float) -> int:
        """How many tokens to generate after these, BOS and separator included: as many as a share in [0, 1] falls below.

        For texts, it is a share of what is left of the documents that are longer than what is given; where none is, of
        whole documents.
        """
        quantile_q = self._quantiles(given_l)
        share_q = np.linspace(0, 1, len(quantile_q))
        given = len(given_l) - 1 if self.kind == "text" else 0  # less the BOS
        if given >= quantile_q[-1]:
            given = 0
        passed = float(np.interp(given, quantile_q, share_q, left=0.0))
        length = float(np.interp(passed + share * (1 - passed), share_q, quantile_q)) - given
        return max(1, round(length))

    def _quantiles(self, given_l: np.ndarray) -> np.ndarray:
        """Between bins, each quantile is linear in log2 of the source's worth."""
        log_source = math.log2(_worth(given_l, np.array(self.worth_v))) if self.kind == "pair" else 0.0
        return np.array([np.interp(log_source, self.sources_k, column_k) for column_k in np.array(self.quantiles_kq).T])


def worth_of_tokens(sources_n: Sequence[np.ndarray], target_n: np.ndarray, vocab_size: int) -> np.ndarray:
    """How many target tokens each token of a source adds, WORTH_TYPE [v]: ridge regression towards one worth for all.

    With X_nv the count of token v in source n, and r target tokens a source token, these are the w that make
    |target - X w|^2 + RIDGE |w - r|^2 least; by conjugate gradients, preconditioned by how often tokens are seen.
    """
    token_a = np.concatenate(sources_n).astype(np.int64)
    count_n = np.array([len(source_l) for source_l in sources_n])
    first_n = np.cumsum(count_n) - count_n
    average = target_n.sum() / count_n.sum()

    def by_token(value_n: np.ndarray) -> np.ndarray:
        """X^T value."""
        return np.bincount(token_a, np.repeat(value_n, count_n), vocab_size)

    seen_v = np.bincount(token_a, minlength=vocab_size) + RIDGE
    change_v = np.zeros(vocab_size)
    rest_v = by_token(target_n - average * count_n)
    enough = 1e-4 * np.linalg.norm(rest_v)
    step_v, size = rest_v / seen_v, rest_v @ (rest_v / seen_v)
    while np.linalg.norm(rest_v) > enough:
        moved_v = by_token(np.add.reduceat(step_v[token_a], first_n)) + RIDGE * step_v
        far = size / (step_v @ moved_v)
        change_v += far * step_v
        rest_v -= far * moved_v
        before, size = size, rest_v @ (rest_v / seen_v)
        step_v = rest_v / seen_v + size / before * step_v
    return (average + change_v).astype(WORTH_TYPE)


def _worth(source_l: np.ndarray, worth_v: np.ndarray) -> float:
    return max(1.0, float(worth_v[source_l].sum(dtype=np.float64)))

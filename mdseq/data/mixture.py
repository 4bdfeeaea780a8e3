"""How much of each source a run reads: exact quotas of a weighted mixture, found for any sample without state.

The samples of training are cut into blocks. After any whole number of blocks, the samples that each source has given
differ from its share by less than one; within a block, a keyed permutation spreads them. Each source goes through its
rows in an order and in epochs of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import accumulate

import numpy as np

from mdseq.data.corpus import Corpus
from mdseq.data.order import RowOrder, mix, permuted, samples_of, seed_key
from mdseq.errors import UserError

MIN_BLOCK = 1024


class MixedOrder:
    """Rows of several sources by their shares. Row r of source s has the number (rows of the sources before s) + r.

    Args:
        num_rows: Rows of each source.
        shares: Share of the samples that each gives; positive, their sum is 1.
        seed, window: As for the RowOrder of each source.
    """

    def __init__(self, num_rows: Sequence[int], shares: Sequence[Fraction], seed: int, window: int = 2**16) -> None:
        assert len(num_rows) == len(shares)
        assert sum(shares) == 1
        assert min(shares) > 0
        self.orders = [RowOrder(rows, seed + source, window) for source, rows in enumerate(num_rows)]
        self.first_rows = np.cumsum([0, *num_rows[:-1]])
        # Two samples of every source a block, so that no rounding can make a quota negative.
        self.block = max(MIN_BLOCK, math.ceil(2 / min(shares)))
        self._key = seed_key(~seed)  # not that of any order
        self._upper_shares = list(accumulate(shares))

    def rows(self, step: int, batch_size: int) -> np.ndarray:
        """Row numbers of the global batch of `step`: int64 [batch_size]."""
        sources, samples = self.sources_of(samples_of(step, batch_size))
        rows = np.empty_like(samples)
        for source in np.unique(sources):
            chosen = sources == source
            rows[chosen] = self.first_rows[source] + self.orders[source].rows_of(samples[chosen])
        return rows

    def sources_of(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source of each sample, and how many samples that source gave before it: two int64 arrays."""
        blocks, places = np.divmod(samples, self.block)
        keys = mix(self._key ^ blocks.astype(np.uint64))
        places = permuted(places, np.full_like(places, self.block), keys)
        sources, indices = np.empty_like(places), np.empty_like(places)
        for block in np.unique(blocks):
            chosen = blocks == block
            before = self.taken(int(block))
            edges = np.cumsum(self.taken(int(block) + 1) - before)
            source = np.searchsorted(edges, places[chosen], side="right")
            quota_begins = edges - np.diff(edges, prepend=0)
            sources[chosen] = source
            indices[chosen] = before[source] + places[chosen] - quota_begins[source]
        return sources, indices

    def taken(self, num_blocks: int) -> np.ndarray:
        """Samples of each source in the first `num_blocks` blocks: int64 [sources].

        Rounding the sums of the shares, rather than the shares, makes the whole come out exactly.
        """
        upper = [num_blocks * self.block * share // 1 for share in self._upper_shares]
        return np.diff(np.array(upper, dtype=np.int64), prepend=0)


def mixture_shares(corpus: Corpus, weights_of_run: Mapping[str, float]) -> dict[str, Fraction]:
    """Share of each source in the samples, by the run's weights, or else by the dataset's; empty if neither has any.

    Sources of weight 0 are left out.

    Raises:
        UserError: The run's weights do not name the sources, or are all 0.
    """
    if weights_of_run and weights_of_run.keys() != corpus.sources.keys():
        unknown = sorted(weights_of_run.keys() - corpus.sources.keys())
        missing = sorted(corpus.sources.keys() - weights_of_run.keys())
        problems = [f"there is no text of {', '.join(unknown)} to read"] if unknown else []
        problems += [f"no weight for {', '.join(missing)}"] if missing else []
        raise UserError(
            f"data.mixture: {'; '.join(problems)}; give each of these a weight, 0 to leave it out: "
            f"{', '.join(corpus.sources)}"
        )
    weights = weights_of_run or {
        name: weight for name in corpus.sources if (weight := corpus.manifest.sources[name].weight) is not None
    }
    exact = {name: Fraction(weights[name]) for name in corpus.sources if weights.get(name)}
    if weights and not exact:
        raise UserError("data.mixture: all weights are 0; give at least one source a positive one")
    total = sum(exact.values())
    return {name: weight / total for name, weight in exact.items()}

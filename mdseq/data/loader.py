"""Each rank's share of a step, read one step ahead of the training loop."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from mdseq.data.batch import Batch, RowPlan, StepTotals, collate
from mdseq.data.corpus import Corpus
from mdseq.data.order import RowOrder
from mdseq.data.packing import Packing
from mdseq.data.prefix import CleanPrefix


class Loader:
    """Micro-batches of one rank, as a function of the step: no state to save, any step at any time.

    Micro-batch k of rank r takes rows [(k * num_ranks + r) * micro_batch_size :][: micro_batch_size] of the
    step's global batch, so the rows of a step do not depend on how ranks and accumulation share them.
    """

    def __init__(
        self,
        corpus: Corpus,
        packing: Packing,
        order: RowOrder,
        row_length: int,
        batch_size: int,
        micro_batch_size: int,
        rank: int,
        num_ranks: int,
        prefix: CleanPrefix | None = None,
    ) -> None:
        assert batch_size % (micro_batch_size * num_ranks) == 0
        assert 0 <= rank < num_ranks
        self.corpus = corpus
        self.packing = packing
        self.order = order
        self.row_length = row_length
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.num_ranks = num_ranks
        self.prefix = prefix
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._ahead: tuple[int, Future[list[Batch]]] | None = None

    def micro_batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of `step`, in accumulation order; starts to read the next step."""
        if self._ahead is not None and self._ahead[0] == step:
            batches = self._ahead[1].result()
        else:
            batches = self._read(step)
        self._ahead = (step + 1, self._reader.submit(self._read, step + 1))
        return batches

    def close(self) -> None:
        """Stop reading ahead."""
        self._reader.shutdown(wait=True, cancel_futures=True)

    def _read(self, step: int) -> list[Batch]:
        plans = self._plan(step)
        # Counted from the plan alone, so every rank knows them without reading tokens or communicating.
        totals = StepTotals(
            rows=len(plans),
            tokens=sum(plan.num_tokens for plan in plans),
            target_tokens=sum(plan.num_tokens - sum(plan.source_lengths) for plan in plans),
            documents=sum(len(plan.pieces) for plan in plans),
            micro_batches=self.batch_size // self.micro_batch_size,
        )
        group = self.num_ranks * self.micro_batch_size
        starts = range(self.rank * self.micro_batch_size, self.batch_size, group)
        shares = [plans[start : start + self.micro_batch_size] for start in starts]
        return [collate(self.corpus, share, self.row_length, step, totals) for share in shares]

    def _plan(self, step: int) -> list[RowPlan]:
        """The rows of the global batch: their pieces, and how much of each is source."""
        rows = self.order.rows(step, self.batch_size)
        pieces = [self.packing.row(row) for row in rows.tolist()]
        shares = np.zeros((len(rows), max(map(len, pieces))))
        if self.prefix is not None:
            shares = self.prefix.shares(step, rows, shares.shape[1])
        starts = self.corpus.target_starts
        return [
            RowPlan(
                row,
                row_pieces,
                tuple(
                    min(piece.length, max(int(starts[piece.document]) - piece.start, int(share * piece.length)))
                    for piece, share in zip(row_pieces, row_shares, strict=False)
                ),
            )
            for row, row_pieces, row_shares in zip(rows.tolist(), pieces, shares.tolist(), strict=True)
        ]

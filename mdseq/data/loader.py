"""Each rank's share of a step, read one step ahead of the training loop."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from mdseq.data.batch import Batch, StepTotals, collate
from mdseq.data.corpus import Corpus
from mdseq.data.order import RowOrder
from mdseq.data.packing import Packing, target_count


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
        rows = self.order.rows(step, self.batch_size)
        totals = self._totals(rows)
        shares = rows.reshape(-1, self.num_ranks, self.micro_batch_size)[:, self.rank]
        return [collate(self.corpus, self.packing, share, self.row_length, step, totals) for share in shares]

    def _totals(self, rows: np.ndarray) -> StepTotals:
        """Counted from the plan alone, so every rank knows them without reading tokens or communicating."""
        pieces = [piece for row in rows.tolist() for piece in self.packing.row(row)]
        target_starts = self.corpus.target_starts[[piece.document for piece in pieces]].tolist()
        return StepTotals(
            rows=len(rows),
            tokens=sum(piece.stop - piece.start for piece in pieces),
            target_tokens=sum(map(target_count, pieces, target_starts)),
            documents=len(pieces),
            micro_batches=self.batch_size // self.micro_batch_size,
        )

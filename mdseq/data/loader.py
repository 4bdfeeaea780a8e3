"""Each rank's share of a step, read while the training loop is busy with the steps before."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from mdseq.data.batch import Batch, RowPlan, StepTotals, collate
from mdseq.data.clean_ends import CleanEnds
from mdseq.data.corpus import Corpus
from mdseq.data.order import Order
from mdseq.data.packing import Packing

# One step would do if reading never took longer than a step; the second one rides over a slow disk.
STEPS_AHEAD = 2


class Loader:
    """Micro-batches of one rank, as a function of the step: no state to save, any step at any time.

    Micro-batch k of rank r takes rows [(k * num_ranks + r) * micro_batch_size :][: micro_batch_size] of the
    step's global batch, so the rows of a step do not depend on how ranks and accumulation share them.

    A thread reads STEPS_AHEAD steps ahead of the one asked for, into pinned memory if `device` is a GPU. What fails in
    it is raised when that step is asked for.
    """

    def __init__(
        self,
        corpus: Corpus,
        packing: Packing,
        order: Order,
        row_length: int,
        batch_size: int,
        micro_batch_size: int,
        rank: int,
        num_ranks: int,
        clean_ends: CleanEnds | None = None,
        device: torch.device | None = None,
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
        self.clean_ends = clean_ends
        self._gpu = device if device is not None and device.type == "cuda" else None
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="loader", initializer=self._start_reader)
        self._next_step = 0
        self._ahead: deque[Future[list[Batch]]] = deque()  # of _next_step and those after it

    def micro_batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of `step`, in accumulation order; the steps after it are read meanwhile."""
        if step != self._next_step:
            for future in self._ahead:
                future.cancel()
            self._ahead.clear()
        self._next_step = step + 1
        future = self._ahead.popleft() if self._ahead else self._reader.submit(self._read, step)
        batches = future.result()
        while len(self._ahead) < STEPS_AHEAD:
            self._ahead.append(self._reader.submit(self._read, self._next_step + len(self._ahead)))
        return batches

    def close(self) -> None:
        """Stop reading ahead; waits for the step being read, if any."""
        self._reader.shutdown(wait=True, cancel_futures=True)

    def _start_reader(self) -> None:
        if self._gpu is not None:  # a thread starts out on GPU 0, and would take some of its memory to pin ours
            torch.cuda.set_device(self._gpu)

    def _read(self, step: int) -> list[Batch]:
        plan = self._plan(step)
        # Counted from the plan alone, so every rank knows them without reading tokens or communicating.
        num_tokens = int(plan.pieces.length.sum())
        totals = StepTotals(
            rows=len(plan.row_b),
            tokens=num_tokens,
            target_tokens=int((plan.target_end_p - plan.target_start_p).sum()),
            documents=len(plan.pieces),
            micro_batches=self.batch_size // self.micro_batch_size,
        )
        by_micro_batch = np.arange(self.batch_size).reshape(-1, self.num_ranks, self.micro_batch_size)
        share = plan.take(by_micro_batch[:, self.rank].flatten())
        batch = collate(self.corpus, share, self.row_length, step, totals)
        if self._gpu is not None:
            batch = batch.pin_memory()
        return batch.split(self.micro_batch_size)

    def _plan(self, step: int) -> RowPlan:
        """The rows of the global batch: their pieces, and how much of each is to be denoised."""
        rows = self.order.rows(step, self.batch_size)
        pieces = self.packing.pieces(rows)
        start = np.maximum(self.corpus.target_starts(pieces.document) - pieces.start, 0)
        end = pieces.length
        if self.clean_ends is not None:
            prefix_share, suffix_share = self.clean_ends.shares(step, rows, pieces)
            start = np.maximum(start, (prefix_share * pieces.length).astype(np.int64))
            end = pieces.length - (suffix_share * pieces.length).astype(np.int64)
        start = np.minimum(start, end)
        first_document = np.searchsorted(pieces.row, np.arange(len(rows)))
        return RowPlan(rows, first_document, pieces, start, end, pairs=self.corpus.manifest.kind == "pair")

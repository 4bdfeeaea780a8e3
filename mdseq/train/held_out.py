"""Losses that training does not learn from, and that leave no trace in what it reports or draws timesteps by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mdseq.data.batch import Batch
from mdseq.data.clean_ends import CleanEnds
from mdseq.data.corpus import Corpus
from mdseq.data.loader import Loader
from mdseq.diffusion.objective import DiffusionObjective
from mdseq.errors import UserError
from mdseq.spec import RunSpec
from mdseq.train.loop import Trainer
from mdseq.train.rows import Rows

# How far two ways to spread the same state may differ, relative to the loss.
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}


class Probe:
    """The loss of one row, the same on every rank: who restores a state must find what was found when it was saved."""

    def __init__(self, corpus: Corpus, rows: Rows, spec: RunSpec, device: torch.device) -> None:
        loader = Loader(corpus, rows.packing, rows.order, spec.data.row_length, 1, 1, 0, 1)
        self._batch: Batch = loader.micro_batches(0)[0].to(device)
        loader.close()

    def loss(self, trainer: Trainer) -> float:
        """A collective over all ranks."""
        with _without_trace(trainer.objective):
            return float(trainer.objective(self._batch))

    def check(self, trainer: Trainer, expected: float) -> None:
        """Raise UserError if the restored state computes another loss than the saved one did."""
        found = self.loss(trainer)
        if abs(found - expected) > TOLERANCE[trainer.spec.optimiser.precision] * max(abs(expected), 1.0):
            raise UserError(
                f"the restored state computes a loss of {found:.6f} where the saved one computed {expected:.6f}: this "
                "is not what was trained; continue an older checkpoint with --resume PATH, and please report this"
            )


class Validation:
    """The loss of held-out rows under noise that is the same every time."""

    def __init__(self, corpus: Corpus, spec: RunSpec, rank: int, num_ranks: int, device: torch.device) -> None:
        rows = Rows.of(corpus, spec.model_copy(update={"data": spec.data.model_copy(update={"mixture": {}})}))
        data = spec.data
        ends = CleanEnds.of(spec) if corpus.manifest.kind == "text" else None
        loader = Loader(
            corpus, rows.packing, rows.order, data.row_length, data.batch_size, data.micro_batch_size, rank, num_ranks,
            ends,
        )  # fmt: skip
        steps = -(-min(spec.report.valid_rows, rows.packing.num_rows) // data.batch_size)
        self._batches = [batch.to(device) for step in range(steps) for batch in loader.micro_batches(step)]
        loader.close()

    def loss(self, trainer: Trainer) -> float:
        """The mean over all rows; a collective over all ranks."""
        with _without_trace(trainer.objective):
            losses = [trainer.objective(batch) for batch in self._batches]
        return trainer.agreement.mean(float(torch.stack(losses).mean()))


@contextmanager
def _without_trace(objective: DiffusionObjective) -> Iterator[None]:
    tallies = [objective.timesteps.tally, objective.statistics.tally]
    if objective.balance is not None:
        tallies.append(objective.balance.tally)
    held = [tally.clone() for tally in tallies]
    with torch.no_grad():
        yield
    for tally, before in zip(tallies, held, strict=True):
        tally.copy_(before)

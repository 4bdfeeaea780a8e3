"""Quality against the number of denoiser calls, on a task with a known answer (tests/e2e/dictionary_task.py).

python -m benchmarks.sampling
"""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table

from mdseq.generate.sampler import SamplerOptions
from tests.e2e.dictionary_task import accuracy, learned_objective

CALLS = (1, 3, 10, 20, 50)


def main() -> None:
    torch.set_num_threads(1)  # tensors are tiny, and the order of sums is part of the result
    objective = learned_objective()
    table = Table("sampler", *(f"{calls} calls" for calls in CALLS), title="exact tokens on held-out sources")
    for column in table.columns[1:]:
        column.justify = "right"
    for solver in ("dpm", "ddpm"):
        scores = [accuracy(objective, options=SamplerOptions(calls, solver)) for calls in CALLS]
        table.add_row(solver, *(f"{score:.1%}" for score in scores))
    scores = [accuracy(objective, calls, m_z=torch.zeros(32)) for calls in CALLS]
    table.add_row("dpm, no shift m", *(f"{score:.1%}" for score in scores))
    Console().print(table)


if __name__ == "__main__":
    main()

"""Quality against the number of denoiser calls, for every solver, and what the sampler's options are worth.

python -m benchmarks.sampling                               a task with a known answer (tests/e2e/dictionary_task.py)
python -m benchmarks.sampling --run RUN --data DATASET      a trained model of pairs: BLEU on held-out ones
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.plain_training import PairTask
from mdseq.cli.weights import load_run
from mdseq.diffusion.denoising import DiffusionModel
from mdseq.diffusion.solvers import SOLVERS
from mdseq.generate.sampler import SamplerOptions
from tests.e2e.dictionary_task import accuracy, learned_objective

CALLS = (2, 5, 10, 20, 50, 200)
TABLES = ("solvers", "options", "exit", "long")


class Score(NamedTuple):
    """Quality, and denoiser calls made for a text on average."""

    quality: float
    calls: float


Scorer = Callable[[DiffusionModel, SamplerOptions], Score]


def solver_table(score: Scorer, model: DiffusionModel, base: SamplerOptions, calls: Sequence[int], unit: str) -> Table:
    """Each solver at each number of calls."""
    table = Table("solver", *(f"{count} calls" for count in calls), title=f"{unit}, by solver")
    for solver in SOLVERS:
        scores = [score(model, replace(base, num_calls=count, solver=solver)) for count in calls]
        table.add_row(solver, *(f"{found.quality:.2f}" for found in scores))
    return _right(table)


def option_table(score: Scorer, model: DiffusionModel, base: SamplerOptions, calls: Sequence[int], unit: str) -> Table:
    """The default solver with one option changed."""
    changes: dict[str, tuple[DiffusionModel, SamplerOptions]] = {
        "default": (model, base),
        "quadratic grid": (model, replace(base, time_grid="quadratic")),
        "log-SNR grid": (model, replace(base, time_grid="log_snr")),
        "clamp": (model, replace(base, clamp=True)),
        "threshold 0.995": (model, replace(base, threshold=0.995)),
        **{f"temperature {t:g}": (model, replace(base, temperature=t)) for t in (1.0, 0.7, 0.4, 0.0)},
        "absorb": (model, replace(base, absorb=True)),
        "ddpm, absorb": (model, replace(base, solver="ddpm", absorb=True)),
        "no shift m": (replace(model, m_z=torch.zeros_like(model.m_z)), base),
    }
    table = Table("dpm_2m", *(f"{count} calls" for count in calls), title=f"{unit}, by option")
    for name, (changed, options) in changes.items():
        scores = [score(changed, replace(options, num_calls=count)) for count in calls]
        table.add_row(name, *(f"{found.quality:.2f}" for found in scores))
    return _right(table)


def exit_table(score: Scorer, model: DiffusionModel, base: SamplerOptions, unit: str) -> Table:
    """Rows that stop when their tokens have stayed the same for some calls, and are sure enough."""
    table = Table("calls asked for", "patience", "confidence", "calls made", "saved", unit, title="early exit")
    for count in (20, 50):
        for patience, confidence in ((0, 0.0), (1, 0.0), (3, 0.0), (1, 0.9), (1, 0.99)):
            found = score(model, replace(base, num_calls=count, patience=patience, confidence=confidence))
            saved = f"{1 - found.calls / count:.0%}"
            table.add_row(
                f"{count}", f"{patience}", f"{confidence:g}", f"{found.calls:.1f}", saved, f"{found.quality:.2f}"
            )
    return _right(table)


def long_table(score: Scorer, model: DiffusionModel, base: SamplerOptions, long: int, unit: str) -> Table:
    """The default with few calls and with many, beside DDPM with a great many."""
    tries = {
        "dpm_2m": replace(base, num_calls=10),
        "dpm_2m ": replace(base, num_calls=200),
        "ddpm": replace(base, num_calls=long, solver="ddpm"),
        "ddpm, clamped": replace(base, num_calls=long, solver="ddpm", clamp=True),
    }
    table = Table("solver", "calls", unit, title="few calls and many")
    for name, options in tries.items():
        table.add_row(name.strip(), f"{options.num_calls:,}", f"{score(model, options).quality:.2f}")
    return _right(table)


def _right(table: Table) -> Table:
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="run folder of a model of pairs")
    parser.add_argument("--data", type=Path, help="its dataset")
    parser.add_argument("--split", default="test")
    parser.add_argument("--pairs", type=int, default=256, help="held-out pairs, spread over the split")
    parser.add_argument("--calls", type=int, nargs="+", default=CALLS, help=f"denoiser calls; default {CALLS}")
    parser.add_argument("--temperature", type=float, default=1.0, help="of all samples but those that vary it")
    parser.add_argument("--long", type=int, default=2000, metavar="N", help="calls of the longest; default 2000")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES[:3], help="default: all but long")
    options = parser.parse_args()
    console = Console(width=110)
    score: Scorer
    if options.run is None:
        torch.set_num_threads(1)  # tensors are tiny, and the order of sums is part of the result
        objective = learned_objective()
        model, unit = objective.model(), "% exact tokens"

        def score(model: DiffusionModel, options: SamplerOptions) -> Score:
            found = accuracy(objective, options=options, model=model)
            return Score(100 * found.share, found.calls)
    else:
        model, unit = DiffusionModel.of(load_run(options.run)), "BLEU"
        task = PairTask(options.data, options.split, options.pairs, model.m_z.device)

        def score(model: DiffusionModel, options: SamplerOptions) -> Score:
            return Score(*task.bleu(model, options))

    base = SamplerOptions(temperature=options.temperature)
    tables = {
        "solvers": lambda: solver_table(score, model, base, options.calls, unit),
        "options": lambda: option_table(score, model, base, (5, 10, 20), unit),
        "exit": lambda: exit_table(score, model, base, unit),
        "long": lambda: long_table(score, model, base, options.long, unit),
    }
    for name in options.tables:
        console.print(tables[name]())


if __name__ == "__main__":
    main()

"""`mdseq report RUN`: a run in a table and a picture."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mdseq.errors import UserError


def add_command(commands: Any) -> None:
    command = commands.add_parser("report", help="summary of a run and a PNG of its curves")
    command.set_defaults(command=report)
    command.add_argument("run", type=Path, metavar="RUN")


def report(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from mdseq.report.metrics import read_metrics
    from mdseq.report.plots import plot_run

    metrics = read_metrics(options.run)
    if not metrics:
        raise UserError(f"{options.run} has no metrics; give the folder of a run that has logged a step")
    first, last = metrics[0], metrics[-1]
    png = options.run / "report.png"
    plot_run(metrics, str(options.run), png)
    table = Table(title=str(options.run), show_header=False, title_justify="left")
    table.add_row("steps", f"{last['step']:,}")
    table.add_row("tokens", f"{last['tokens']:,}")
    table.add_row("loss", f"{first['loss']:.4f} at step {first['step']:,}, {last['loss']:.4f} at the end")
    rates = [line["tokens_per_second"] for line in metrics if line["tokens_per_second"]]
    if rates:
        table.add_row("tokens per second", f"{sorted(rates)[len(rates) // 2]:,.0f} (median)")
    if last["expert_load"]:
        busiest = max(max(load_e) * len(load_e) for load_e in last["expert_load"])
        table.add_row("busiest expert", f"{busiest:.2f} times an even share")
    table.add_row("curves", str(png))
    Console().print(table)

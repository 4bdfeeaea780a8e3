"""`mdseq status RUN`: is it alive, how far is it, when will it be done."""

from __future__ import annotations

import argparse
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from mdseq.errors import UserError
from mdseq.report.status import RunStatus


def add_command(commands: Any) -> None:
    command = commands.add_parser(
        "status", help="whether a run is alive, its step, rate, time left and last checkpoint"
    )
    command.set_defaults(command=status)
    command.add_argument("run", type=Path, metavar="RUN", help="run folder, on this machine or a shared disk")


def status(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    found = RunStatus.read(options.run) if options.run.is_dir() else None
    if found is None:
        raise UserError(f"{options.run} holds no run that has begun to train; give the --output of one that has")
    table = Table(title=str(options.run), show_header=False, title_justify="left")
    for name, text in describe(options.run, found, time.time()):
        table.add_row(name, text)
    Console().print(table)


def describe(run: Path, found: RunStatus, now: float) -> list[tuple[str, str]]:
    """What there is to say of a run, in rows of two columns."""
    from mdseq.engine.checkpoint import whole_checkpoints
    from mdseq.report.metrics import read_metrics

    where = f"process {found.process} on {found.host}" + (f", Slurm job {found.job}" if found.job else "")
    silent = found.is_silent(now)
    state = f"no sign of life for {_since(now, found.written)}: killed, or cut off" if silent else found.state
    rows = [
        ("state", state),
        ("where", where),
        ("started", f"{datetime.fromtimestamp(found.started):%Y-%m-%d %H:%M:%S}, start {found.starts}"),
        ("step", f"{found.step:,} of {found.steps:,} ({found.step / found.steps:.1%})"),
    ]
    metrics = read_metrics(run)
    if metrics:
        last = metrics[-1]
        held_out = next((line for line in reversed(metrics) if "valid_loss" in line), None)
        valid = f", held-out {held_out['valid_loss']:.4f} at step {held_out['step']:,}" if held_out else ""
        rows.append(("loss", f"{last['loss']:.4f} at step {last['step']:,}{valid}"))
    if found.state == "running" and found.steps_per_second:
        tokens = f", {metrics[-1]['tokens_per_second']:,.0f} tokens/s" if metrics else ""
        rows.append(("rate", f"{found.steps_per_second:.3g} steps/s{tokens}"))
        if not silent:
            rows.append(("left", _duration((found.steps - found.step) / found.steps_per_second)))
    checkpoints = whole_checkpoints(run / "checkpoints")
    if checkpoints:
        path, manifest = checkpoints[-1]
        rows.append(("checkpoint", f"step {manifest.step:,}, {_since(now, path.stat().st_mtime)} ago"))
    else:
        rows.append(("checkpoint", "none yet"))
    if found.spread is not None:
        rows.append(("slowest", str(found.spread)))
    heard = len(found.ranks) - len(found.silent_ranks())
    rows.append(("ranks", f"{heard} of {len(found.ranks)} heard"))
    for rank in found.silent_ranks():
        host = f" on {rank.host}" if rank.host else ", never heard"
        rows.append(("", f"rank {rank.rank}{host}: silent for {_duration(rank.silent_seconds)}, at step {rank.step:,}"))
    return rows


def _since(now: float, then: float) -> str:
    return _duration(max(0.0, now - then))


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))

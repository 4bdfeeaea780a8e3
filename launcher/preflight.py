"""Check all ranks before training: `deepspeed [launcher options] launcher/preflight.py [--data DIR] [--output DIR]`.

Measures, on every rank at once, matrix products, free memory and the disk of the run folder; then communication, link
by link too. Compares versions, clocks and what the nodes see of dataset and run folder. Whoever lags behind the others
or differs from them is named. Once the ranks have started, this takes a few seconds on healthy nodes.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

# As a script, python puts launcher/ on the path; the packages stand beside it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launcher.figures import FIGURES, RankReport
from launcher.run import (
    EXIT_PREFLIGHT_FAILED,
    EXIT_USER_ERROR,
    add_place_options,
    leave,
    run_folder,
    tell_mistake,
    tell_separated,
)
from launcher.verdicts import Finding, judge, median_of, passes
from mdseq.errors import Separated, UserError
from mdseq.spec import load_spec

if TYPE_CHECKING:
    from rich.table import Table


def main(arguments: Sequence[str]) -> int:
    options = _parse(arguments)
    rank = int(os.environ.get("RANK", "0"))
    try:
        data = load_spec(options.spec, [] if options.data is None else [f"data.path={options.data}"]).spec.data.path
        minima = read_minima(options.minimum)
        passed = preflight(data, run_folder(options.output, options.spec), minima, options.json)
    except UserError as error:
        return tell_mistake(error, rank)
    except Separated as error:
        return tell_separated(error, rank)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    if not passed:
        return EXIT_PREFLIGHT_FAILED

    from mdseq.engine.build import stop_processes

    stop_processes()
    return 0


def preflight(data: str, output: Path, minima: Mapping[str, float], json_file: Path | None = None) -> bool:
    """Join the process group, check, and print a table on rank 0. Those who have passed stay in the group.

    Args:
        data: The dataset's folder; empty for none.
        output: The run folder.
        minima: The least that figures may be, by name.
        json_file: Where rank 0 writes all that was measured.

    Returns:
        Whether it has passed, the same on every rank.

    Raises:
        UserError: `json_file` exists, or cannot be written; on every rank.
    """
    from launcher.measures import measure
    from mdseq.engine.agreement import Agreement
    from mdseq.engine.build import start_processes, stop_processes

    device, passed = start_processes(), False
    try:
        agreement = Agreement()
        agreement.fail_together(_why_not(json_file) if json_file is not None and agreement.rank == 0 else None)
        start = time.monotonic()
        reports = measure(device, Path(data) if data else None, output)
        findings = judge(reports, minima)
        error = None
        if agreement.rank == 0:
            show(reports, findings, time.monotonic() - start)
            if json_file is not None:
                error = _write(json_file, reports, findings)
        agreement.fail_together(error)
        passed = passes(findings)
    finally:
        if not passed:
            stop_processes()
    return passed


def read_minima(given: Sequence[str]) -> dict[str, float]:
    """From `name=value`, by name.

    Raises:
        UserError: There is no such figure, or no such number.
    """
    minima = {}
    names = [figure.name for figure in FIGURES]
    for text in given:
        name, _, value = text.partition("=")
        try:
            minima[name] = float(value)
        except ValueError:
            raise UserError(f"--minimum {text}: give NAME=NUMBER, such as {names[0]}=300") from None
        if name not in names:
            raise UserError(f"--minimum {text}: there is no figure {name}; allowed: {', '.join(names)}")
    return minima


def show(reports: Sequence[RankReport], findings: Sequence[Finding], seconds: float) -> None:
    """Print the table, what was measured together, what is the same everywhere, what is wrong, and the verdict.

    Args:
        reports: Of all ranks.
        findings: What is wrong.
        seconds: How long it took.
    """
    from rich.console import Console

    # A log has no width; people read it in wide windows.
    console = Console(width=None if Console().is_terminal or "COLUMNS" in os.environ else 110, highlight=False)
    console.print(table_of(reports, findings, padding=1 if console.width >= 100 else 0))
    for line in [*summary(reports), f"checked in {seconds:.1f} s"]:
        console.print(line, markup=False)
    for finding in sorted(findings, key=lambda finding: finding.fails):
        kind, style = ("failed", "bold red") if finding.fails else ("warning", "yellow")
        console.print(f"{kind}: {finding.text}", style=style, markup=False)
    failed = dict.fromkeys(finding.check for finding in findings if finding.fails)
    if failed:
        console.print(f"preflight failed: {', '.join(failed)}", style="bold red", markup=False)
    else:
        console.print("preflight passed", style="bold green")


def table_of(reports: Sequence[RankReport], findings: Sequence[Finding], padding: int) -> Table:
    """A row a rank, the medians below; what is wrong has a star. Without padding, the longest fits in 80 columns."""
    from rich import box
    from rich.table import Table

    devices = sorted({report.device for report in reports})
    nodes = {report.node for report in reports}
    title = f"{_count(len(reports), 'rank')} on {_count(len(nodes), 'node')}"
    if len(devices) == 1:
        title += f", {devices[0]}"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE, show_footer=True)
    table.padding = (0, padding)
    table.add_column("rank", justify="right")
    table.add_column("node", "median", overflow="fold", min_width=len("median"))
    if len(devices) > 1:
        table.add_column("device", overflow="fold")
    shown = {figure: middle for figure in FIGURES if not figure.of_all and (middle := median_of(figure, reports))}
    marked = {(rank, finding.figure): finding for finding in findings for rank in finding.ranks}
    starred = {finding.figure for finding in findings}
    for figure, middle in shown.items():
        footer = figure.text(middle) + " " * (figure.name in starred)
        table.add_column(figure.heading, footer, justify="right", no_wrap=True)
    for report in reports:
        cells = [str(report.rank), report.node, *([report.device] if len(devices) > 1 else [])]
        for figure in shown:
            value = report.figures.get(figure.name)
            text = "-" if value is None else figure.text(value)
            finding = marked.get((report.rank, figure.name))
            if finding is not None:
                text = f"[{'bold red' if finding.fails else 'yellow'}]{text}*[/]"
            elif figure.name in starred:
                text += " "  # digits stand below each other
            cells.append(text)
        table.add_row(*cells)
    return table


def summary(reports: Sequence[RankReport]) -> list[str]:
    """What has no column: collectives, by their slowest rank, clocks, and what is the same everywhere."""
    lines = []
    slowest = {
        figure.name: min(report.figures[figure.name] for report in reports)
        for figure in FIGURES
        if figure.of_all and all(figure.name in report.figures for report in reports)
    }
    if "all_reduce_gb_per_second" in slowest:
        lines.append(
            f"all-reduce: {slowest['all_reduce_gb_per_second']:.3g} GB/s (bus bandwidth of a ring), "
            f"{1e6 / slowest['all_reduces_per_second']:,.0f} µs for one number"
        )
    if "all_to_all_gb_per_second" in slowest:
        lines.append(f"all-to-all: {slowest['all_to_all_gb_per_second']:.3g} GB/s")
    if len({report.node for report in reports}) > 1:
        skews = [report.clock_skew_seconds for report in reports]
        lines.append(f"clocks: within {max(skews) - min(skews):.3f} s of each other")
    names = dict.fromkeys(name for report in reports for name in report.facts)
    values = {name: {report.facts.get(name, "unknown") for report in reports} for name in names}
    same = [f"{name} {found.pop()}" for name, found in values.items() if len(found) == 1 and found != {"none"}]
    return [*lines, f"on every rank: {', '.join(same)}"]


def _count(number: int, name: str) -> str:
    return f"{number} {name}" + ("s" if number > 1 else "")


def _why_not(file: Path) -> str | None:
    """What keeps the figures from being written there."""
    if file.exists():
        return f"--json {file} exists already, and is not overwritten; name another file, or remove it"
    if not os.access(file.absolute().parent, os.W_OK):
        return f"--json {file}: there is no folder {file.parent} to write in; make it, or name another file"
    return None


def _write(file: Path, reports: Sequence[RankReport], findings: Sequence[Finding]) -> str | None:
    content = {
        "passed": passes(findings),
        "ranks": [asdict(report) for report in reports],
        "findings": [asdict(finding) for finding in findings],
    }
    try:
        with file.open("x", encoding="utf-8") as stream:
            stream.write(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        return f"--json {file} cannot be written: {error.strerror}; name another file"
    return None


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launcher/preflight.py",
        description="\n".join(__doc__.splitlines()[2:]),
        epilog=f"Exit status: 0 passed, {EXIT_PREFLIGHT_FAILED} failed, {EXIT_USER_ERROR} a mistake in the command.",
    )
    add_place_options(parser)
    parser.add_argument(
        "--minimum",
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help=f"fail if a figure is less on any rank; may be repeated; {', '.join(figure.name for figure in FIGURES)}",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there; it must not exist")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher's; we read LOCAL_RANK
    return parser.parse_args(arguments)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))

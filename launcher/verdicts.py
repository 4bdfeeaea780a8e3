"""What is wrong with what the ranks have measured; in words, and without measuring anything."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from launcher.figures import FIGURES, SHARED_MEMORY, Figure, RankReport
from launcher.links import links_of

LARGEST_CLOCK_SKEW_SECONDS = 1.0
# What NCCL asks for in containers, whose default is 64 MiB; data loaders and DeepSpeed want theirs besides.
ENOUGH_SHARED_MEMORY_GIB = 1.0


@dataclass(frozen=True)
class Finding:
    """Something wrong.

    Attributes:
        check: Which check has found it.
        text: A sentence that says who and what.
        fails: Whether preflight fails for it, or only warns.
        ranks, figure: Where it stands in the table, if it does.
    """

    check: str
    text: str
    fails: bool = True
    ranks: tuple[int, ...] = ()
    figure: str | None = None


def judge(reports: Sequence[RankReport], minima: Mapping[str, float]) -> list[Finding]:
    """All that is wrong.

    Args:
        reports: Of all ranks, in order.
        minima: The least that figures may be, by name.
    """
    return [
        *_errors(reports),
        *(finding for figure in FIGURES for finding in _outliers(figure, reports)),
        *(
            finding
            for figure in FIGURES
            if figure.name in minima
            for finding in _below_minimum(figure, reports, minima[figure.name])
        ),
        *_shared_memory(reports),
        *_clocks(reports),
        *_different_facts(reports),
        *_different_variables(reports),
    ]


def passes(findings: Iterable[Finding]) -> bool:
    """Whether there are none but warnings."""
    return not any(finding.fails for finding in findings)


def median_of(figure: Figure, reports: Sequence[RankReport]) -> float | None:
    """Over the ranks that have it; None if none has."""
    values = [report.figures[figure.name] for report in reports if figure.name in report.figures]
    return median(values) if values else None


def who(reports: Sequence[RankReport]) -> str:
    """These ranks and their nodes: "ranks 0-3 on n1, rank 4 on n2"."""
    ranks_on: dict[str, list[int]] = {}
    for report in reports:
        ranks_on.setdefault(report.node, []).append(report.rank)
    return ", ".join(
        f"{'ranks' if len(ranks) > 1 else 'rank'} {_ranges(ranks)} on {node}" for node, ranks in ranks_on.items()
    )


def _ranges(ranks: Sequence[int]) -> str:
    """Ascending numbers, runs of them in short: "0-3, 6"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _errors(reports: Sequence[RankReport]) -> Iterator[Finding]:
    for check in dict.fromkeys(check for report in reports for check in report.errors):
        failed = [report for report in reports if check in report.errors]
        for message, having in _grouped(failed, [report.errors[check] for report in failed]).items():
            yield Finding(check, f"{who(having)}: {message}")


def _below_minimum(figure: Figure, reports: Sequence[RankReport], minimum: float) -> Iterator[Finding]:
    measured = [report for report in reports if figure.name in report.figures]
    below = [report for report in measured if report.figures[figure.name] < minimum]
    wanted = f"the minimum of {figure.text(minimum)} {figure.unit}"
    if not measured:
        yield Finding(figure.meaning, f"{figure.meaning}: nothing was measured to compare with {wanted}")
    elif below:
        lowest = figure.text(min(report.figures[figure.name] for report in below))
        text = f"{who(below)}: {figure.meaning} below {wanted}, the lowest {lowest}"
        yield Finding(figure.meaning, text, True, tuple(report.rank for report in below), figure.name)


def _outliers(figure: Figure, reports: Sequence[RankReport]) -> Iterator[Finding]:
    middle = median_of(figure, reports)
    links = links_of([report.node for report in reports])
    peers = {link.rank: reports[link.peer] for link in links if link.figure == figure.name}
    for report in reports:
        value = report.figures.get(figure.name)
        if middle is None or value is None or value >= figure.lowest_share * middle:
            continue
        to = f" to {who([peers[report.rank]])}" if peers else ""
        text = (
            f"{who([report])}: {figure.meaning}{to} at {value / middle:.2f} of the median "
            f"({figure.text(value)} of {figure.text(middle)} {figure.unit})"
        )
        yield Finding(figure.meaning, text, figure.outlier_fails, (report.rank,), figure.name)


def _shared_memory(reports: Sequence[RankReport]) -> Iterator[Finding]:
    small = [report for report in reports if report.figures.get(SHARED_MEMORY, math.inf) < ENOUGH_SHARED_MEMORY_GIB]
    if small:
        text = (
            f"{who(small)}: less than {ENOUGH_SHARED_MEMORY_GIB:g} GiB of /dev/shm is free, which communication within "
            "a node and data loaders use; containers take --shm-size"
        )
        yield Finding("shared memory", text, False, tuple(report.rank for report in small), SHARED_MEMORY)


def _clocks(reports: Sequence[RankReport]) -> Iterator[Finding]:
    for node, on_node in _grouped(reports, [report.node for report in reports]).items():
        skew = max((report.clock_skew_seconds for report in on_node), key=abs)
        if abs(skew) > LARGEST_CLOCK_SKEW_SECONDS:
            where = f"{'ahead of' if skew > 0 else 'behind'} that of {reports[0].node}"
            yield Finding("clocks", f"{node}: its clock is {abs(skew):.1f} s {where}; synchronise the nodes' clocks")


def _different_facts(reports: Sequence[RankReport]) -> Iterator[Finding]:
    for name in dict.fromkeys(name for report in reports for name in report.facts):
        knowing = [report for report in reports if name in report.facts]
        values = _grouped(knowing, [report.facts[name] for report in knowing])
        if len(values) > 1:
            yield Finding(name, f"{name} differs: {_who_has_what(values)}")


def _different_variables(reports: Sequence[RankReport]) -> Iterator[Finding]:
    for name in sorted({name for report in reports for name in report.variables}):
        values = _grouped(reports, [report.variables.get(name, "(unset)") for report in reports])
        if len(values) > 1:
            yield Finding("environment", f"{name} differs: {_who_has_what(values)}", fails=False)


def _who_has_what(values: Mapping[str, Sequence[RankReport]]) -> str:
    return "; ".join(f"{value} on {who(having)}" for value, having in values.items())


def _grouped(reports: Sequence[RankReport], keys: Sequence[str]) -> dict[str, list[RankReport]]:
    """Reports by their keys."""
    groups: dict[str, list[RankReport]] = {}
    for report, key in zip(reports, keys, strict=True):
        groups.setdefault(key, []).append(report)
    return groups

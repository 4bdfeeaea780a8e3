"""What preflight makes of figures: who lags behind, who differs, and how it is told."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from launcher.figures import FIGURES, LINK_BETWEEN_NODES, LINK_WITHIN_NODE, RankReport
from launcher.links import links_of
from launcher.preflight import main, show, summary, table_of
from launcher.verdicts import judge, passes, who

RATE = "matrix_products_tflops"


def healthy(*nodes: str, **figures: float) -> list[RankReport]:
    """A rank on each of the nodes, all of the same kind."""
    values = {figure.name: 100.0 for figure in FIGURES} | figures
    return [
        RankReport(
            rank, node, "GPU", dict(values), {"torch": "2.13", "dataset": "abc"}, {"NCCL_DEBUG": "WARN"}, 0.0, {}
        )
        for rank, node in enumerate(nodes)
    ]


def changed(reports: list[RankReport], rank: int, **figures: float) -> list[RankReport]:
    """One rank with other figures."""
    other = replace(reports[rank], figures=reports[rank].figures | figures)
    return [*reports[:rank], other, *reports[rank + 1 :]]


def texts(reports: list[RankReport], **minima: float) -> list[str]:
    return [finding.text for finding in judge(reports, minima)]


FOUR = healthy("n1", "n1", "n2", "n2")


def test_equal_ranks_are_healthy():
    assert judge(FOUR, {}) == []
    assert judge(healthy("n1"), {}) == []


def test_a_slow_rank_is_named():
    reports = changed(FOUR, 3, **{RATE: 41.0})
    (finding,) = judge(reports, {})
    assert finding.text == "rank 3 on n2: matrix products at 0.41 of the median (41.0 of 100 TFLOP/s)"
    assert (finding.fails, finding.ranks, finding.figure) == (True, (3,), RATE)


def test_a_little_slower_is_not_slow():
    assert judge(changed(FOUR, 3, **{RATE: 71.0}), {}) == []
    assert judge(changed(FOUR, 3, **{RATE: 69.0}), {}) != []


@pytest.mark.parametrize(
    "figure", [figure for figure in FIGURES if figure.lowest_share], ids=lambda figure: figure.name
)
def test_every_outlier_fails_or_warns_as_its_figure_says(figure):
    (finding,) = judge(changed(FOUR, 1, **{figure.name: 100 * figure.lowest_share - 1}), {})
    assert finding.text.startswith("rank 1 on n1: ")
    assert finding.fails == figure.outlier_fails
    assert passes([finding]) != figure.outlier_fails


@given(st.lists(st.floats(0.5, 1e4), min_size=1, max_size=9), st.floats(1e-3, 1e3))
def test_verdicts_depend_on_ratios_alone_and_the_fastest_is_never_an_outlier(rates, factor):
    def outliers(scale: float) -> set[int]:
        reports = healthy(*["n"] * len(rates))
        for rank, rate in enumerate(rates):
            reports = changed(reports, rank, **{RATE: rate * scale})
        return {rank for finding in judge(reports, {}) for rank in finding.ranks}

    assert outliers(1.0) == outliers(2.0**10)
    assert rates.index(max(rates)) not in outliers(factor)


def test_a_slow_link_is_named_with_both_ends_and_compared_with_its_like():
    links_out = {LINK_BETWEEN_NODES: 2.0}  # slower by nature than those within a node
    reports = changed(healthy("n1", "n1", "n2", "n2", "n3", "n3", **links_out), 3, **{LINK_BETWEEN_NODES: 0.5})
    assert texts(reports) == [
        "rank 3 on n2: link between nodes to rank 5 on n3 at 0.25 of the median (0.500 of 2.00 GB/s)"
    ]


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=12))
def test_links_leave_no_neighbour_out_and_no_rank_is_in_two_at_once(nodes):
    links = links_of(nodes)
    for link in links:
        assert link.rank != link.peer
        assert (nodes[link.rank] == nodes[link.peer]) == (link.figure == LINK_WITHIN_NODE)
    for turn in {link.turn for link in links}:
        ends = [end for link in links if link.turn == turn for end in (link.rank, link.peer)]
        assert len(ends) == len(set(ends))
    within = {link.rank for link in links if link.figure == LINK_WITHIN_NODE}
    assert within == {rank for rank, node in enumerate(nodes) if nodes.count(node) > 1}
    first_of_nodes = {nodes.index(node) for node in nodes}
    between = {link.rank for link in links if link.figure == LINK_BETWEEN_NODES}
    assert len(first_of_nodes) == 1 or first_of_nodes <= between
    assert len({(link.rank, link.figure) for link in links}) == len(links)


def test_minima():
    assert texts(FOUR, **{RATE: 100.0}) == []
    reports = changed(FOUR, 2, **{RATE: 90.0})
    assert texts(reports, **{RATE: 95.0}) == [
        "rank 2 on n2: matrix products below the minimum of 95.0 TFLOP/s, the lowest 90.0"
    ]
    assert texts(FOUR, all_to_all_gb_per_second=200.0) == [
        "ranks 0-1 on n1, ranks 2-3 on n2: all-to-all below the minimum of 200 GB/s, the lowest 100"
    ]


def test_a_minimum_of_what_cannot_be_measured_fails():
    (report,) = healthy("n1")
    without = replace(report, figures={})
    assert texts([without], **{RATE: 1.0}) == [
        "matrix products: nothing was measured to compare with the minimum of 1.00 TFLOP/s"
    ]


def test_an_error_is_told_once_for_all_who_have_it():
    missing = {"dataset": "no dataset folder data/mine"}
    reports = [*FOUR[:2], *(replace(report, errors=missing, facts={"torch": "2.13"}) for report in FOUR[2:])]
    assert texts(reports) == ["ranks 2-3 on n2: no dataset folder data/mine"]
    assert not passes(judge(reports, {}))


def test_what_differs_is_told_with_who_has_what():
    reports = [*FOUR[:3], replace(FOUR[3], facts={"torch": "2.11", "dataset": "abc"})]
    (finding,) = judge(reports, {})
    assert finding.text == "torch differs: 2.13 on ranks 0-1 on n1, rank 2 on n2; 2.11 on rank 3 on n2"
    assert finding.fails


def test_variables_that_differ_are_a_warning():
    reports = [*FOUR[:2], *(replace(report, variables={}) for report in FOUR[2:])]
    (finding,) = judge(reports, {})
    assert finding.text == "NCCL_DEBUG differs: WARN on ranks 0-1 on n1; (unset) on ranks 2-3 on n2"
    assert not finding.fails


@pytest.mark.parametrize(("skew", "words"), [(1.5, "1.5 s ahead of"), (-90.0, "90.0 s behind")])
def test_a_clock_that_is_wrong_is_told_once_a_node(skew, words):
    reports = [*FOUR[:2], *(replace(report, clock_skew_seconds=skew) for report in FOUR[2:])]
    assert texts(reports) == [f"n2: its clock is {words} that of n1; synchronise the nodes' clocks"]
    assert texts([*FOUR[:3], replace(FOUR[3], clock_skew_seconds=0.9)]) == []


def test_little_shared_memory_is_a_warning_even_where_all_have_little():
    reports = healthy("n1", "n1", shared_memory_gib=0.0625)
    (finding,) = judge(reports, {})
    assert finding.text.startswith("ranks 0-1 on n1: less than 1 GiB of /dev/shm is free")
    assert not finding.fails


def test_who_shortens_runs_of_ranks():
    reports = healthy(*["n1"] * 8)
    assert who([reports[rank] for rank in (0, 1, 2, 5, 7)]) == "ranks 0-2, 5, 7 on n1"


# The table


def printed(reports: list[RankReport], width: int) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(table_of(reports, judge(reports, {}), padding=0))
    return console.file.getvalue()


def test_the_widest_table_fits_a_narrow_terminal_and_stars_what_is_wrong():
    large = {figure.name: 123456.0 for figure in FIGURES if "mb_per" in figure.name}
    reports = changed(healthy("node-1", "node-1", "node-2", "node-2", **large), 3, **{RATE: 41.0})
    table = printed(reports, width=80)
    rows = [line.split() for line in table.splitlines()]
    assert rows[0] == "4 ranks on 2 nodes, GPU".split()  # noqa: SIM905
    assert ["0", "node-1", "100", "100", "100", "100", *["123,456"] * 2, *["100"] * 3] in rows
    assert ["3", "node-2", "41.0*", "100", "100", "100", *["123,456"] * 2, *["100"] * 3] in rows
    assert ["median", "100", "100", "100", "100", *["123,456"] * 2, *["100"] * 3] in rows
    assert table.count("*") == 1


def test_devices_have_a_column_only_where_they_differ_and_absent_figures_none():
    reports = [replace(FOUR[0], figures={RATE: 1.0}), replace(FOUR[1], figures={RATE: 1.0}, device="other GPU")]
    table = printed(reports, width=80)
    assert re.search(r"0 n1 +GPU +1\.00\n", table.replace(" \n", "\n"))
    assert re.search(r"1 n1 +other GPU +1\.00", table)
    assert "GiB" not in table
    assert "device" not in printed([replace(report, figures={}) for report in FOUR], width=80)


def test_summary_tells_the_slowest_rank_and_what_all_agree_on():
    reports = changed(FOUR, 2, all_reduce_gb_per_second=7.0, all_reduces_per_second=10.0)
    reports[3] = replace(reports[3], clock_skew_seconds=0.25, facts={"torch": "2.11", "dataset": "abc"})
    assert summary(reports) == [
        "all-reduce: 7 GB/s (bus bandwidth of a ring), 100,000 µs for one number",
        "all-to-all: 100 GB/s",
        "clocks: within 0.250 s of each other",
        "on every rank: dataset abc",
    ]


@pytest.mark.parametrize(
    ("reports", "last"),
    [(FOUR, "preflight passed"), (changed(FOUR, 3, **{RATE: 1.0}), "preflight failed: matrix products")],
)
def test_the_verdict_is_the_last_line(reports, last, capsys):
    show(reports, judge(reports, {}), seconds=1.0)
    assert capsys.readouterr().out.splitlines()[-1] == last


# The command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minimum", "matmul=3"], "there is no figure matmul; allowed: matrix_products_tflops, "),
        (["--minimum", f"{RATE}=fast"], f"give NAME=NUMBER, such as {RATE}=300"),
        (["--spec", "nothing"], "no spec at nothing"),
    ],
)
def test_mistakes_are_refused_before_anything_is_started(arguments, message, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert main(arguments) == 2
    refusal = capsys.readouterr().err
    assert refusal.startswith("error: ")
    assert message in refusal


def test_one_process_needs_no_launcher(tmp_path):
    command = [sys.executable, Path(__file__).parents[2] / "launcher" / "preflight.py", "--output", "runs/mine"]
    environment = {name: value for name, value in os.environ.items() if name != "RANK"} | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("1 rank on 1 node, ")
    assert done.stdout.splitlines()[-1] == "preflight passed"
    assert list(tmp_path.iterdir()) == []

"""Preflight on real ranks: healthy ones pass, each fault is named on its rank, and nothing stays behind."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing.connection
import os
import platform
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.dist.ranks import Ranks, run_ranks, train
from tests.dist.test_stopping import arguments
from tests.dist.test_training import losses

EXIT_HUNG, EXIT_PREFLIGHT_FAILED = 5, 7


def preflight(folder: Path, fault: Callable[[int], object], *options: str | Path) -> tuple[int, str]:
    """The command, with a fault, in a folder; its status and what it prints. Each rank says it is a node of its own."""
    from launcher.preflight import main

    os.chdir(folder)
    rank = int(os.environ["RANK"])
    platform.node = lambda: f"n{rank}"
    fault(rank)
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(printed):
        status = main([str(option) for option in options])
    return status, printed.getvalue()


def equally_fast(_: int) -> None:
    """Everything is done, and takes a second: a busy machine makes nobody slow."""
    from launcher import measures

    def one_second(action: Callable[[], object], *_: object, **__: object) -> float:
        action()
        return 1.0

    measures._best_seconds = one_second


def test_a_healthy_pair_passes_and_leaves_nothing_behind(text_dataset, tmp_path):
    options = ("--data", text_dataset, "--output", "runs/mine", "--json", "figures.json")
    results = run_ranks(2, preflight, tmp_path, equally_fast, *options)
    assert [status for status, _ in results] == [0, 0], results
    table, nothing = (printed for _, printed in results)
    assert nothing == ""
    assert "0 n0 " in table
    assert "1 n1 " in table
    assert table.splitlines()[-1] == "preflight passed"
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]

    content = json.loads((tmp_path / "figures.json").read_text())
    assert content["passed"]
    for report in content["ranks"]:
        assert report["errors"] == {}
        assert report["facts"].keys() >= {"torch", "deepspeed", "mdseq", "python", "dataset"}
        assert abs(report["clock_skew_seconds"]) < 1
        assert report["figures"]["matrix_products_tflops"] == pytest.approx(2 * 1024**3 / 1e12)
        # One second a buffer: of two ranks, each sends half of it in an all-to-all, and all of it otherwise.
        buffer = 8 * 2**20 / 1e9
        assert report["figures"]["all_reduce_gb_per_second"] == pytest.approx(buffer)
        assert report["figures"]["all_to_all_gb_per_second"] == pytest.approx(buffer / 2)
        assert report["figures"]["link_between_nodes_gb_per_second"] == pytest.approx(buffer)
        assert report["figures"]["disk_write_mb_per_second"] > 0
        assert report["figures"]["host_memory_gib"] > 0

    before = (tmp_path / "figures.json").read_bytes()
    results = run_ranks(2, preflight, tmp_path, equally_fast, *options)
    assert [status for status, _ in results] == [2, 2]
    assert results[0][1].startswith("error: --json figures.json exists already")
    assert (tmp_path / "figures.json").read_bytes() == before


def slow_products(rank: int) -> None:
    multiply = torch.mm

    def slowly(*matrices: torch.Tensor, **options: torch.Tensor) -> torch.Tensor:
        time.sleep(0.5)
        return multiply(*matrices, **options)

    if rank == 1:
        torch.mm = slowly


def test_a_slow_rank_is_named(tmp_path):
    (status, table), (other_status, _) = run_ranks(2, preflight, tmp_path, slow_products)
    assert (status, other_status) == (EXIT_PREFLIGHT_FAILED, EXIT_PREFLIGHT_FAILED)
    assert "failed: rank 1 on n1: matrix products at 0." in table
    assert table.splitlines()[-1].startswith("preflight failed: matrix products")


def a_bad_node(rank: int) -> None:
    """Without the dataset, a disk, the same packages, a right clock, and the run folder's file system."""
    from launcher import measures

    equally_fast(rank)
    if rank == 0:
        return
    opened, moment = measures.Corpus.open, time.time
    measures.Corpus.open = lambda data, split: opened(data / "gone", split)
    measures._write_and_read = full_disk
    measures.version = lambda _: "0.0"
    measures.time.time = lambda: moment() + 100
    measures.VISIBLE_SECONDS = 0.2
    os.environ["NCCL_DEBUG"] = "INFO"
    os.mkdir("elsewhere")
    os.chdir("elsewhere")


def full_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_all_that_is_wrong_with_a_node_is_named_at_once(text_dataset, tmp_path):
    options = ("--data", text_dataset, "--output", "runs/mine")
    (status, table), (other_status, _) = run_ranks(2, preflight, tmp_path, a_bad_node, *options)
    assert (status, other_status) == (EXIT_PREFLIGHT_FAILED, EXIT_PREFLIGHT_FAILED)
    told = " ".join(table.split())
    assert f"failed: rank 1 on n1: no dataset folder {text_dataset}/gone" in told
    assert "failed: rank 1 on n1: cannot write in .: No space left on device; choose another --output" in told
    assert "failed: rank 1 on n1: a file that rank 0 has written in " in told
    assert "failed: n1: its clock is 100.0 s ahead of that of n0" in told
    assert "failed: deepspeed differs: " in told
    assert "; 0.0 on rank 1 on n1" in told
    assert "warning: NCCL_DEBUG differs: (unset) on rank 0 on n0; INFO on rank 1 on n1" in told
    assert "preflight failed: disk, dataset, output, clocks, deepspeed" in told
    assert list((tmp_path / "elsewhere").iterdir()) == []


def another_folder(rank: int) -> None:
    equally_fast(rank)
    os.chdir(f"n{rank}")


def test_a_node_with_another_dataset_of_the_same_name_is_named(text_dataset, pair_dataset, tmp_path):
    for node, dataset in {"n0": text_dataset, "n1": pair_dataset}.items():
        (tmp_path / node).mkdir()
        (tmp_path / node / "mine").symlink_to(dataset)
    options = ("--data", "mine", "--output", tmp_path)
    (status, table), (other_status, _) = run_ranks(2, preflight, tmp_path, another_folder, *options)
    assert (status, other_status) == (EXIT_PREFLIGHT_FAILED, EXIT_PREFLIGHT_FAILED)
    told = " ".join(table.split())
    assert re.search(r"failed: dataset differs: \w{12} on rank 0 on n0; \w{12} on rank 1 on n1 ", told)


def broken_all_reduce(rank: int) -> None:
    """Rank 1 does not come to the all-reduce that rank 0 is in."""
    from launcher import measures

    equally_fast(rank)
    measures.COMMUNICATION_SECONDS = 1.0
    if rank == 1:
        measures.all_reduce = full_disk


def test_a_rank_that_fails_does_not_leave_the_others_waiting(tmp_path):
    (status, table), (other_status, _) = run_ranks(2, preflight, tmp_path, broken_all_reduce)
    assert (status, other_status) == (EXIT_PREFLIGHT_FAILED, EXIT_PREFLIGHT_FAILED)
    told = " ".join(table.split())
    assert "failed: rank 0 on n0: all-reduce: RuntimeError: " in told
    assert "failed: rank 1 on n1: all-reduce: OSError: " in told
    assert told.endswith("preflight failed: all-reduce")


def hanging_disk(rank: int) -> None:
    from launcher import measures
    from mdseq.train import watch

    measures.CHECK_SECONDS, watch.HEARTBEAT_SECONDS, watch.STALE_SECONDS = 1.0, 0.2, 1.0
    os.dup2(os.open(f"told-{rank}", os.O_WRONLY | os.O_CREAT), 2)
    if rank == 1:
        measures.disk = lambda _: time.sleep(1000)


def preflight_that_hangs(folder: Path) -> None:
    from launcher.preflight import main

    os.chdir(folder)
    hanging_disk(int(os.environ["RANK"]))
    main([])


def test_a_rank_that_hangs_is_named(tmp_path):
    with Ranks(2, preflight_that_hangs, tmp_path) as ranks:
        multiprocessing.connection.wait([process.sentinel for process in ranks.processes], timeout=60)
        # A launcher then ends the others.
        assert EXIT_HUNG in [process.exitcode for process in ranks.processes]
        for process in ranks.processes:
            process.kill()
    told = (tmp_path / "told-0").read_text() + (tmp_path / "told-1").read_text()
    assert "error: no check has ended for 1 s" in told
    assert f"rank 1 on {platform.node()} is not waiting for the others: it is at " in told


def late_to_see(rank: int) -> None:
    """Rank 1 looks for the file of rank 0 for a long time."""
    from launcher import measures

    if rank == 1:
        measures._wait_for = lambda _: time.sleep(1000)


def test_a_signal_does_not_leave_the_file_behind(tmp_path):
    with Ranks(2, preflight, tmp_path, late_to_see) as ranks:
        end = time.monotonic() + 60
        while not list(tmp_path.glob(".preflight-*")):
            assert time.monotonic() < end
            time.sleep(0.02)
        for process in reversed(ranks.processes):
            os.kill(process.pid, signal.SIGTERM)
        for process in ranks.processes:
            process.join(30)
    assert list(tmp_path.iterdir()) == []


def train_after_preflight(folder: Path, *options: str | Path) -> int:
    os.chdir(folder)
    equally_fast(0)
    return train("--preflight", *options)


def train_if_healthy(folder: Path, *options: str | Path) -> int:
    os.chdir(folder)
    a_bad_node(int(os.environ["RANK"]))
    return train("--preflight", *options)


def test_training_can_begin_with_it_and_is_the_same(text_dataset, tmp_path):
    def options(name: str) -> list[str | Path]:
        return arguments(text_dataset, tmp_path / name, "schedule.steps=2")

    assert run_ranks(2, train, *options("without")) == [0, 0]
    assert run_ranks(2, train_after_preflight, tmp_path, *options("with")) == [0, 0]
    assert torch.equal(losses(tmp_path / "with"), losses(tmp_path / "without"))
    assert run_ranks(2, train_if_healthy, tmp_path, *options("never")) == [EXIT_PREFLIGHT_FAILED] * 2
    assert not (tmp_path / "never").exists()

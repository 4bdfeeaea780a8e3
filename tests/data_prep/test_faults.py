"""Whatever stops a build, the same command goes on with it and gives the bytes of one that was never stopped."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.data_prep.conftest import contents, write_jsonl

ROOT = Path(__file__).parents[2]
NUM_KILLS = 20


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 6 MB, so that a build of many small shards takes a few seconds."""
    records: list[object] = [
        {"text": f"River {number} runs past mill {number % 977}.\n" * 20} for number in range(8000)
    ]
    return write_jsonl(tmp_path_factory.mktemp("data") / "texts.jsonl", [*records, *records[:500], {"body": 1}])


def command(data: Path, out: Path, *options: str) -> list[str]:
    return [
        sys.executable, "-m", "data_prep", "build", str(data), "--out", str(out), "--vocab", "512", "--workers", "2",
        "shards.text_mb=1.0", "cleaning.exact_duplicates=drop", *options,
    ]  # fmt: skip


def start(arguments: list[str]) -> subprocess.Popen[str]:
    """The command in a process group of its own."""
    return subprocess.Popen(
        arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        # A shell's background jobs, as CI may be, inherit an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], float]:
    """Every file of a build that nothing stopped, and the seconds it took."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    started = time.monotonic()
    subprocess.run(command(data, out), cwd=ROOT, check=True, capture_output=True)
    assert len(list(out.glob("train-*.arrow"))) > 3
    return contents(out), time.monotonic() - started


def test_killed_twenty_times(data: Path, undisturbed: tuple[dict[str, bytes], float], tmp_path: Path) -> None:
    wanted, seconds = undisturbed
    rng = random.Random(0)
    out = tmp_path / "out"
    num_kills = 0
    while num_kills < NUM_KILLS:
        process = start(command(data, out))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=rng.uniform(0.1, 0.8) * seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if process.returncode == 0:  # what the kills before left to do was done in time
            assert contents(out) == wanted
            shutil.rmtree(out)
        else:
            assert process.returncode == -signal.SIGKILL
            num_kills += 1
    done = subprocess.run(command(data, out), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert contents(out) == wanted
    assert not (tmp_path / "out.partial").exists()


def started_and_encoding(data: Path, out: Path) -> subprocess.Popen[str]:
    process = start(command(data, out))
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("encoding"):
            break
    deadline = time.monotonic() + 60
    partial = out.with_name("out.partial")
    while not list(partial.glob("*train-*.arrow*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.poll() is None
    return process


def group_members(process_group: int) -> list[psutil.Process]:
    members = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == process_group and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process)
    return members


def is_group_gone(process_group: int) -> bool:
    """Whether the group's processes end within 20 s (multiprocessing's helpers outlive the parent)."""
    deadline = time.monotonic() + 20
    while (members := group_members(process_group)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not members


def test_interrupted_build(data: Path, undisturbed: tuple[dict[str, bytes], float], tmp_path: Path) -> None:
    process = started_and_encoding(data, tmp_path / "out")
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip().splitlines()[-1] == "interrupted; the same command goes on where it stopped"
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()
    assert is_group_gone(process.pid)
    subprocess.run(command(data, tmp_path / "out"), cwd=ROOT, check=True, capture_output=True)
    assert contents(tmp_path / "out") == undisturbed[0]


def test_a_killed_parent_leaves_no_process(data: Path, tmp_path: Path) -> None:
    process = started_and_encoding(data, tmp_path / "out")
    process.kill()
    process.communicate(timeout=60)
    assert not (tmp_path / "out").exists()
    assert is_group_gone(process.pid)


def test_a_killed_worker_is_a_message(data: Path, tmp_path: Path) -> None:
    process = started_and_encoding(data, tmp_path / "out")
    workers = [child for child in psutil.Process(process.pid).children(recursive=True) if child.cpu_times().user > 0]
    max(workers, key=lambda child: child.cpu_times().user).kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "worker processes was killed" in errors
    assert "Traceback" not in errors
    assert is_group_gone(process.pid)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for the plan and the vocabulary, but not for all shards."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_a_message_and_the_rest_is_built_when_there_is_room(
    data: Path, undisturbed: tuple[dict[str, bytes], float], small_disk: Path
) -> None:
    out = small_disk / "out"
    failed = subprocess.run(command(data, out), cwd=ROOT, capture_output=True, text=True, check=False)
    assert failed.returncode == 2, failed.stderr
    assert failed.stderr.splitlines()[-1].startswith(f"error: no space left for OUT {out}; what is finished is kept")
    assert "Traceback" not in failed.stderr
    assert not out.exists()
    assert (small_disk / "out.partial" / "plan.json").exists()
    assert (small_disk / "out.partial" / "tokenizer.model").exists()
    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    subprocess.run(command(data, out), cwd=ROOT, check=True, capture_output=True)
    assert contents(out) == undisturbed[0]

"""The commands as a user types them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from data_prep.__main__ import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number:02}.txt").write_text(f"River {number} runs past the mill.\n" * (number + 1))
    return folder


def test_build_verify_stats_show(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert (
        main(
            [
                "build",
                str(data),
                "--out",
                str(out),
                "--vocab",
                "600",
                "--valid-fraction=0.2",
                "--workers",
                "1",
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert "train" in printed
    assert "fingerprint" in printed
    assert "the text supports" in printed
    assert main(["verify", str(out)]) == 0
    assert "intact: 12 documents" in capsys.readouterr().out
    assert main(["stats", str(out)]) == 0
    assert "median" in capsys.readouterr().out
    assert main(["show", str(out), "0"]) == 0
    shown = capsys.readouterr().out
    assert "from 00.txt" in shown
    assert "<BOS>River 0 runs past the mill.\n<EOS>" in shown


def test_mistakes_are_one_message(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["build", str(tmp_path / "absent"), "--out", str(tmp_path / "out")],
        ["build", str(data), "--out", str(data)],
        ["verify", str(tmp_path)],
        ["show", str(data), "0"],
    ):
        assert main(arguments) == 2
        assert capsys.readouterr().err.startswith("error: ")


def start_build(tmp_path: Path) -> subprocess.Popen[str]:
    """A build that is still encoding, in a process group of its own."""
    data = tmp_path / "texts.jsonl"
    with data.open("w") as file:
        for number in range(30_000):
            file.write(json.dumps({"text": f"River {number} runs past mill {number % 977}.\n" * 20}) + "\n")
    command = [sys.executable, "-m", "data_prep", "build", str(data), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(
        [*command, "--vocab", "512", "--workers", "2"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell's background jobs, as CI may be, inherit an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("encoding"):
            break
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.partial-*/train-*.arrow")) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None
    return process


def is_group_gone(process_group: int) -> bool:
    """Whether the group's processes end within 20 s (multiprocessing's helper outlives the parent)."""
    deadline = time.monotonic() + 20
    while (members := group_members(process_group)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not members


def group_members(process_group: int) -> list[psutil.Process]:
    members = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == process_group and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process)
    return members


def test_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    process = start_build(tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip().splitlines()[-1] == "interrupted; nothing was kept"
    assert "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["texts.jsonl"]
    assert is_group_gone(process.pid)


def test_killed_build_leaves_no_dataset_and_no_process(tmp_path: Path) -> None:
    process = start_build(tmp_path)
    process.kill()
    process.communicate(timeout=60)
    assert not (tmp_path / "out").exists()
    assert is_group_gone(process.pid)

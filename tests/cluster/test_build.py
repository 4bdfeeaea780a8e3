"""A dataset that a Slurm job array builds, on two nodes, is the one that this process builds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.slurm import Slurm
from tests.data_prep.conftest import contents, write_jsonl

ROOT = Path(__file__).parents[2]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "rivers"
    folder.mkdir()
    for part in range(6):
        texts = [
            f"River {number} runs past mill {number % 97}.\n" * 20 for number in range(400 * part, 400 * part + 500)
        ]
        write_jsonl(folder / f"{part}.jsonl", [{"text": text} for text in texts])
    return folder


def command(data: Path, out: Path, *options: str) -> list[str]:
    return [
        sys.executable, "-m", "data_prep", "build", str(data), "--out", str(out), "--vocab", "512", "--workers", "1",
        "shards.text_mb=0.3", "cleaning.exact_duplicates=drop", "cluster.memory_gb=0.5", *options,
    ]  # fmt: skip


def test_same_bytes_from_a_job_array(slurm: Slurm, data: Path, tmp_path: Path) -> None:
    subprocess.run(command(data, tmp_path / "here"), cwd=ROOT, check=True, capture_output=True)
    there = command(data, tmp_path / "there", "--cluster", "slurm", "--tasks", "4")
    printed = slurm.run(*there, seconds=180, folder=ROOT)
    assert "Slurm job" in printed
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    assert len(list((tmp_path / "here").glob("train-*.arrow"))) > 3


def test_what_fails_on_a_node_is_a_message_here_and_goes_on_when_mended(
    slurm: Slurm, data: Path, tmp_path: Path
) -> None:
    plan = [word if word != "build" else "plan" for word in command(data, tmp_path / "out")]
    subprocess.run(plan, cwd=ROOT, check=True, capture_output=True)
    part = data / "5.jsonl"
    whole = part.read_bytes()
    part.write_bytes(whole[:-10] + b" " * 10)
    build = command(data, tmp_path / "out", "--cluster", "slurm", "--tasks", "2")
    with pytest.raises(subprocess.CalledProcessError) as error:
        slurm.run(*build, seconds=180, folder=ROOT)
    assert error.value.returncode == 2
    assert "its content has changed" in error.value.stderr
    part.write_bytes(whole)
    slurm.run(*build, seconds=180, folder=ROOT)
    assert (tmp_path / "out" / "manifest.json").exists()

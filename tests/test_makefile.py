"""The Makefile hands its variables on as they are, and says what it lacks before it installs anything."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
VARIABLES = (
    "DATA", "OUT", "VOCAB", "FORMAT", "WORKERS", "SPEC", "DS_CONFIG", "RANKS", "NODES", "GPUS", "OUTPUT", "RUN", "ARGS",
)  # fmt: skip

STUB = """#!/usr/bin/env bash
if [[ $1 == -c ]]; then echo 12345; exit; fi  # the question for a free port
printf '%s\\n' "$@" > "$(dirname -- "$0")/../../called"
"""


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Run make in a folder of its own whose .venv only notes what it is asked to run."""
    for name in (*VARIABLES, "TORCH", "MASTER_PORT", "MAKEFLAGS", "MAKELEVEL"):
        monkeypatch.delenv(name, raising=False)
    checkout = tmp_path / "a checkout"
    (checkout / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", checkout)
    (checkout / "pyproject.toml").touch()
    for program in ("python", "mdseq"):
        stub = checkout / ".venv" / "bin" / program
        stub.write_text(STUB)
        stub.chmod(0o755)
    (checkout / ".venv" / ".ready").write_text(f"torch==0.0 in {checkout}\n")

    def run(*arguments: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        done = subprocess.run(["make", "TORCH=torch==0.0", *arguments], cwd=checkout, capture_output=True, text=True)
        called = checkout / "called"
        return done, called.read_text().splitlines() if called.exists() else []

    return run


def test_help_lists_every_target_and_needs_nothing(make):
    done, called = make()
    assert done.returncode == 0
    assert not called
    for target in (
        "quickstart",
        "test",
        "prep",
        "train",
        "submit",
        "preflight",
        "generate",
        "evaluate",
        "report",
        "lint",
    ):
        assert f"  {target} " in done.stdout


@pytest.mark.parametrize(
    ("target", "variable"), [("prep", "DATA"), ("generate", "RUN"), ("evaluate", "RUN"), ("report", "RUN")]
)
def test_a_missing_variable_is_named_in_one_line(make, target, variable):
    done, called = make(target)
    assert done.returncode == 2
    assert not called
    assert done.stderr.startswith(f"give {variable}=")
    assert len(done.stderr.splitlines()) == 2  # and make's own


def test_prep_hands_on_names_with_spaces(make, tmp_path):
    folder = tmp_path / "my 'old' novels"
    folder.mkdir()
    done, called = make("prep", f"DATA={folder}", "VOCAB=600", "ARGS=--exclude '*.md'")
    assert done.returncode == 0, done.stderr
    assert called == [
        "-m", "data_prep", "build", str(folder), "--out", "data/my 'old' novels", "--vocab", "600",
        "--exclude", "*.md",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("data", "out"),
    [("x/records.jsonl.gz", "data/records"), ("a.b.txt", "data/a.b"), ("a.csv.zst", "data/a"), ("plain", "data/plain")],
)
def test_prep_names_the_dataset_after_the_file(make, data, out):
    _, called = make("prep", f"DATA={data}")
    assert called[called.index("--out") + 1] == out


def test_train_hands_on_everything(make):
    done, called = make(
        "train", "RANKS=3", "SPEC=my spec.toml", "DS_CONFIG=ds configs/a.json", "DATA=da ta", "OUTPUT=out put",
        "ARGS=--resume never schedule.steps=5 attention.dilation=[1,2]",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert called == [
        "-m", "deepspeed.launcher.runner", "--quiet", "--num_gpus", "3", "--master_port", "12345", "launcher/run.py",
        "--ds_config", "ds configs/a.json", "--spec", "my spec.toml", "--data", "da ta", "--output", "out put",
        "--resume", "never", "schedule.steps=5", "attention.dilation=[1,2]",
    ]  # fmt: skip


def test_submit_hands_on_everything(make):
    done, called = make(
        "submit", "NODES=4", "GPUS=8", "SPEC=my spec.toml", "DS_CONFIG=a.json", "DATA=da ta", "OUTPUT=out put",
        "ARGS=--print schedule.steps=5,6",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert called == [
        "-m", "launcher.slurm", "--ds_config", "a.json", "--spec", "my spec.toml", "--nodes", "4", "--gpus", "8",
        "--data", "da ta", "--output", "out put", "--print", "schedule.steps=5,6",
    ]  # fmt: skip


def test_preflight_hands_on_everything(make):
    done, called = make("preflight", "RANKS=3", "DATA=da ta", "OUTPUT=out put", "ARGS=--json 'fig ures.json'")
    assert done.returncode == 0, done.stderr
    assert called == [
        "-m", "deepspeed.launcher.runner", "--quiet", "--num_gpus", "3", "--master_port", "12345",
        "launcher/preflight.py", "--data", "da ta", "--output", "out put", "--json", "fig ures.json",
    ]  # fmt: skip


def test_evaluate_hands_on_run_and_data(make):
    _, called = make("evaluate", "RUN=a run", "DATA=da ta", "ARGS=--split test")
    assert called == ["evaluate", "likelihood", "a run", "--data", "da ta", "--split", "test"]


def test_an_interpreter_that_is_too_old_is_refused(make, tmp_path):
    old = tmp_path / "old python"
    old.write_text('#!/usr/bin/env bash\nif [[ $1 == --version ]]; then echo "Python 3.8.1"; else exit 1; fi\n')
    old.chmod(0o755)
    done, called = make("generate", "RUN=r", f"PYTHON={old}", "TORCH=torch==0.1")
    assert done.returncode == 2
    assert not called
    assert done.stderr.startswith("Python 3.8.1 is too old, mdseq needs 3.11 or newer")

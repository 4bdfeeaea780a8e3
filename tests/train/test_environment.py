"""What is noted of a start: where it runs, with what, and nothing secret; and of the starts before it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from mdseq.train import environment as module
from mdseq.train.environment import EARLIER, Place, environment, git_state, steering_variables, with_earlier

PLACES = [Place("n1", "H100, 79.1 GiB"), Place("n2", "H200, 139.8 GiB"), Place("n1", "H100, 79.1 GiB")]


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=n", "-c", "user.email=n@n", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_all_there_is_to_know() -> None:
    found = environment(PLACES)
    assert found["num_ranks"] == 3
    assert found["nodes"] == {
        "n1": {"ranks": [0, 2], "gpus": ["H100, 79.1 GiB"] * 2},
        "n2": {"ranks": [1], "gpus": ["H200, 139.8 GiB"]},
    }
    assert found["packages"].keys() >= {"mdseq", "torch", "deepspeed", "numpy", "pydantic", "rouge-score"}
    assert "pytest" not in found["packages"], "the tools for tests do not matter"
    assert found["cuda"].keys() == {"cuda", "nccl", "driver"}
    assert found["cpu"]["cores"] >= found["cpu"]["usable_cores"] >= 1
    assert found["cpu"]["memory_gib"] > 0
    json.dumps(found)


def test_what_is_not_there_is_null(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError("no such luck")

    for name in ("_packages", "git_state", "_cpu_model"):
        monkeypatch.setattr(module, name, broken)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    found = environment([Place("n1", "")])
    assert [found[name] for name in ("packages", "git", "cuda", "slurm")] == [None] * 4
    assert found["cpu"]["model"] is None
    assert found["nodes"] == {"n1": {"ranks": [0], "gpus": []}}


def test_the_state_of_the_checkout(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None
    git(tmp_path, "init", "-b", "trunk")
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-m", "first")
    expected = {"commit": git(tmp_path, "rev-parse", "HEAD"), "branch": "trunk"}
    assert git_state(tmp_path) == expected | {"is_clean": True, "num_changed_files": 0}
    for name in ("a", "b"):
        (tmp_path / name).write_text("2")
    assert git_state(tmp_path) == expected | {"is_clean": False, "num_changed_files": 2}
    (tmp_path / "site-packages").mkdir()
    assert git_state(tmp_path / "site-packages") is None, "installed in a checkout of something else"


def test_without_git_there_is_no_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment(PLACES)["git"] is None


def test_the_job_of_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    slurm = environment(PLACES)["slurm"]
    assert (slurm["SLURM_JOB_ID"], slurm["SLURM_RESTART_COUNT"]) == ("4711", "2")


def test_variables_that_steer_a_run_but_no_secrets() -> None:
    kept = {"CUDA_VISIBLE_DEVICES": "0", "HF_HOME": "/h", "NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "4"}
    others = ["HF_TOKEN", "NCCL_API_KEY", "TORCH_SECRET", "DS_PASSWORD", "HOME", "AWS_SECRET_ACCESS_KEY"]
    assert steering_variables(kept | dict.fromkeys(others, "secret")) == kept


def test_earlier_starts_are_kept_oldest_first(tmp_path: Path) -> None:
    path = tmp_path / "environment.json"
    for start in ("first", "second", "third"):
        path.write_text(json.dumps(with_earlier({"started": start}, path)))
    found = json.loads(path.read_text())
    assert found == {"started": "third", EARLIER: [{"started": "first"}, {"started": "second"}]}


@pytest.mark.parametrize("text", ["", "{cut sho", "[1]", '{"earlier_starts": 3}'])
def test_what_cannot_be_read_of_them_is_kept_as_it_is(tmp_path: Path, text: str) -> None:
    path = tmp_path / "environment.json"
    path.write_text(text)
    assert with_earlier({"started": "now"}, path) == {"started": "now", EARLIER: [text]}

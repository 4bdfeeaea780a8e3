"""What is refused before anything is queued, and what is said of what is; on a real Slurm: tests/cluster."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launcher.slurm import main

ROOT = Path(__file__).parents[2]
SMALL = ["--nodes", "2", "--gpus", "0", "data.batch_size=4", "data.micro_batch_size=1"]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs in the place of Slurm's: sbatch gives 41, 42, ... and keeps what it was given; squeue knows 41 runs."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    programs = {
        "sbatch": f'n=$((41 + $(ls {folder} | grep -c given))); printf "%s\\n" "$@" "in $PWD" > {folder}/given-$n; '
        f"cat > {folder}/script-$n; env > {folder}/environment; echo $n",
        "squeue": 'echo "41 RUNNING"',
        "srun": "exit 1",
    }
    for name, script in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def submit(dataset: Path, output: Path, *more: str | Path) -> int:
    arguments = ["--ds_config", ROOT / "ds_configs/zero2.json", "--data", dataset, "--output", output, *SMALL, *more]
    return main([str(argument) for argument in arguments])


def test_print_needs_no_slurm_and_leaves_nothing(text_dataset, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert submit(text_dataset, tmp_path / "run", "--print", "--evaluate") == 0
    printed = capsys.readouterr().out
    assert [line.partition("=")[2] for line in printed.splitlines() if "job-name" in line] == [
        "mdseq-run",
        "mdseq-run-evaluate",
    ]
    assert not (tmp_path / "run").exists()


def test_a_job_and_its_run_name_each_other(text_dataset, tmp_path, capsys, slurm) -> None:
    run = tmp_path / "run"
    assert submit(text_dataset, run) == 0
    printed = capsys.readouterr().out
    assert f"job 41: trains {run} on 2 nodes, without GPUs; log {run}/slurm/41.log" in printed
    assert (run / "slurm" / "41.sh").read_text() == (slurm / "script-41").read_text()
    assert f"#SBATCH --output={run}/slurm/%j.log" in (slurm / "script-41").read_text()
    assert (slurm / "given-41").read_text().splitlines()[0] == "--parsable"


def test_a_chain_waits_from_job_to_job(text_dataset, tmp_path, capsys, slurm) -> None:
    source = tmp_path / "text.txt"
    source.write_text("words")
    assert submit(tmp_path / "new data", tmp_path / "run", "--prep", source, "--evaluate", "--after", "7") == 0
    purposes = re.findall(r"job (\d+): (\w+)", capsys.readouterr().out)
    assert purposes == [("41", "makes"), ("42", "trains"), ("43", "evaluates")]
    waits = [(slurm / f"given-{job}").read_text().splitlines()[1:3] for job in (41, 42, 43)]
    assert waits == [[f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes"] for job in (7, 41, 42)]


def test_an_array_is_evaluated_task_by_task(text_dataset, tmp_path, capsys, slurm) -> None:
    assert submit(text_dataset, tmp_path / "runs", "--evaluate", "seed=0,1") == 0
    assert "log" in capsys.readouterr().out
    assert "--dependency=aftercorr:41" in (slurm / "given-42").read_text()
    assert "#SBATCH --array=0-1" in (slurm / "script-42").read_text()


def test_the_job_around_us_is_not_inherited(text_dataset, tmp_path, slurm, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "3")
    monkeypatch.setenv("SBATCH_QOS", "low")
    monkeypatch.setenv("SBATCH_PARTITION", "overruled")
    assert submit(text_dataset, tmp_path / "run", "cluster.partition=main") == 0
    environment = (slurm / "environment").read_text()
    assert "SLURM_JOB_ID" not in environment
    assert "SBATCH_PARTITION" not in environment
    assert "SBATCH_QOS=low" in environment


def test_a_run_is_not_submitted_twice(text_dataset, tmp_path, capsys, slurm) -> None:
    run = tmp_path / "run"
    assert submit(text_dataset, run) == 0
    assert submit(text_dataset, run) == 2
    assert (
        f"{run} has a job already: 41 is RUNNING; wait for it, call it off by `scancel 41`" in capsys.readouterr().err
    )
    assert not (slurm / "given-42").exists()


def test_what_slurm_says_is_passed_on(text_dataset, tmp_path, capsys, slurm) -> None:
    (slurm / "sbatch").write_text("#!/bin/bash\necho 'sbatch: error: invalid partition specified: gold' >&2; exit 1\n")
    assert submit(text_dataset, tmp_path / "run", "cluster.partition=gold") == 2
    assert "Slurm refused the job; see [cluster]" in (told := capsys.readouterr().err)
    assert "invalid partition specified: gold" in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["data.batch_size=3"], "data.batch_size = 3 must be a multiple of"),
        (["seed=0,x"], "seed = 'x' (from command line) should be a valid integer"),
        (["cluster.nodes=1,2"], "the runs of an array share one [cluster]"),
        (["--nodes", "0"], "cluster.nodes = 0"),
        (["cluster.time_minutes=3", "cluster.save_seconds=200"], "leaves nothing of cluster.time_minutes = 3"),
        (["cluster.options=[\"echo\"]"], "cluster.options.0"),
        (["cluster.partition=a b"], "cluster.partition"),
        (["--prep", "nowhere"], "there is nothing at --prep nowhere"),
        (["--output", "100%j"], "must have no % and no line break"),
    ],
)  # fmt: skip
def test_mistakes(text_dataset, tmp_path, capsys, slurm, arguments, told) -> None:
    assert submit(text_dataset, tmp_path / "run", *arguments) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("error: ")
    assert told in complaint
    assert not (slurm / "given-41").exists()
    assert not (tmp_path / "run").exists()


def test_no_data(tmp_path, capsys, slurm) -> None:
    assert submit(tmp_path / "nothing", tmp_path / "run") == 2
    assert str(tmp_path / "nothing") in capsys.readouterr().err


def test_no_slurm(text_dataset, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert submit(text_dataset, tmp_path / "run") == 2
    assert "no Slurm on this machine" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

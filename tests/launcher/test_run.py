"""The launcher's front door: what it accepts, and how it refuses; nothing here starts DeepSpeed but the last test."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.run import main

ROOT = Path(__file__).parent.parent.parent
CPU_JSON = ROOT / "ds_configs" / "cpu.json"


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Run the launcher in an empty folder; its message, once it has refused properly."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path, ds_config: Path = CPU_JSON) -> str:
        before = sorted(tmp_path.rglob("*"))
        status = main(["--ds_config", str(ds_config), *(str(argument) for argument in arguments)])
        message = capsys.readouterr().err
        assert status == 2
        assert message.startswith("error: ")
        assert "Traceback" not in message
        assert len(message.splitlines()) <= 24, "more than a screen"
        assert sorted(tmp_path.rglob("*")) == before, "something was written"
        return message

    return run


def test_every_wrong_value_of_a_spec_is_named_at_once(refused, text_dataset):
    message = refused("--data", text_dataset, "model.num_layers=0", "experts.top_k=9", "modle.num_heads=2")
    assert "3 problems" in message
    assert "model.num_layers = 0 (from command line) should be greater than or equal to 1" in message
    assert "experts.top_k = 9 must be at most experts.num_experts = 8" in message
    assert "did you mean model" in message


def test_no_dataset(refused):
    assert "--data DIR" in refused()


def test_missing_dataset(refused):
    assert "no dataset folder nowhere" in refused("--data", "nowhere")


def test_corrupt_shard(refused, text_dataset, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(text_dataset, damaged)
    shard = damaged / "train-00000.arrow"
    shard.write_bytes(shard.read_bytes()[:-100])
    message = refused("--data", damaged)
    assert "train-00000.arrow is damaged" in message


def test_unwritable_output(refused, text_dataset, tmp_path):
    (tmp_path / "file").write_text("")
    assert "choose another --output" in refused("--data", text_dataset, "--output", tmp_path / "file" / "run")


def test_ds_config_that_contradicts_the_spec(refused, text_dataset, tmp_path):
    contradicting = tmp_path / "mine.json"
    contradicting.write_text('{"train_batch_size": 7, "bf16": {"enabled": true}, "zero_optimization": {"stage": 2}}')
    message = refused("--data", text_dataset, ds_config=contradicting)
    assert "2 problems" in message
    assert "train_batch_size = 7 contradicts the run spec, which makes it 16 (data.batch_size)" in message
    assert "bf16.enabled = true contradicts the run spec, which makes it false (optimiser.precision)" in message


def test_pairs_must_not_be_cut(refused, pair_dataset):
    assert "set data.packing=whole" in refused("--data", pair_dataset)


def test_pairs_longer_than_a_row(refused, pair_dataset):
    assert "raise data.row_length" in refused("--data", pair_dataset, "data.packing=whole", "data.row_length=8")


def test_lengths_of_what_is_not_there(refused, pair_dataset):
    arguments = ("--data", pair_dataset, "data.packing=whole", "data.lengths_of=['pears']")
    for message in (refused(*arguments), refused(*arguments, "--dry_run")):
        assert "data.lengths_of: there is no training text of pears; allowed: " in message


def test_more_signal_than_there_is(refused, text_dataset):
    for more in ((), ("--dry_run",)):
        assert "diffusion.min_signal = 0.95 is more signal than there ever is" in refused(
            "--data", text_dataset, "diffusion.min_signal=0.95", *more
        )


def test_more_sample_steps_than_timesteps(refused, text_dataset):
    assert "report.sample_solver_steps = 20" in refused("--data", text_dataset, "diffusion.num_timesteps=10")


def test_resume_from_what_is_not_a_checkpoint(refused, text_dataset):
    assert "not a whole checkpoint" in refused("--data", text_dataset, "--resume", "step-00000004")


def test_dry_run_shows_everything_and_starts_nothing(text_dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["--ds_config", str(CPU_JSON), "--spec", "quickstart", "--data", str(text_dataset), "--dry_run"]
    assert main([*arguments, "schedule.steps=7"]) == 0
    shown = capsys.readouterr().out
    for part in ("schedule.steps", "command line", "file", "default", '"gradient_accumulation_steps": 4'):
        assert part in shown
    for part in ("parameters", "active per token", "tokens per step", "memory per rank"):
        assert part in shown
    assert list(tmp_path.iterdir()) == []


def test_the_launcher_passes_the_exit_status_on(text_dataset, tmp_path):
    """Two real ranks under `deepspeed`: one message, status 2."""
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--num_gpus", "2", "--master_port", "29871"]
    arguments = ["--ds_config", CPU_JSON, "--data", text_dataset, "--output", tmp_path / "run", "data.batch_size=3"]
    command = [*runner, ROOT / "launcher" / "run.py", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | {"DS_ACCELERATOR": "cpu"}
    )
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert "data.batch_size = 3 must be a multiple of" in done.stderr
    assert not (tmp_path / "run").exists()

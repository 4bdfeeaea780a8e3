"""What a finished run leaves behind, and what refuses to continue it."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from launcher.run import main as launch
from mdseq.cli import main as mdseq
from mdseq.engine.checkpoint import remove_old_checkpoints, whole_checkpoints
from mdseq.report.metrics import read_metrics
from mdseq.report.status import RunStatus
from mdseq.spec import CheckpointSpec
from tests.dist.ranks import run_ranks, train
from tests.dist.test_training import DS_CONFIGS, TINY

SHORT = [*TINY, "schedule.steps=4", "checkpoint.interval_steps=2", "data.micro_batch_size=2"]


@pytest.fixture(scope="module")
def finished(text_dataset, tmp_path_factory) -> Path:
    """A run of four steps with checkpoints at two and four; tests must not change it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    arguments = ["--ds_config", DS_CONFIGS / "cpu.json", "--data", text_dataset, "--output", folder]
    assert run_ranks(1, train, *arguments, *SHORT) == [0]
    return folder


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def steps(run: Path) -> list[int]:
    return [manifest.step for _, manifest in whole_checkpoints(run / "checkpoints")]


def test_a_run_folder_describes_the_run(finished):
    assert json.loads((finished / "engine.json").read_text())["zero_optimization"] == {"stage": 1}
    environment = json.loads((finished / "environment.json").read_text())
    assert environment["packages"].keys() >= {"torch", "deepspeed", "mdseq"}
    assert "steps = 4" in (finished / "spec.toml").read_text()
    assert steps(finished) == [2, 4]
    status = RunStatus.read(finished)
    assert status is not None
    assert (status.state, status.step, status.steps, status.starts, len(status.ranks)) == ("finished", 4, 4, 1, 1)


@pytest.mark.parametrize("damage", ["truncate", "delete", "no manifest"])
def test_a_torn_checkpoint_is_passed_over_for_the_next_older_whole_one(copied, damage):
    newest = copied / "checkpoints" / "step-00000004"
    file = newest / ("manifest.json" if damage == "no manifest" else "trainer.pt")
    if damage == "truncate":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()
    assert steps(copied) == [2]


def test_what_a_killed_save_left_is_no_checkpoint_and_is_removed(copied):
    checkpoints = copied / "checkpoints"
    shutil.copytree(checkpoints / "step-00000004", checkpoints / "step-00000006.partial")
    assert steps(copied) == [2, 4]
    remove_old_checkpoints(checkpoints, CheckpointSpec(keep_last=1))
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000004"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["model.num_heads=4"], "model.num_heads: 2 in the checkpoint, 4 now"),
        (["seed=5"], "seed: 0 in the checkpoint, 5 now"),
        (["--resume", "never"], "already holds a run with 2 checkpoints"),
    ],
)
def test_another_run_does_not_continue_this_one(copied, text_dataset, capsys, changes, expected):
    arguments = ["--ds_config", str(DS_CONFIGS / "cpu.json"), "--data", str(text_dataset), "--output", str(copied)]
    before = sorted(copied.rglob("*"))
    assert launch([*arguments, *SHORT, *changes]) == 2
    assert expected in capsys.readouterr().err
    assert sorted(copied.rglob("*")) == before


def test_an_older_checkpoint_is_continued_only_into_another_folder(copied, text_dataset, tmp_path, capsys):
    older = copied / "checkpoints" / "step-00000002"
    arguments = ["--ds_config", DS_CONFIGS / "cpu.json", "--data", text_dataset, "--resume", older, *SHORT]
    assert launch([*map(str, arguments), "--output", str(copied)]) == 2
    assert "holds a later checkpoint, of step 4" in capsys.readouterr().err
    assert run_ranks(1, train, *arguments, "--output", tmp_path / "fork") == [0]
    assert steps(tmp_path / "fork") == [4]


def test_a_folder_of_something_else_is_not_written_to(text_dataset, tmp_path, capsys):
    (tmp_path / "thesis.tex").touch()
    arguments = ["--ds_config", DS_CONFIGS / "cpu.json", "--data", text_dataset, "--output", tmp_path, *SHORT]
    assert launch([str(argument) for argument in arguments]) == 2
    assert "not a run's" in capsys.readouterr().err


def test_another_dataset_does_not_continue_this_run(copied, pair_dataset, capsys):
    arguments = ["--ds_config", str(DS_CONFIGS / "cpu.json"), "--data", str(pair_dataset), "--output", str(copied)]
    assert launch([*arguments, *SHORT, "data.packing=whole"]) == 2
    assert "dataset: " in capsys.readouterr().err


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for the run's metrics, but not for a checkpoint."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_ends_the_run_with_a_message_and_leaves_no_torn_checkpoint(small_disk, text_dataset):
    arguments = ["--ds_config", DS_CONFIGS / "cpu.json", "--data", text_dataset, "--output", small_disk / "run"]
    assert run_ranks(1, train, *arguments, *SHORT) == [2]
    assert list((small_disk / "run" / "checkpoints").iterdir()) == []
    assert (small_disk / "run" / "metrics.jsonl").stat().st_size > 0


class TestGenerate:
    def test_text_to_standard_output(self, finished, capsys):
        arguments = ["generate", str(finished), "--source", "The river", "--length", "8", "--steps", "2"]
        assert mdseq(arguments) == 0
        first = capsys.readouterr().out
        assert mdseq(arguments) == 0
        assert capsys.readouterr().out == first, "the same seed gives the same text"
        assert mdseq([*arguments, "--seed", "1"]) == 0
        assert capsys.readouterr().out != first

    def test_jsonl_in_and_out_whatever_the_batch_size(self, finished, tmp_path):
        given = [{"src": text, "id": i} for i, text in enumerate(["", "The old mill", "Silver fish dream"])]
        (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, given)))
        outputs = []
        for batch_size in ("1", "4"):
            requests, output = tmp_path / "in.jsonl", tmp_path / f"{batch_size}.jsonl"
            status = mdseq(
                ["generate", str(finished), "--input", str(requests), "--output", str(output), "--num", "2",
                 "--length", "8", "--steps", "3", "--batch_size", batch_size]
            )  # fmt: skip
            assert status == 0
            outputs.append([json.loads(line) for line in output.read_text().splitlines()])
        assert outputs[0] == outputs[1]
        assert [record["id"] for record in outputs[0]] == [0, 0, 1, 1, 2, 2]
        assert outputs[0][0]["generated"] != outputs[0][1]["generated"]

    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            (["generate", "nowhere"], "no run folder at nowhere"),
            (["generate", "RUN", "--guidance", "2"], "diffusion.condition_dropout"),
            (["generate", "RUN", "--input", "nowhere.jsonl"], "cannot read --input"),
            (["generate", "RUN", "--steps", "2", "--output", "RUN/spec.toml"], "never overwritten"),
            (["report", "nowhere"], "has no metrics"),
        ],
    )
    def test_mistakes(self, finished, capsys, arguments, expected):
        assert mdseq([argument.replace("RUN", str(finished)) for argument in arguments]) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        assert expected in message


def test_report_draws_the_run(copied, capsys):
    assert mdseq(["report", str(copied)]) == 0
    assert "at step 1," in capsys.readouterr().out
    assert (copied / "report.png").stat().st_size > 10_000


def test_checkpoints_are_kept_by_age_by_step_and_by_held_out_loss(text_dataset, tmp_path):
    more = ["checkpoint.interval_steps=1", "report.valid_interval_steps=1", "schedule.steps=10"]
    keep = ["checkpoint.keep_last=1", "checkpoint.keep_every_steps=4", "checkpoint.keep_best=2"]
    arguments = ["--ds_config", DS_CONFIGS / "cpu.json", "--data", text_dataset, "--output", tmp_path / "run"]
    assert run_ranks(1, train, *arguments, *SHORT, *more, *keep) == [0]
    losses = {line["step"]: line["valid_loss"] for line in read_metrics(tmp_path / "run")}
    assert len(losses) == 10
    best = set()
    for step in range(1, 11):  # what is not among the best when it is saved does not stay to be judged again
        best = set(sorted(best | {step}, key=losses.__getitem__)[:2])
    assert set(steps(tmp_path / "run")) == {4, 8, 10} | best


def test_the_held_out_loss_is_the_same_however_it_is_spread_and_leaves_no_trace(text_dataset, tmp_path):
    common = ["schedule.steps=4", "report.log_interval_steps=1", "data.micro_batch_size=1"]
    for name, ranks, ds_config, interval in (("a", 1, "cpu", 2), ("b", 2, "zero3_experts", 2), ("c", 1, "cpu", 0)):
        arguments = ["--ds_config", DS_CONFIGS / f"{ds_config}.json", "--data", text_dataset]
        more = [*TINY, *common, f"report.valid_interval_steps={interval}"]
        assert run_ranks(ranks, train, *arguments, "--output", tmp_path / name, *more) == [0] * ranks
    a, b, c = (read_metrics(tmp_path / name) for name in "abc")
    assert [line["step"] for line in a if "valid_loss" in line] == [2, 4]
    for mine, theirs in zip(a[1::2], b[1::2], strict=True):
        assert mine["valid_loss"] == pytest.approx(theirs["valid_loss"], rel=1e-5)
    assert [line["loss"] for line in a] == [line["loss"] for line in c]
    assert not any("valid_loss" in line for line in c)

"""What happens to files happens: it is told, and nothing is lost by it."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mdseq.engine.checkpoint import whole_checkpoints
from tests.dist.ranks import run_ranks, train
from tests.dist.test_training import DS_CONFIGS, TINY, state

STEPS = 6


def arguments(dataset: Path, folder: Path, *more: str) -> list[str | Path]:
    return [
        "--ds_config", DS_CONFIGS / "zero2.json", "--data", dataset, "--output", folder, *TINY,
        f"schedule.steps={STEPS}", "checkpoint.interval_steps=2", "data.micro_batch_size=2", *more,
    ]  # fmt: skip


def train_telling(output: str, *options: str | Path) -> int:
    """What this rank prints goes to a file of its own."""
    rank = os.environ["RANK"]
    with open(f"{output}-{rank}", "w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        from launcher.run import main

        status = main([str(option) for option in options])
        sys.stdout.flush()
    return status


@pytest.fixture(scope="module")
def finished(text_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints at 4 and 6; tests must not change it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert run_ranks(2, train, *arguments(text_dataset, folder)) == [0, 0]
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["rank-0001.safetensors", "trainer.pt", "tokenizer.model"])
def test_a_flipped_bit_is_named_and_the_checkpoint_before_it_continued(copied, finished, text_dataset, tmp_path, name):
    flip(copied / "checkpoints" / "step-00000006" / name)
    assert run_ranks(2, train_telling, str(tmp_path / "out"), *arguments(text_dataset, copied)) == [0, 0]
    told = (tmp_path / "out-0").read_text()
    assert f"step-00000006 is damaged, and not continued: {name} no longer what was saved" in told
    assert "continuing" in told
    assert "step 4 of 6" in told
    for which in ("weights", "average"):
        expected = state(finished, STEPS, which)
        assert all(torch.equal(values, expected[key]) for key, values in state(copied, STEPS, which).items())


def test_when_no_checkpoint_is_sound_nothing_is_trained(copied, text_dataset, tmp_path):
    for step in (4, 6):
        flip(copied / "checkpoints" / f"step-{step:08d}" / "rank-0000.safetensors")
    before = {path: path.read_bytes() for path in (copied / "checkpoints").rglob("*") if path.is_file()}
    assert run_ranks(2, train_telling, str(tmp_path / "out"), *arguments(text_dataset, copied)) == [2, 2]
    assert "there is no older one" in (tmp_path / "out-0").read_text()
    assert {path: path.read_bytes() for path in (copied / "checkpoints").rglob("*") if path.is_file()} == before


def test_a_checkpoint_that_was_asked_for_by_name_has_no_substitute(copied, text_dataset, tmp_path):
    newest = copied / "checkpoints" / "step-00000006"
    flip(newest / "rank-0000.safetensors")
    options = arguments(text_dataset, copied, "--resume", str(newest))
    assert run_ranks(2, train_telling, str(tmp_path / "out"), *options) == [2, 2]
    assert "is damaged" in (tmp_path / "out-0").read_text()


def test_a_deleted_shard_makes_it_no_checkpoint(copied):
    (copied / "checkpoints" / "step-00000006" / "rank-0001.safetensors").unlink()
    assert [manifest.step for _, manifest in whole_checkpoints(copied / "checkpoints")] == [4]


def train_with_failing_disk(output: str, *options: str | Path) -> int:
    """Rank 1 cannot write at the second save."""
    from mdseq.engine import checkpoint

    write, calls = checkpoint.write_pieces, []

    def failing(path, *args):
        calls.append(path)
        if len(calls) == 2 and os.environ["RANK"] == "1":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, *args)

    checkpoint.write_pieces = failing
    return train_telling(output, *options)


def test_a_rank_that_cannot_write_ends_the_run_on_all_and_the_save_before_stays(text_dataset, tmp_path):
    options = arguments(text_dataset, tmp_path / "run")
    assert run_ranks(2, train_with_failing_disk, str(tmp_path / "out"), *options) == [2, 2]
    told = (tmp_path / "out-0").read_text()
    assert "step-00000004: rank 1: No space left on device" in told
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-00000002"]


def test_two_runs_do_not_write_to_one_folder(copied, text_dataset, tmp_path):
    before = sorted(copied.rglob("*"))
    with (copied / "lock").open("a+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        held.write("process 12 on elsewhere\n")
        held.flush()
        assert run_ranks(2, train_telling, str(tmp_path / "out"), *arguments(text_dataset, copied)) == [2, 2]
    assert "another run is writing to" in (tmp_path / "out-0").read_text()
    assert sorted(copied.rglob("*")) == before


def test_a_folder_that_cannot_be_written_to_is_told_of_before_anything_starts(text_dataset, tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        options = arguments(text_dataset, folder / "run")
        assert run_ranks(2, train_telling, str(tmp_path / "out"), *options) == [2, 2]
        assert "cannot write the run to" in (tmp_path / "out-0").read_text()
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_another_run_is_continued_only_if_that_is_meant(copied, text_dataset, tmp_path):
    """And another model not even then."""
    options = arguments(text_dataset, copied, "schedule.steps=7", "diffusion.gamma=0.25")
    assert run_ranks(2, train_telling, str(tmp_path / "a"), *options) == [2, 2]
    assert "diffusion.gamma: 0.5 in the checkpoint, 0.25 now" in (tmp_path / "a-0").read_text()
    assert "--allow_changes" in (tmp_path / "a-0").read_text()
    options.append("--allow_changes")
    assert run_ranks(2, train_telling, str(tmp_path / "b"), *options, "model.hidden_dim=16") == [2, 2]
    told = (tmp_path / "b-0").read_text()
    assert "does not fit this model" in told
    assert "in the checkpoint, [" in told
    assert run_ranks(2, train_telling, str(tmp_path / "c"), *options) == [0, 0]
    told = (tmp_path / "c-0").read_text()
    assert "although it is of another run:\n  diffusion.gamma: 0.5 in the checkpoint, 0.25 now" in told
    assert [manifest.step for _, manifest in whole_checkpoints(copied / "checkpoints")] == [6, 7]

"""A node's own copy of a dataset is whole or absent, made once, and never trusted blindly."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from launcher.stage import stage
from mdseq.data.corpus import Corpus
from mdseq.errors import UserError


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_copy_is_made_once_and_reads_as_the_original(text_dataset: Path, tmp_path: Path) -> None:
    copy = stage(text_dataset, tmp_path / "scratch")
    assert files(copy) == {path.name: path.read_bytes() for path in text_dataset.iterdir() if path.is_file()}
    assert Corpus.open(copy, "train").num_documents == Corpus.open(text_dataset, "train").num_documents
    made = copy.stat().st_mtime_ns
    assert stage(text_dataset, tmp_path / "scratch") == copy
    assert copy.stat().st_mtime_ns == made


def test_one_that_was_interrupted_leaves_no_copy(text_dataset: Path, tmp_path: Path, monkeypatch) -> None:
    copies: list[Path] = []
    copyfile = shutil.copyfile

    def fail_late(source: Path, target: Path) -> None:
        copies.append(target)
        if len(copies) == 3:
            raise OSError(28, "No space left on device")
        copyfile(source, target)

    monkeypatch.setattr(shutil, "copyfile", fail_late)
    with pytest.raises(UserError, match=r"cannot copy .* \(cluster.scratch\): No space left on device"):
        stage(text_dataset, tmp_path)
    (folder,) = tmp_path.iterdir()
    assert list(folder.iterdir()) == []


def test_no_room_is_known_before_copying(text_dataset: Path, tmp_path: Path, monkeypatch) -> None:
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1))
    with pytest.raises(UserError, match=r"no room for .* it takes .* GB, and 0.00 are free"):
        stage(text_dataset, tmp_path)


def test_a_damaged_copy_is_noticed(text_dataset: Path, tmp_path: Path) -> None:
    copy = stage(text_dataset, tmp_path)
    shard = next(copy.glob("train-*.arrow"))
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(UserError, match=str(shard)):
        stage(text_dataset, tmp_path)


def test_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        stage(tmp_path / "nowhere", tmp_path)

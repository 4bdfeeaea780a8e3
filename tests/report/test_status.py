"""What a run says of itself can be read back, and tells whether anyone still says it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mdseq.errors import UserError
from mdseq.report.spread import Spread
from mdseq.report.status import SILENT_SECONDS, STATUS_FILE, RankStatus, RunStatus

RANKS = (RankStatus(0, "n1", 40, 1.5), RankStatus(1, "n2", 38, SILENT_SECONDS + 1))
STATUS = RunStatus("running", 1000.0, 900.0, 2, "n1", 77, "123", 40, 300, 0.5, RANKS)


def test_it_reads_back(tmp_path: Path) -> None:
    assert RunStatus.read(tmp_path) is None
    STATUS.write(tmp_path)
    assert RunStatus.read(tmp_path) == STATUS
    compared = replace(STATUS, spread=Spread(0.2, 0.4, 0.1, 0.5, 1, "n2"))
    compared.write(tmp_path)
    assert RunStatus.read(tmp_path) == compared
    assert [path.name for path in tmp_path.iterdir()] == [STATUS_FILE]


def test_one_that_knows_nothing_of_spreads_is_read(tmp_path: Path) -> None:
    values = asdict(STATUS)
    del values["spread"]
    (tmp_path / STATUS_FILE).write_text(json.dumps(values))
    assert RunStatus.read(tmp_path) == STATUS


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"state": "running"}', '{"ranks": [{"age": 3}]}'])
def test_a_damaged_one_is_a_message(tmp_path: Path, content: str) -> None:
    (tmp_path / STATUS_FILE).write_text(content)
    with pytest.raises(UserError, match=r"status\.json is damaged .*; a run that goes on writes it anew"):
        RunStatus.read(tmp_path)


def test_only_a_run_that_should_be_heard_is_missed() -> None:
    late = STATUS.written + SILENT_SECONDS + 1
    assert STATUS.is_silent(late)
    assert not STATUS.is_silent(STATUS.written + SILENT_SECONDS - 1)
    assert not replace(STATUS, state="finished").is_silent(late)
    assert STATUS.silent_ranks() == [RANKS[1]]

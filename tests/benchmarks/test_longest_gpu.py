"""Benchmarks that need a GPU run through on the CPU, so that none fails where a GPU is paid for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import longest_gpu


@pytest.mark.slow
def test_the_longest_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert longest_gpu.main(["--dry_run", "--json", str(tmp_path / "results.json")]) == 0
    results = [json.loads(line) for line in (tmp_path / "results.json").read_text().splitlines()]
    assert [result["mode"] for result in results if "mode" in result] == list(longest_gpu.MODES)
    written = sorted((result["way"], result["precision"], result["calls"]) for result in results if "way" in result)
    assert written == [
        (way, precision, calls)
        for way in ("in blocks of 16", "in one piece")
        for precision, calls in (("bf16", 10), ("bf16", 20), ("fp32", 10))
    ]
    assert all(result["rate"] > 0 for result in results)
    assert "recompute" in capsys.readouterr().out


def test_a_length_that_does_not_fit_ends_its_column(monkeypatch: pytest.MonkeyPatch) -> None:
    fits = {"none": 16, "recompute": 32, "offload": 64}

    def in_child(_: str, length: int, mode: str, dry: bool) -> list[dict]:
        return [{"length": length, "mode": mode, "rate": 1.0}] if length <= fits[mode] else []

    monkeypatch.setattr(longest_gpu, "in_child", in_child)
    asked = [
        (one.length, one.mode)
        for one in longest_gpu.longest([64, 16, 32, 128, 256], longest_gpu.MODES, True, float("inf"))
    ]
    everything, two, one = ["none", "recompute", "offload"], ["recompute", "offload"], ["offload"]
    expected = {16: everything, 32: everything, 64: two, 128: one}
    assert asked == [(length, mode) for length, modes in expected.items() for mode in modes]
    assert list(longest_gpu.longest([16], longest_gpu.MODES, True, 0.0)) == []

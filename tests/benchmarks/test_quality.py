"""The comparison of qualities runs through on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import quality


@pytest.mark.slow
def test_quality_after_training(pair_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = [
        "model.embedding_dim=16", "model.hidden_dim=32", "model.num_layers=1", "model.num_heads=2",
        "model.feedforward_dim=32", "data.row_length=64", "data.batch_size=4", "data.micro_batch_size=4",
        "optimiser.precision=fp32", "report.valid_rows=4", "report.log_interval_steps=2",
    ]  # fmt: skip
    options = [
        "--score",
        "valid",
        "--steps",
        "4",
        "--pairs",
        "2",
        "--test_pairs",
        "2",
        "--output",
        str(tmp_path / "runs"),
    ]
    assert quality.main(["--data", str(pair_dataset), "--models", "ours", *options, *tiny]) == 0
    shown = capsys.readouterr().out
    assert "20 calls, solver mask_predict, temperature 0.0" in shown
    assert "length quantile 0.45" in shown
    assert "mean error of predicted lengths, tokens: " in shown

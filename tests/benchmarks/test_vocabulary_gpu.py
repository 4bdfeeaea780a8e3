from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import vocabulary_gpu
from benchmarks.vocabulary import OURS, PLAIN


def test_a_dry_run_measures_every_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.jsonl"
    assert vocabulary_gpu.main(["--dry_run", "--json", str(file)]) == 0
    results = [json.loads(line) for line in file.read_text().splitlines()]
    assert {(result["products"], result["way"]) for result in results} >= {
        (products, way) for products in vocabulary_gpu.PRODUCTS for way in (PLAIN, OURS)
    }
    assert all(result["milliseconds"] > 0 and result["of_product"] > 0 for result in results)
    assert "dry run" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert vocabulary_gpu.main([]) == 2
    assert "--dry_run" in capsys.readouterr().err

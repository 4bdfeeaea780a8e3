from __future__ import annotations

import json

import pytest
import torch

from benchmarks import experts_gpu


def test_a_dry_run_measures_every_path(tmp_path, capsys):
    file = tmp_path / "results.jsonl"
    assert experts_gpu.main(["--dry_run", "--json", str(file)]) == 0
    results = [json.loads(line) for line in file.read_text().splitlines()]
    assert {result["table"] for result in results} == set(experts_gpu.TABLES)
    assert all(result["milliseconds"] > 0 and result["rate"] > 0 for result in results)
    assert "dry run" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do(capsys):
    assert experts_gpu.main([]) == 2
    assert "--dry_run" in capsys.readouterr().err


@pytest.mark.parametrize("spread", experts_gpu.SPREADS)
def test_counts_are_all_rows(spread):
    for case in experts_gpu.CASES:
        counts = case.counts(spread)
        assert (len(counts), sum(counts), min(counts) > 0) == (case.num_experts, case.rows, True)


def test_one_expert_has_half():
    counts = experts_gpu.Case(8, 8, 5, 800).counts("one has half")
    assert counts == [400, 100, 100, 100, 100]

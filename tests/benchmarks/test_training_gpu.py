"""Benchmarks that need a GPU run through on the CPU, so that none fails where a GPU is paid for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import training_gpu
from mdseq.model.denoiser import DenoiserConfig
from mdseq.spec import load_spec


@pytest.mark.slow
def test_a_training_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two = ["--gpus", "2", "--only", "one", "--only", "ZeRO-3, EP 2"]
    for asked, names in ((["--only", "moe 1024 4096"], ["moe"]), (two, ["one GPU", "ZeRO-3, EP 2"])):
        path = tmp_path / f"{len(names)}.json"
        assert training_gpu.main(["--dry_run", "--json", str(path), *asked]) == 0
        results = [json.loads(line) for line in path.read_text().splitlines()]
        assert sorted(result["case"]["name"] for result in results) == sorted(names)
        assert all(result["tokens_per_second"] > 0 and result["useful"] > 0 for result in results)
    assert "tokens/s" in capsys.readouterr().out


def test_useful_operations_of_a_step() -> None:
    """Of each token: 2 for a weight it meets, three times; of each visible pair: 2 products, 3.5 times."""
    spec = load_spec(None, [
        "model.embedding_dim=8", "model.hidden_dim=16", "model.num_layers=1", "model.num_heads=2",
        "model.feedforward_dim=24", "experts.num_experts=0", "attention.kind=full", "diffusion.absorbing=false",
        "data.row_length=10", "data.batch_size=1", "data.micro_batch_size=1",
    ]).spec  # fmt: skip
    config = DenoiserConfig.of(spec, 100)
    time, ends, block = (8 * 32 + 32) + (32 * 16 + 16), (8 * 16 + 16) + 2 * (16 * 16 + 16) + (16 * 8 + 8) + 16, 4 * 256
    met = time + ends + block + 3 * 16 * 24 + 2 * 16 + 100 * 9
    assert training_gpu.useful_flops(spec, config) == 3 * 2 * 10 * met + 3.5 * 4 * 8 * 2 * 10 * 10


def test_where_communication_is_alone() -> None:
    assert training_gpu.covered([(0, 2), (1, 3), (5, 6), (5.5, 5.8)]) == 4
    assert training_gpu.kind_of("ncclDevKernel_ReduceScatter_Sum_bf16") == "communication"
    assert training_gpu.kind_of("void at::native::vectorized_elementwise_kernel<8>") == "element by element"

"""When memory runs out, the message says what to lower, and by how much."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mdseq.engine.config import load_engine_config
from mdseq.model.cost import memory_per_rank
from mdseq.model.denoiser import DenoiserConfig
from mdseq.spec import load_spec
from mdseq.train.memory import is_out_of_memory, memory_advice

DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"


def test_what_allocators_say_is_understood_and_nothing_else() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60)
    assert is_out_of_memory(refused.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize(
    ("ds_config", "ranks", "rows", "expected"),
    [
        (
            "cpu",
            4,
            8,
            ["data.micro_batch_size = 4 instead of 8 saves about", "zero3.json shards weights and"],
        ),
        ("cpu", 1, 1, ["data.row_length = 1024 instead of 2048 saves about", "zero3_offload.json puts about"]),
        ("zero3", 2, 2, ["data.micro_batch_size = 1 instead of 2 saves about", "zero3_offload.json puts about"]),
    ],
)
def test_the_advice_fits_the_run(ds_config: str, ranks: int, rows: int, expected: list[str]) -> None:
    overrides = [f"data.micro_batch_size={rows}", f"data.batch_size={rows * ranks}", "data.row_length=2048"]
    spec = load_spec(None, overrides).spec
    engine = load_engine_config(DS_CONFIGS / f"{ds_config}.json", spec, ranks, on_gpu=False)
    advice = memory_advice(spec, engine, vocab_size=1000)
    assert all(words in advice for words in expected)
    parts = memory_per_rank(
        DenoiserConfig.of(spec, 1000), spec, engine.zero_stage, ranks, engine.expert_parallel_size, False
    )
    assert f"activations {parts['activations']:.2f}" in advice
    assert f"saves about {parts['activations'] / 2:.2f} GiB" in advice


def test_long_rows_are_told_of_activation_checkpointing_before_all_else() -> None:
    seen = {}
    for mode in ("none", "recompute", "offload"):
        overrides = [f"model.activation_checkpointing={mode}", "data.row_length=262144"]
        spec = load_spec(None, overrides).spec
        engine = load_engine_config(DS_CONFIGS / "zero2.json", spec, 1, on_gpu=False)
        memory = memory_per_rank(DenoiserConfig.of(spec, 1000), spec, engine.zero_stage, 1, 1, False)
        seen[mode] = memory["activations"], memory_advice(spec, engine, vocab_size=1000).splitlines()
    saved = seen["none"][0] - seen["recompute"][0]
    assert seen["none"][1][1] == (
        f"  model.activation_checkpointing = recompute saves about {saved:.2f} GiB of activations"
    )
    assert any("activation_checkpointing = offload" in line for line in seen["recompute"][1])
    assert not any("activation_checkpointing" in line for line in seen["offload"][1])

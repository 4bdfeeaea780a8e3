"""When memory runs out, the message says what to lower, and by how much."""

from __future__ import annotations

import pytest
import torch

from mdseq.engine.config import DS_CONFIG_DIR, load_engine_config
from mdseq.engine.memory import Memory, estimate_memory
from mdseq.model.denoiser import DenoiserConfig
from mdseq.spec import load_spec
from mdseq.train.memory import is_out_of_memory, out_of_memory


def test_what_allocators_say_is_understood_and_nothing_else() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60)
    assert is_out_of_memory(refused.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError("out of memory"))


def advised(ds_config: str, ranks: int, *overrides: str, on_gpu: bool = True) -> tuple[Memory, list[str]]:
    """The estimate, and the lines of the message."""
    spec = load_spec(None, overrides).spec
    engine = load_engine_config(DS_CONFIG_DIR / f"{ds_config}.json", spec, ranks, on_gpu)
    estimate = estimate_memory(DenoiserConfig.of(spec, 1000), spec, engine, on_gpu=on_gpu)
    return estimate, out_of_memory(spec, engine, vocab_size=1000, on_gpu=on_gpu).splitlines()


@pytest.mark.parametrize(
    ("ds_config", "ranks", "rows", "expected"),
    [
        (
            "cpu",
            4,
            8,
            ["data.micro_batch_size = 4 instead of 8", "zero3.json", "zero3_experts.json", "zero3_offload.json"],
        ),
        ("cpu", 1, 1, ["data.row_length = 1024 instead of 2048", "zero3_offload.json"]),
        ("zero3", 2, 2, ["data.micro_batch_size = 1 instead of 2", "zero3_experts.json", "zero3_offload.json"]),
    ],
)
def test_the_advice_fits_the_run(ds_config: str, ranks: int, rows: int, expected: list[str]) -> None:
    overrides = [f"data.micro_batch_size={rows}", f"data.batch_size={rows * ranks}", "data.row_length=2048"]
    estimate, (first, *lines) = advised(ds_config, ranks, *overrides)
    assert f"optimiser {estimate.optimiser / 2**30:.2f}" in first
    for words in expected:
        assert any(f"{words} saves about" in line for line in lines)
    saved = [float(line.split()[-2]) for line in lines]
    assert saved == sorted(saved, reverse=True)
    assert 0 < min(saved) <= max(saved) < estimate.total / 2**30


def test_on_a_cpu_the_optimiser_is_not_offered_the_memory_that_it_has() -> None:
    _, lines = advised("zero3", 2, "data.batch_size=2", on_gpu=False)
    assert len(lines) > 1
    assert not any("zero3_offload" in line for line in lines)


def test_long_rows_are_told_of_activation_checkpointing_before_all_else() -> None:
    seen = {}
    for mode in ("none", "recompute", "offload"):
        changes = [f"model.activation_checkpointing={mode}", "data.row_length=262144"]
        seen[mode] = advised("zero2", 1, *changes)
    saved = (seen["none"][0].total - seen["recompute"][0].total) / 2**30
    assert seen["none"][1][1] == f"  model.activation_checkpointing = recompute saves about {saved:.2f} GiB"
    assert any("activation_checkpointing = offload" in line for line in seen["recompute"][1])
    assert not any("activation_checkpointing" in line for line in seen["offload"][1])

"""Which way to spread a run is recommended, and what each sends."""

from __future__ import annotations

from pathlib import Path

import pytest

from mdseq.engine.communication import Communication, estimate_communication
from mdseq.engine.config import complete_engine_config
from mdseq.engine.plan import SPARE, Choice, choices, recommended, with_nearest_batch
from mdseq.model.cost import count_parameters
from mdseq.model.denoiser import DenoiserConfig
from mdseq.spec import RunSpec, load_spec

VOCAB = 1000
GIB = 2**30


def spec_of(*overrides: str, preset: str = "moe_diffuseq") -> RunSpec:
    return load_spec(Path(preset), ["optimiser.precision=bf16", *overrides]).spec


BIG = spec_of(
    "model.hidden_dim=4096", "model.num_heads=32", "model.num_layers=24", "experts.feedforward_dim=8192",
    "data.batch_size=64",
)  # fmt: skip


def of(choice: Choice | None) -> tuple[int, int, str, str] | None:
    """Stage, ranks that share experts, file and what to write into it."""
    return choice and (choice.engine.zero_stage, choice.engine.expert_parallel_size, choice.file, choice.addition)


def sent(stage: int, ranks: int, shared_by: int = 1, micro_batches: int = 1, *overrides: str) -> Communication:
    spec = spec_of("data.row_length=92", f"data.batch_size={ranks * micro_batches}", *overrides)
    values: dict = {"zero_optimization": {"stage": stage}}
    if shared_by > 1:
        values["expert_parallel"] = {"autoep_size": shared_by}
    engine = complete_engine_config(values, "test", spec, ranks, on_gpu=True)
    return estimate_communication(DenoiserConfig.of(spec, VOCAB), spec, engine, gpus_per_node=8)


COUNT = count_parameters(DenoiserConfig.of(spec_of(), VOCAB), absorbing=True)
TOKENS = 12 * 100 * 2 * 768 * 2  # bytes of a forward pass, all layers: to each of 2 experts, from 92 tokens and 8 slots


@pytest.mark.parametrize(
    ("stage", "micro_batches", "passes"),
    [(1, 1, 3), (1, 4, 3), (2, 1, 3), (2, 4, 9), (3, 1, 2), (3, 4, 8)],
)
def test_passes_over_the_weights(stage: int, micro_batches: int, passes: int) -> None:
    """Stage 1 all-reduces once (twice the bytes), stage 2 every micro-batch; stage 3 gathers and reduces in each."""
    found = sent(stage, 4, micro_batches=micro_batches)
    assert found == Communication(round(passes * COUNT.total * 2 * 3 / 4), 0)


def test_tokens_travel_to_experts_and_back_forward_and_backward() -> None:
    shared = 3 * COUNT.shared * 2 * 7 / 8
    assert sent(2, 8, 8) == Communication(round(shared + 4 * TOKENS * 7 / 8), 0)
    again = sent(2, 8, 8, 1, "model.activation_checkpointing=recompute")
    assert again == Communication(round(shared + 6 * TOKENS * 7 / 8), 0)


def test_experts_shared_within_a_node_are_alike_between_nodes() -> None:
    found = sent(2, 16, 8)
    assert found.within_nodes == round(4 * TOKENS * 7 / 8)
    assert found.between_nodes == round(3 * 2 * (COUNT.shared * 15 / 16 + COUNT.experts / 8 * 1 / 2))
    assert sent(2, 1) == Communication(0, 0)


def test_a_batch_that_cannot_be_shared_becomes_the_nearest_that_can() -> None:
    spec = spec_of("data.batch_size=16", "data.micro_batch_size=2")
    batches = {ranks: with_nearest_batch(spec, ranks).data.batch_size for ranks in (1, 2, 3, 8, 64)}
    assert batches == {1: 16, 2: 16, 3: 18, 8: 16, 64: 128}


def test_all_stages_with_experts_over_what_divides_ranks_and_experts_and_fits_in_a_node() -> None:
    found = choices(with_nearest_batch(BIG, 12), VOCAB, 12, gpus_per_node=8)
    assert [of(choice) for choice in found] == [
        (1, 1, "zero2.json", '"stage": 1'),
        (1, 2, "zero2.json", '"stage": 1 and "expert_parallel": { "autoep_size": 2 }'),
        (1, 4, "zero2.json", '"stage": 1 and "expert_parallel": { "autoep_size": 4 }'),
        (2, 1, "zero2.json", ""),
        (2, 2, "zero2.json", '"expert_parallel": { "autoep_size": 2 }'),
        (2, 4, "zero2.json", '"expert_parallel": { "autoep_size": 4 }'),
        (3, 1, "zero3.json", ""),
        (3, 2, "zero3_experts.json", '"expert_parallel": { "autoep_size": 2 }'),
        (3, 4, "zero3_experts.json", ""),
        (3, 1, "zero3_offload.json", ""),
    ]
    sizes = {choice.engine.expert_parallel_size for choice in choices(BIG, VOCAB, 16, gpus_per_node=2)}
    assert sizes == {1, 2, 8}
    dense = choices(spec_of(preset="sa_diffuseq"), VOCAB, 8, gpus_per_node=8)
    assert [choice.engine.zero_stage for choice in dense] == [1, 2, 3, 3]


def test_layers_should_wait_as_little_as_memory_allows() -> None:
    """The less memory a GPU has, the more is spread; offload is the last resort."""
    found = choices(BIG, VOCAB, 8, gpus_per_node=8)
    seen = []
    for gib in range(200, 10, -1):
        best = recommended(found, gib * GIB)
        if best is not None:
            assert best.memory.total <= (1 - SPARE) * gib * GIB
            seen.append(best)
    assert [choice.waits for choice in seen] == sorted(choice.waits for choice in seen)
    assert {choice.waits for choice in seen} >= {0, 1, 4}
    assert recommended(found, 10 * GIB) is None


def test_of_what_waits_alike_the_least_is_sent_and_files_are_taken_as_they_are() -> None:
    once = choices(with_nearest_batch(spec_of(), 16), VOCAB, 16, gpus_per_node=8)
    assert of(recommended(once, 80 * GIB)) == (2, 1, "zero2.json", "")
    often = choices(spec_of("data.batch_size=64"), VOCAB, 16, gpus_per_node=8)
    assert of(recommended(often, 80 * GIB)) == (1, 1, "zero2.json", '"stage": 1')

"""Which way to spread a run is recommended, and what each sends."""

from __future__ import annotations

from pathlib import Path

import pytest

from mdseq.engine.communication import Communication, Traffic, estimate_communication
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


def of(choice: Choice | None) -> tuple[int, int, str, tuple[str, ...]] | None:
    """Stage, ranks that share experts, file and what to write into it."""
    if choice is None:
        return None
    return choice.engine.zero_stage, choice.engine.expert_parallel_size, choice.file, choice.additions


def sent(stage: int, ranks: int, shared_by: int = 1, micro_batches: int = 1, *overrides: str) -> Communication:
    spec = spec_of("data.row_length=92", f"data.batch_size={ranks * micro_batches}", *overrides)
    values: dict = {"zero_optimization": {"stage": stage}}
    if shared_by > 1:
        values["expert_parallel"] = {"autoep_size": shared_by}
    engine = complete_engine_config(values, "test", spec, ranks, on_gpu=True)
    return estimate_communication(DenoiserConfig.of(spec, VOCAB), spec, engine, gpus_per_node=8)


COUNT = count_parameters(DenoiserConfig.of(spec_of(), VOCAB), absorbing=True)
SHARED, EXPERTS = 2 * COUNT.shared, 2 * COUNT.experts  # bytes
TOKENS = 12 * 100 * 2 * 768 * 2  # of a forward pass, all layers: to each of 2 experts, from 92 tokens and 8 slots


@pytest.mark.parametrize(
    ("stage", "micro_batches", "updates", "gathered"),
    [(1, 1, 3, 0), (1, 4, 3, 0), (2, 1, 3, 0), (2, 4, 9, 0), (3, 1, 1, 1), (3, 4, 4, 4)],
)
def test_passes_over_the_weights(stage: int, micro_batches: int, updates: int, gathered: int) -> None:
    """Stage 1 all-reduces once (twice the bytes), stage 2 every micro-batch; stage 3 gathers and reduces in each."""
    found = sent(stage, 4, micro_batches=micro_batches)
    one_pass = (SHARED + EXPERTS) * 3 / 4
    assert found == Communication(Traffic(updates * one_pass), Traffic(), Traffic(gathered * one_pass))


def test_what_is_not_kept_is_gathered_again() -> None:
    """Half of the default `stage3_max_reuse_distance` of weights is kept: of 1,000,000,000."""
    wide = "experts.feedforward_dim=8192"
    total = count_parameters(DenoiserConfig.of(spec_of(wide), VOCAB), absorbing=True).total
    found = sent(3, 4, 1, 1, wide)
    assert found.gathered.total == pytest.approx((2 * total - 5e8) * 2 * 3 / 4)


def test_tokens_travel_to_experts_and_back_forward_and_backward() -> None:
    expected = Communication(Traffic(3 * SHARED * 7 / 8), Traffic(4 * TOKENS * 7 / 8), Traffic())
    assert sent(2, 8, 8) == expected
    assert sent(2, 8, 8, 1, "model.activation_checkpointing=recompute").tokens == Traffic(6 * TOKENS * 7 / 8)


def test_a_ring_leaves_each_node_once() -> None:
    """So of eight neighbours one sends to another node; of those with the same experts, eight apart, each does."""
    assert sent(2, 16).updates.between_nodes == pytest.approx(3 * (SHARED + EXPERTS) * 15 / 16 / 8)
    found = sent(2, 16, 8)
    assert found.updates.between_nodes == pytest.approx(3 * (SHARED * 15 / 16 / 8 + EXPERTS / 8 / 2))
    assert found.tokens == Traffic(4 * TOKENS * 7 / 8)
    assert sent(2, 1) == Communication(Traffic(), Traffic(), Traffic())


def test_tokens_leave_a_node_that_has_too_few_of_the_experts() -> None:
    spec = spec_of("data.row_length=92", "data.batch_size=8")
    values = {"zero_optimization": {"stage": 2}, "expert_parallel": {"autoep_size": 8}}
    engine = complete_engine_config(values, "test", spec, 8, on_gpu=True)
    found = estimate_communication(DenoiserConfig.of(spec, VOCAB), spec, engine, gpus_per_node=2)
    assert found.tokens == Traffic(4 * TOKENS * 1 / 8, 4 * TOKENS * 6 / 8)


def test_a_batch_that_cannot_be_shared_becomes_the_nearest_that_can() -> None:
    spec = spec_of("data.batch_size=16", "data.micro_batch_size=2")
    batches = {ranks: with_nearest_batch(spec, ranks).data.batch_size for ranks in (1, 2, 3, 8, 64)}
    assert batches == {1: 16, 2: 16, 3: 18, 8: 16, 64: 128}


def test_all_stages_with_experts_over_what_divides_ranks_and_experts_and_fits_in_a_node() -> None:
    found = choices(with_nearest_batch(BIG, 12), VOCAB, 12, gpus_per_node=8)
    two, four = (f'"expert_parallel": {{ "autoep_size": {size} }}' for size in (2, 4))
    assert [of(choice) for choice in found] == [
        (1, 1, "zero2.json", ('"stage": 1',)),
        (1, 2, "zero2.json", ('"stage": 1', two)),
        (1, 4, "zero2.json", ('"stage": 1', four)),
        (2, 1, "zero2.json", ()),
        (2, 2, "zero2.json", (two,)),
        (2, 4, "zero2.json", (four,)),
        (3, 1, "zero3.json", ()),
        (3, 2, "zero3_experts.json", (two,)),
        (3, 4, "zero3_experts.json", ()),
        (3, 1, "zero3_offload.json", ()),
    ]
    sizes = {choice.engine.expert_parallel_size for choice in choices(BIG, VOCAB, 16, gpus_per_node=2)}
    assert sizes == {1, 2, 8}
    dense = choices(spec_of(preset="sa_diffuseq"), VOCAB, 8, gpus_per_node=8)
    assert [choice.engine.zero_stage for choice in dense] == [1, 2, 3, 3]


def test_the_order_of_what_was_measured_on_two_gpus() -> None:
    """docs/performance.md: ZeRO-2, then experts over both, of which ZeRO-2 and ZeRO-3 were alike, then ZeRO-3."""
    spec = spec_of(
        "model.hidden_dim=1024", "model.num_heads=16", "experts.feedforward_dim=2048", "data.row_length=16384",
        "data.batch_size=4", "data.micro_batch_size=2",
    )  # fmt: skip
    found = choices(spec, 16_384, 2, gpus_per_node=8)
    waits = {(choice.engine.zero_stage, choice.engine.expert_parallel_size): choice.wait_ms for choice in found[:-1]}
    exposed_ms = {(2, 1): 6, (2, 2): 39, (3, 2): 40, (3, 1): 72}
    for way, measured in exposed_ms.items():
        assert waits[way] == pytest.approx(measured, rel=0.15)
    assert sorted(exposed_ms, key=lambda way: waits[way]) == list(exposed_ms)


def test_the_less_memory_the_more_is_spread_and_offload_is_the_last_resort() -> None:
    found = choices(BIG, VOCAB, 8, gpus_per_node=8)
    seen = []
    for gib in range(200, 10, -1):
        best = recommended(found, gib * GIB)
        if best is not None:
            assert best.memory.total <= (1 - SPARE) * gib * GIB
            seen.append(best)
    waits = [(choice.engine.offloads_optimiser, choice.wait_ms) for choice in seen]
    assert waits == sorted(waits)
    assert len(set(waits)) > 2
    assert seen[-1].engine.offloads_optimiser
    assert recommended(found, 10 * GIB) is None


def test_bytes_between_nodes_wait_nine_times_as_long() -> None:
    found = choices(with_nearest_batch(spec_of(), 16), VOCAB, 16, gpus_per_node=8)
    whole = next(choice for choice in found if of(choice) == (2, 1, "zero2.json", ()))
    updates = whole.communication.updates
    assert whole.wait_ms == pytest.approx(3.3 * (updates.within_nodes + 9 * updates.between_nodes) / GIB)


def test_the_optimiser_stays_on_the_gpu_where_it_can() -> None:
    *_, sharded, offload = choices(spec_of(preset="sa_diffuseq"), VOCAB, 8, gpus_per_node=8)
    assert (sharded.wait_ms, sharded.memory.total > offload.memory.total) == (offload.wait_ms, True)
    assert recommended([sharded, offload], 80 * GIB) is sharded


def test_of_equal_ones_a_file_as_it_ships() -> None:
    once = choices(with_nearest_batch(spec_of(), 16), VOCAB, 16, gpus_per_node=8)
    assert of(recommended(once, 80 * GIB)) == (2, 1, "zero2.json", ())
    often = choices(spec_of("data.batch_size=64"), VOCAB, 16, gpus_per_node=8)
    assert of(recommended(often, 80 * GIB)) == (1, 1, "zero2.json", ('"stage": 1',))

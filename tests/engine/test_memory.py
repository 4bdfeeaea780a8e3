"""The memory of a rank, by hand where it is simple.

What ranks really hold is compared with it in tests/benchmarks/test_planning.py.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdseq.engine.config import DS_CONFIG_DIR, EngineConfig, complete_engine_config, read_json
from mdseq.engine.memory import Memory, estimate_memory
from mdseq.model.cost import activation_bytes, count_parameters
from mdseq.model.denoiser import DenoiserConfig
from mdseq.spec import RunSpec, load_spec

VOCAB = 1000


def spec_of(*overrides: str) -> RunSpec:
    return load_spec(Path("moe_diffuseq"), overrides).spec


def engine_of(spec: RunSpec, stage: int, ranks: int, shared_by: int = 1, **zero: Any) -> EngineConfig:
    values: dict[str, Any] = {"zero_optimization": {"stage": stage, **zero}}
    if shared_by > 1:
        values["expert_parallel"] = {"autoep_size": shared_by}
    return complete_engine_config(values, "test", spec, ranks, on_gpu=True)


def memory(stage: int, ranks: int = 1, shared_by: int = 1, *overrides: str, on_gpu: bool = True, **zero: Any) -> Memory:
    """Of `moe_diffuseq`, in rows of 64 tokens."""
    spec = spec_of("data.row_length=64", f"data.batch_size={ranks}", *overrides)
    engine = engine_of(spec, stage, ranks, shared_by, **zero)
    return estimate_memory(DenoiserConfig.of(spec, VOCAB), spec, engine, on_gpu=on_gpu)


COUNT = count_parameters(DenoiserConfig.of(spec_of(), VOCAB), absorbing=True)
P = COUNT.total


def test_one_rank_in_fp32_steps_with_all_gradients_twice() -> None:
    """In short rows the step is the fullest moment: Adam wants gradients in one piece."""
    found = memory(1, reduce_bucket_size=1)
    assert found.parts == {
        "weights": 4 * P, "gradients": 8 * P, "optimiser": 12 * P, "average": 4 * P, "activations": 0, "buffers": 0,
        "checkpoint": 0,
    }  # fmt: skip
    assert found.total == 28 * P
    assert found.on_host == 16 * P  # the copy that is written in the background
    assert found.experts == round(28 * COUNT.experts)


def test_a_cpu_holds_the_copy_of_the_checkpoint_too_and_buckets_as_far_as_they_fill() -> None:
    found = memory(1, on_gpu=False)
    assert found.checkpoint == 16 * P
    assert found.buffers == 8 * P  # all gradients, and the copy that is reduced
    assert (found.gradients, found.on_host) == (0, 0)


def test_gloo_reduces_what_stage_3_scatters_in_a_copy_of_its_own() -> None:
    found = memory(3, ranks=2, on_gpu=False, stage3_max_reuse_distance=0, stage3_prefetch_bucket_size=1)
    assert found.buffers == 12 * P
    assert found.gradients == pytest.approx(2 * P, rel=1e-3)


def test_gradients_are_fullest_in_two_buckets_and_a_copy_beside_the_share_that_has_been_taken_out() -> None:
    bucket = P // 2 + P // 10
    found = memory(2, ranks=2, reduce_bucket_size=bucket, overlap_comm=True)
    assert found.buffers == 3 * 4 * bucket
    assert found.gradients == pytest.approx(2 * P, rel=1e-3)
    assert found.activations == 0


def test_bf16_has_weights_and_gradients_of_two_bytes_and_the_rest_of_four() -> None:
    found = memory(2, 1, 1, "optimiser.precision=bf16", reduce_bucket_size=1)
    assert (found.weights, found.gradients, found.optimiser, found.average) == (2 * P, 6 * P, 12 * P, 4 * P)


def test_long_rows_are_fullest_where_the_forward_pass_ends() -> None:
    spec = spec_of("data.row_length=65536", "data.batch_size=2")
    engine = engine_of(spec, 2, 1, reduce_bucket_size=1000, overlap_comm=True)
    config = DenoiserConfig.of(spec, VOCAB)
    found = estimate_memory(config, spec, engine, on_gpu=True)
    assert found.activations == activation_bytes(config, spec, on_gpu=True)
    assert found.gradients == 4 * P  # of the micro-batch before
    assert found.buffers == 3 * 1000 * 4  # two buckets, and the copy of one that is reduced


@pytest.mark.parametrize(("stage", "weights"), [(1, 1), (2, 1), (3, 1 / 4)])
def test_what_each_stage_shards(stage: int, weights: float) -> None:
    found = memory(stage, ranks=4, reduce_bucket_size=1, stage3_prefetch_bucket_size=1, stage3_max_reuse_distance=0)
    assert found.weights == pytest.approx(weights * 4 * P, rel=1e-3)
    assert (found.optimiser, found.average) == (pytest.approx(3 * P, rel=1e-3), pytest.approx(P, rel=1e-3))


def test_stage_3_keeps_what_it_has_gathered_for_the_backward_pass() -> None:
    """So it saves no weights of a model below half of `stage3_max_reuse_distance`."""
    few = {"reduce_bucket_size": 1, "stage3_prefetch_bucket_size": 1}
    rows = "data.row_length=65536"
    kept = memory(3, 4, 1, rows, **few)
    assert kept.weights == pytest.approx(4 * P * (1 + 1 / 4), rel=1e-3)
    found = memory(3, 4, 1, rows, **few, stage3_max_reuse_distance=2_000_000)
    assert found.weights == kept.weights - 4 * (P - 1_000_000)


def test_stage_3_is_given_the_model_whole() -> None:
    """Beside many other ranks, with little to do, that is when it needs most."""
    found = memory(3, 512, reduce_bucket_size=1, stage3_prefetch_bucket_size=1, stage3_max_reuse_distance=0)
    assert found.weights == pytest.approx(4 * P * (1 + 1 / 512), rel=1e-3)
    assert found.optimiser == found.activations == 0


def test_spread_experts_are_hosted_in_part_and_sharded_over_their_copies() -> None:
    found = memory(2, ranks=8, shared_by=4, reduce_bucket_size=1)
    assert found.weights == 4 * (COUNT.shared + COUNT.experts // 4)
    assert found.optimiser == pytest.approx(12 * P / 8, rel=1e-3)
    all_on_their_own = memory(3, 8, 8, "data.row_length=65536", stage3_prefetch_bucket_size=1)
    assert all_on_their_own.weights == pytest.approx(4 * (P / 8 + COUNT.shared), rel=1e-3)  # experts are not gathered


def test_offload_takes_the_optimiser_off_a_gpu_and_nowhere_on_a_cpu() -> None:
    offload = {"offload_optimizer": {"device": "cpu"}}
    found = memory(3, 2, **offload)
    assert found.optimiser == found.average == found.gradients == 0
    # Moments, fp32 weights, average and two gradients; and the copy of all but the gradients.
    assert found.on_host == pytest.approx((16 + 4 + 4 + 16) * P / 2, rel=1e-3)
    assert memory(3, 2, on_gpu=False, **offload) == memory(3, 2, on_gpu=False)


STAGES, GPUS, EXPERT_RANKS = (1, 2, 3), (1, 2, 4, 8, 16, 64), (1, 2, 4, 8)
FILES = {1: "zero2.json", 2: "zero2.json", 3: "zero3.json"}


def as_shipped(stage: int, ranks: int, shared_by: int, spec: RunSpec) -> Memory:
    values = read_json(DS_CONFIG_DIR / FILES[stage])
    values["zero_optimization"]["stage"] = stage
    if shared_by > 1:
        values["expert_parallel"] = {"autoep_size": shared_by}
    engine = complete_engine_config(values, "test", spec, ranks, on_gpu=True)
    return estimate_memory(DenoiserConfig.of(spec, VOCAB), spec, engine, on_gpu=True)


def state(memory: Memory) -> int:
    return memory.weights + memory.gradients + memory.optimiser + memory.average


@st.composite
def specs(draw: st.DrawFn) -> RunSpec:
    """For any of the numbers of ranks, with one micro-batch on most."""
    heads = draw(st.integers(1, 16))
    return spec_of(
        f"model.hidden_dim={64 * heads}", f"model.num_heads={heads}", f"model.num_layers={draw(st.integers(1, 48))}",
        f"experts.feedforward_dim={draw(st.integers(1, 64)) * 64}", f"data.row_length={draw(st.integers(8, 65536))}",
        f"optimiser.precision={draw(st.sampled_from(['fp32', 'bf16']))}", "data.batch_size=64",
    )  # fmt: skip


@given(specs(), st.sampled_from(STAGES))
def test_more_ranks_never_need_more_for_each(spec: RunSpec, stage: int) -> None:
    for shared_by in EXPERT_RANKS:
        found = [as_shipped(stage, ranks, shared_by, spec) for ranks in GPUS if ranks % shared_by == 0 and ranks > 1]
        for fewer, more in pairwise(found):
            assert more.optimiser <= fewer.optimiser or fewer.optimiser == 0  # at the start there is none yet
            assert more.total <= fewer.total + 64


@given(specs(), st.sampled_from([2, 4, 8, 64]))
def test_a_higher_stage_never_needs_more_state_outside_of_the_layers(spec: RunSpec, ranks: int) -> None:
    """Stage 3 gathers layers besides, which is why its total may be more."""
    few = {"reduce_bucket_size": 1, "stage3_prefetch_bucket_size": 1, "stage3_max_reuse_distance": 0}
    first, second, third = (
        estimate_memory(DenoiserConfig.of(spec, VOCAB), spec, engine_of(spec, stage, ranks, **few), on_gpu=True)
        for stage in STAGES
    )
    assert second.total <= first.total
    started = third.optimiser > 0
    assert not started or state(third) <= state(second) + 4 * 64


@given(specs(), st.sampled_from(STAGES))
def test_experts_spread_further_never_take_more(spec: RunSpec, stage: int) -> None:
    found = [as_shipped(stage, 8, shared_by, spec) for shared_by in EXPERT_RANKS]
    whole = [memory.weights for memory in found]
    assert whole == sorted(whole, reverse=True)

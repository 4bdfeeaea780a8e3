"""What a model is said to cost is what it costs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mdseq.diffusion.absorbing import AbsorbingState
from mdseq.model.cost import attention_cost, count_parameters, memory_per_rank
from mdseq.model.denoiser import Denoiser, DenoiserConfig
from mdseq.spec import RunSpec, load_spec, preset_names

VOCAB = 1000


def variants() -> list[tuple[str, list[str]]]:
    presets = [(name, []) for name in preset_names()]
    return [
        *presets,
        ("quickstart", ["attention.num_global=0"]),
        ("quickstart", ["diffusion.absorbing=false", "experts.top_k=4"]),
        ("quickstart", ["diffusion.self_conditioning=0.5"]),
        ("quickstart", ["diffusion.self_conditioning=0.0", "diffusion.normalise_embeddings=true"]),
    ]


@pytest.mark.parametrize(("preset", "overrides"), variants())
def test_parameters_are_those_of_the_modules(preset: str, overrides: list[str]) -> None:
    spec = load_spec(Path(preset), overrides).spec
    config = DenoiserConfig.of(spec, VOCAB)
    with torch.device("meta"):
        denoiser = Denoiser(config)
        absorbing = AbsorbingState(config.embedding_dim, spec.diffusion.absorbing)
    named = [*denoiser.named_parameters(), *absorbing.named_parameters()]
    expert = sum(weight.numel() for name, weight in named if ".experts." in name)
    total = sum(weight.numel() for _, weight in named)

    count = count_parameters(config, spec.diffusion.absorbing)
    assert (count.experts, count.shared, count.total) == (expert, total - expert, total)
    share = config.top_k / config.num_experts if config.num_experts else 0
    assert count.active == count.shared + share * expert


def memory(spec: RunSpec, stage: int, ranks: int, expert_ranks: int = 1, offload: bool = False) -> dict:
    return memory_per_rank(DenoiserConfig.of(spec, VOCAB), spec, stage, ranks, expert_ranks, offload)


def test_attention_costs_what_its_patterns_make_visible() -> None:
    spec = load_spec(Path("diffuseq"), ["data.row_length=32"]).spec
    full = attention_cost(DenoiserConfig.of(spec, VOCAB), row_length=32)
    assert full.flops == 12 * 4 * 32 * 32 * 768  # layers, two products of a multiplication and an addition
    assert full.of_dense == 1

    changes = ["attention.window=2", "attention.num_global=0", "attention.dilation=[1,[1,8]]", "attention.full_every=4"]
    sparse = attention_cost(DenoiserConfig.of(load_spec(Path("moe_diffuseq"), changes).spec, VOCAB), row_length=32)
    near, far = 32 + 2 * (31 + 30), 32 + 2 * (24 + 16)  # pairs of a window of two, dilated by 1 and by 8
    pairs = 6 * near + 3 * (near + far) / 2 + 3 * 32 * 32
    assert sparse.flops == 4 * 768 * pairs
    assert sparse.of_dense == pytest.approx(pairs / (12 * 32 * 32))


SPEC = load_spec(Path("moe_diffuseq")).spec
GIB = 2**30


def test_one_rank_holds_everything() -> None:
    parts = memory(SPEC, stage=1, ranks=1)
    total = count_parameters(DenoiserConfig.of(SPEC, VOCAB), absorbing=True).total
    expected = {"weights": 4, "gradients": 4, "optimiser": 12, "average": 4}
    for name, bytes_per_weight in expected.items():
        assert parts[name] * GIB == pytest.approx(total * bytes_per_weight)


def test_each_stage_shards_one_part_more() -> None:
    whole = memory(SPEC, stage=1, ranks=1)
    sharded_parts = {
        1: {"optimiser", "average"},
        2: {"optimiser", "average", "gradients"},
        3: {"optimiser", "average", "gradients", "weights"},
    }
    for stage, sharded in sharded_parts.items():
        parts = memory(SPEC, stage, ranks=4)
        for name, gib in parts.items():
            assert gib == pytest.approx(whole[name] / 4 if name in sharded else whole[name]), (stage, name)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_more_ranks_never_cost_more(stage: int) -> None:
    for expert_parallel in (False, True):
        previous = memory(SPEC, stage, 1)
        for ranks in (2, 4, 8):
            parts = memory(SPEC, stage, ranks, expert_ranks=ranks if expert_parallel else 1)
            assert all(parts[name] <= previous[name] for name in parts)
            assert sum(parts.values()) < sum(previous.values())
            previous = parts


def test_expert_parallelism_spreads_the_experts_of_the_weights() -> None:
    count = count_parameters(DenoiserConfig.of(SPEC, VOCAB), absorbing=True)
    parts = memory(SPEC, stage=1, ranks=4, expert_ranks=4)
    assert parts["weights"] * GIB == pytest.approx(4 * (count.shared + count.experts / 4))


def test_offload_takes_the_optimiser_off_the_device() -> None:
    with_it, without = (memory(SPEC, stage=3, ranks=2, offload=offload) for offload in (False, True))
    assert without["optimiser"] == without["average"] == 0
    assert {**with_it, "optimiser": 0.0, "average": 0.0} == without


def test_bf16_halves_the_weights_and_activations_grow_with_the_tokens() -> None:
    half = load_spec(Path("moe_diffuseq"), ["optimiser.precision=bf16"]).spec
    assert memory(half, 1, 1)["weights"] == pytest.approx(memory(SPEC, 1, 1)["weights"] / 2)

    def activations(*overrides: str) -> float:
        return memory(load_spec(Path("moe_diffuseq"), overrides).spec, 1, 1)["activations"]

    assert activations("data.row_length=8192") == pytest.approx(2 * activations("data.row_length=4096"))
    assert activations("data.micro_batch_size=4") == pytest.approx(4 * activations())


def test_activation_checkpointing_leaves_the_inputs_of_the_blocks_and_one_block() -> None:
    def activations(mode: str, num_layers: int) -> float:
        changes = [f"model.activation_checkpointing={mode}", f"model.num_layers={num_layers}"]
        return memory(load_spec(Path("moe_diffuseq"), changes).spec, 1, 1)["activations"] * GIB

    tokens, value_bytes, hidden = SPEC.data.row_length, 4, SPEC.model.hidden_dim
    inputs = tokens * value_bytes * hidden
    assert activations("recompute", 12) - activations("recompute", 11) == pytest.approx(inputs)
    assert activations("recompute", 12) - activations("offload", 12) == pytest.approx(10 * inputs)
    assert activations("offload", 12) == pytest.approx(activations("offload", 2))
    assert activations("recompute", 1) == pytest.approx(activations("none", 1) + inputs)

"""What a model is said to cost is what it costs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from mdseq.diffusion.absorbing import AbsorbingState
from mdseq.diffusion.objective import DiffusionObjective
from mdseq.model.cost import activation_bytes, attention_cost, count_parameters
from mdseq.model.denoiser import Denoiser, DenoiserConfig
from mdseq.spec import load_spec, preset_names
from tests.diffusion.batches import make_batch

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


def kept_bytes(*overrides: str) -> int:
    """What a forward pass of one row, which one document fills, keeps for the backward pass besides the weights."""
    spec = load_spec(Path("quickstart"), [*overrides, *ONE_ROW]).spec
    torch.manual_seed(0)
    objective = DiffusionObjective(spec, VOCAB)
    weights = {weight.untyped_storage().data_ptr() for weight in objective.parameters()}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        loss = objective(make_batch([[(0, LENGTH)]], row_length=LENGTH))
    assert loss.requires_grad
    return sum(num_bytes for start, num_bytes in kept.items() if start not in weights)


LENGTH = 400  # long enough for the attention of long rows
ONE_ROW = [f"data.row_length={LENGTH}", "data.micro_batch_size=1"]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["experts.num_experts=0"],
        ["experts.top_k=1"],
        ["model.hidden_dim=256", "model.num_layers=2"],
        ["experts.feedforward_dim=1024"],
        ["model.norm=post"],
        ["model.activation_checkpointing=recompute"],
    ],
    ids=str,
)
def test_activations_are_what_a_cpu_keeps(overrides: list[str]) -> None:
    spec = load_spec(Path("quickstart"), [*overrides, *ONE_ROW]).spec
    config = DenoiserConfig.of(spec, VOCAB)
    expected = activation_bytes(config, spec, on_gpu=False)
    if spec.model.activation_checkpointing == "none":
        expected -= LENGTH * VOCAB * 4  # logits, which are gone when the forward pass ends
        assert kept_bytes(*overrides) == pytest.approx(expected, rel=0.02)
    else:  # one layer at a time is computed again in the backward pass, and is not yet there
        assert kept_bytes(*overrides) < expected


def activations(*overrides: str, preset: str = "moe_diffuseq", on_gpu: bool = True, spread: bool = False) -> int:
    spec = load_spec(Path(preset), overrides).spec
    return activation_bytes(DenoiserConfig.of(spec, VOCAB), spec, on_gpu=on_gpu, spread_experts=spread)


def test_activations_of_a_gpu_by_hand() -> None:
    """A row of 92 tokens and 8 global slots: 12 layers of 768 with two experts of 1,024 a slot."""
    in_fp32 = 4 * (92 * 8 * 128 + 3 * 128 * VOCAB + 92 * VOCAB)
    expert = 768 + 3 * 1024
    assert activations("data.row_length=92") == 4 * 100 * 12 * (9 * 768 + 2 * expert) + in_fp32
    half = activations("data.row_length=92", "optimiser.precision=bf16")
    assert half == 2 * 100 * 12 * (9 * 768 + 2 * expert) + in_fp32
    spread = activations("data.row_length=92", spread=True)
    assert spread == 4 * 100 * 12 * (9 * 768 + 2 * (expert + 768)) + in_fp32
    assert activations("data.row_length=92", "data.batch_size=1") == activations("data.row_length=92")


def test_activation_checkpointing_leaves_the_inputs_of_the_blocks_and_one_block() -> None:
    def of(mode: str, num_layers: int) -> int:
        return activations(f"model.activation_checkpointing={mode}", f"model.num_layers={num_layers}")

    inputs = (4096 + 8) * 4 * 768
    assert of("recompute", 12) - of("recompute", 11) == inputs
    assert of("recompute", 12) - of("offload", 12) == 10 * inputs
    assert of("offload", 12) == of("offload", 2)
    assert of("recompute", 1) == of("none", 1) + inputs

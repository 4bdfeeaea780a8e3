"""What DeepSpeed hosts computes what plain PyTorch computes."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from mdseq.data.batch import Batch, StepTotals
from mdseq.diffusion.objective import DiffusionObjective
from mdseq.engine.config import load_engine_config
from mdseq.engine.ema import WeightAverage
from mdseq.engine.gradients import check_gradient_norm
from mdseq.engine.partitions import Partition, partitions_of
from mdseq.spec import RunSpec, load_spec
from tests.dist.ranks import run_ranks

DS_CONFIGS = Path(__file__).parent.parent.parent / "ds_configs"
VOCAB, ROWS, LENGTH = 50, 4, 24


def tiny_spec(top_k: int = 2, activation_checkpointing: str = "none") -> RunSpec:
    return load_spec(
        None,
        [
            "model.embedding_dim=8", "model.hidden_dim=16", "model.num_layers=2", "model.num_heads=2",
            "attention.window=4", "attention.num_global=1", "experts.num_experts=4", "experts.feedforward_dim=8",
            "diffusion.num_timesteps=8", "data.row_length=24", "data.batch_size=4", "data.micro_batch_size=2",
            # A large epsilon: Adam would blow rounding errors in gradients near zero up to full steps.
            "optimiser.learning_rate=1e-2", "optimiser.epsilon=1e-3", "optimiser.gradient_clipping=0.5",
            f"experts.top_k={top_k}", f"model.activation_checkpointing={activation_checkpointing}",
            "report.sample_interval_steps=0",
        ],
    ).spec  # fmt: skip


def rows(first: int, count: int, step: int, micro_batches: int) -> Batch:
    """Rows first..first+count of the step's global batch."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(5, VOCAB, (ROWS, LENGTH), generator=generator)[first : first + count]
    target = torch.arange(LENGTH).expand(count, LENGTH) >= 6
    return Batch(
        tokens_bl=tokens,
        document_bl=torch.zeros_like(tokens),
        position_bl=torch.arange(LENGTH).expand_as(tokens),
        target_bl=target,
        row_b=torch.arange(first, first + count),
        first_document_b=torch.arange(first, first + count),
        source_length_bm=torch.full((count, 1), 6),
        num_documents=1,
        step=step,
        totals=StepTotals(ROWS, ROWS * LENGTH, ROWS * (LENGTH - 6), ROWS, micro_batches),
    )


def build(ds_config: str, num_ranks: int, top_k: int = 2, activation_checkpointing: str = "none"):
    from mdseq.engine.build import build_engine, start_processes

    start_processes()
    spec = tiny_spec(top_k, activation_checkpointing)
    torch.manual_seed(0)
    objective = DiffusionObjective(spec, VOCAB)
    plain = copy.deepcopy(objective)
    config = load_engine_config(DS_CONFIGS / f"{ds_config}.json", spec, num_ranks, on_gpu=False)
    return build_engine(objective, config), plain


def train_and_show(ds_config: str, num_ranks: int) -> dict:
    """Five steps, then this rank's pieces of the weights and of their average; and with blocks computed twice."""
    results = [train(ds_config, num_ranks, mode) for mode in ("none", "recompute")]
    for which in ("weights", "average"):
        for plain, sparing in zip(*(result[which] for result in results), strict=True):
            for (name, _, expected), (_, _, found) in zip(plain, sparing, strict=True):
                assert torch.equal(found, expected), f"activation checkpointing changes the {which} of {name}"
    return results[0]


def train(ds_config: str, num_ranks: int, activation_checkpointing: str) -> dict:
    import torch.distributed as dist

    engine, _ = build(ds_config, num_ranks, activation_checkpointing=activation_checkpointing)
    norms: list[float] = []
    check_gradient_norm(engine, lambda norm: norms.append(norm) is None)
    partitions = partitions_of(engine)
    average = WeightAverage(partitions, decay=0.6)
    for step in range(5):
        rank, share = dist.get_rank(), ROWS // num_ranks
        for first in range(rank * share, (rank + 1) * share, 2):
            engine.backward(engine(rows(first, 2, step, micro_batches=2)))
            engine.step()
        average.update(step)
    return {
        "weights": [cut(one, one.weights) for one in partitions],
        "average": [cut(one, values) for one, values in zip(partitions, average.values, strict=True)],
        "grad_norm": norms[-1],
    }


def cut(partition: Partition, flat: torch.Tensor) -> list[tuple[str, int, torch.Tensor]]:
    """Each piece's name, start and values."""
    return [
        (piece.name, piece.start, flat[piece.offset : piece.offset + piece.numel].clone()) for piece in partition.pieces
    ]


def assembled(results: list[dict], which: str, shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """Whole weights of the pieces of all ranks, which must hold each value once."""
    whole = {name: torch.zeros(shape).flatten() for name, shape in shapes.items()}
    count = {name: torch.zeros(shape).flatten() for name, shape in shapes.items()}
    for result in results:
        for name, start, values in (piece for pieces in result[which] for piece in pieces):
            whole[name][start : start + len(values)] = values
            count[name][start : start + len(values)] += 1
    assert all((seen == 1).all() for seen in count.values())
    return {name: whole[name].view(shape) for name, shape in shapes.items()}


def train_plainly() -> tuple[dict, dict, float]:
    """The oracle: one process, torch's AdamW, a copy of the weights averaged after each step."""
    spec = tiny_spec()
    torch.manual_seed(0)
    objective = DiffusionObjective(spec, VOCAB)
    optimiser = torch.optim.AdamW(objective.parameters(), lr=1e-2, eps=1e-3, weight_decay=0.0)
    average = {name: weight.detach().clone() for name, weight in objective.named_parameters()}
    for step in range(5):
        optimiser.zero_grad()
        objective(rows(0, ROWS, step, micro_batches=1)).backward()
        norm = torch.nn.utils.clip_grad_norm_(objective.parameters(), 0.5)
        optimiser.step()
        decay = min(0.6, (1 + step) / (10 + step))
        for name, weight in objective.named_parameters():
            average[name].lerp_(weight.detach(), 1 - decay)
    return {name: weight.detach() for name, weight in objective.named_parameters()}, average, float(norm)


@pytest.mark.parametrize("ds_config", ["cpu", "zero2", "zero3", "zero3_experts", "zero3_offload"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_weights_their_average_and_the_gradient_norm_equal_plain_pytorch(ds_config, num_ranks):
    weights, average, norm = train_plainly()
    shapes = {name: weight.shape for name, weight in weights.items()}
    results = run_ranks(num_ranks, train_and_show, ds_config, num_ranks)
    for which, expected in (("weights", weights), ("average", average)):
        found = assembled(results, which, shapes)
        for name in shapes:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)
    for result in results:
        assert result["grad_norm"] == pytest.approx(norm, rel=1e-4)


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def compare_expert_layers(num_ranks: int, top_k: int) -> tuple[str, list[tuple[str, float]]]:
    """AutoEP's layer beside ours: output and gradients for the same input on every rank."""
    engine, plain = build("zero3_experts", num_ranks, top_k)
    ours, adopted = plain.denoiser.blocks[0].feedforward, engine.module.denoiser.blocks[0].feedforward
    generator = torch.Generator().manual_seed(0)
    x, upstream = torch.randn(2, 3, 33, 16, generator=generator)
    outputs, gradients = [], []
    for layer in (ours, adopted):
        z = x.clone().requires_grad_()
        layer.zero_grad()
        out = layer(z)
        outputs.append(out.detach())
        gradients.append(torch.autograd.grad(out, z, upstream)[0])
    differences = [
        ("output", relative_difference(outputs[1], outputs[0])),
        ("gradient of the input", relative_difference(gradients[1], gradients[0])),
    ]
    out = ours(x)
    expected = torch.autograd.grad(out, list(ours.parameters()), upstream)
    local = [*adopted.experts.parameters(), adopted.router.gate.weight]
    found = torch.autograd.grad(adopted(x), local, upstream)
    w1, w2, w3, gate = found
    first = adopted.ep_rank * adopted.num_local_experts
    mine = slice(first, first + adopted.num_local_experts)
    expected_gate, expected_gate_up, expected_down = expected
    # Each rank sends the same tokens, so an expert sees them once from every rank that shares it.
    for name, ours_, theirs in (
        ("gradient of gate and up", expected_gate_up[mine] * adopted.ep_size, torch.cat([w1, w3], dim=1)),
        ("gradient of down", expected_down[mine] * adopted.ep_size, w2),
        ("gradient of the router", expected_gate, gate),
    ):
        differences.append((name, relative_difference(theirs, ours_)))
    return type(adopted).__name__, differences


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_our_experts_equal_the_layer_that_deepspeed_puts_in_their_place(top_k):
    for name, differences in run_ranks(2, compare_expert_layers, 2, top_k):
        assert name == "AutoEPMoELayer"
        for what, difference in differences:
            assert difference < 2e-6, f"{what}: {difference}"

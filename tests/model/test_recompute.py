"""Keeping less for the backward pass changes nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from mdseq.diffusion.objective import DiffusionObjective
from mdseq.model.recompute import CpuStore, block_caller, in_pieces
from mdseq.sparse import Documents
from tests.diffusion.batches import EVERYTHING, PACKED, POSTERIOR, SQUARED_ERROR, make_batch, tiny_objective

VARIANTS = {
    "experts": SQUARED_ERROR,
    "dense": [*SQUARED_ERROR, "experts.num_experts=0"],
    "post-norm, one expert, global sources": [
        *POSTERIOR, "model.norm=post", "experts.top_k=1", "attention.num_source_global=2",
    ],
    "everything": EVERYTHING,
}  # fmt: skip


def trained(mode: str, *overrides: str) -> tuple[DiffusionObjective, Tensor]:
    objective = tiny_objective(f"model.activation_checkpointing={mode}", *overrides)
    loss = objective(make_batch(PACKED))
    loss.backward()
    return objective, loss


@pytest.mark.parametrize("mode", ["recompute", "offload"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_the_gradients_and_the_load_are_the_same_to_the_bit(mode: str, variant: str) -> None:
    (plain, expected), (sparing, found) = trained("none", *VARIANTS[variant]), trained(mode, *VARIANTS[variant])
    assert torch.equal(found, expected)
    for (name, weight), other in zip(plain.named_parameters(), sparing.parameters(), strict=True):
        assert weight.grad is not None
        assert other.grad is not None
        assert torch.equal(weight.grad, other.grad), name
    if plain.balance is not None:  # each router counts once, the second time around too
        assert torch.equal(sparing.balance.tally, plain.balance.tally)


@contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """Bytes of all that is kept for the backward pass inside, weights and what is kept twice once."""
    kept: dict[int, Tensor] = {}
    total: list[int] = []

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        yield total
    total.append(sum(x.untyped_storage().nbytes() for x in kept.values()))


def bytes_of(mode: str, num_layers: int) -> int:
    objective = tiny_objective(f"model.activation_checkpointing={mode}", f"model.num_layers={num_layers}")
    weights = sum(weight.nbytes for weight in objective.denoiser.blocks.parameters())
    with counted_bytes() as total:
        objective(make_batch(PACKED * 8))
    return total[0] - (weights if mode == "none" else 0)


def test_a_layer_more_costs_its_input_and_no_more() -> None:
    """As `activation_bytes` has it."""
    per_layer = {mode: (bytes_of(mode, 6) - bytes_of(mode, 2)) / 4 for mode in ("none", "recompute")}
    slots, value_bytes, hidden, experts = 8 * len(PACKED) * (24 + 3), 4, 16, 4
    for_balance = 4 * experts  # router logits, and what the losses of their balance make of them
    assert per_layer["recompute"] <= slots * value_bytes * (hidden + for_balance)
    assert per_layer["none"] > 12 * per_layer["recompute"]


def test_before_and_after_the_blocks_too_the_input_is_all_that_is_kept() -> None:
    denoiser = tiny_objective("model.activation_checkpointing=recompute", "model.embedding_dim=4").denoiser
    z_blz, time_bl = torch.randn(3, 50, 4, requires_grad=True), torch.zeros(3, 50)
    layout_bytes = 8 * 3 * 51 * 2  # where each slot's content stands, and back
    inputs = 4 * 3 * (50 * 4 + 3 * 51 * 16)  # of what comes before, of two blocks, and of what comes after
    with counted_bytes() as total:
        denoiser(z_blz, time_bl, Documents.whole(torch.tensor([50, 50, 50]), 50))
    assert total[0] <= inputs + layout_bytes


def test_without_gradients_nothing_is_kept_and_blocks_run_plainly() -> None:
    calls = []

    def block(x: Tensor, shared: str) -> Tensor:
        calls.append(shared)
        return x * 2

    x = torch.ones(3, requires_grad=True)
    with torch.no_grad():
        assert torch.equal(block_caller("recompute")(block, x, "a"), 2 * x)
    assert calls == ["a"]
    block_caller("recompute")(block, x, "b").prod().backward()
    assert calls == ["a", "b"]  # of a product with a number, nothing is needed
    assert x.grad is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_what_a_gpu_keeps_in_cpu_memory_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mdseq.model.recompute.PIECE_BYTES", 1000)
    store = CpuStore()
    expected = [torch.randn(3, 1 + 100 * n, 2, device="cuda") for n in range(4)]
    tickets = [store.put(x.clone()) for x in expected]
    torch.empty(10**6, device="cuda").fill_(7.0)  # over the memory that the copies had
    for ticket, x in zip(tickets[::-1], expected[::-1], strict=True):
        assert torch.equal(store.get(ticket), x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_blocks_whose_inputs_were_kept_in_cpu_memory_have_the_same_gradients() -> None:
    weights = [torch.randn(64, 64, device="cuda", requires_grad=True) for _ in range(4)]
    x = torch.randn(33, 64, device="cuda", requires_grad=True)
    gradients = []
    for mode in ("none", "recompute", "offload"):
        call, out = block_caller(mode), x
        for weight in weights:
            out = call(lambda x, weight: (x @ weight).tanh(), out, weight)
        gradients.append(torch.autograd.grad(out.square().sum(), [x, *weights]))
    for other in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, gradients[0], strict=True))


def test_what_is_in_cpu_memory_stays_there() -> None:
    store, x = CpuStore(), torch.ones(3)
    assert store.get(store.put(x)) is x


@pytest.mark.parametrize("overrides", [["experts.num_experts=4"], ["experts.num_experts=0"]], ids=["experts", "dense"])
def test_long_rows_pass_the_feedforward_layers_in_pieces(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    plain, expected = trained("none", *overrides)
    monkeypatch.setattr("mdseq.model.recompute.PIECE_SLOTS", 7)
    sparing, found = trained("recompute", *overrides)
    torch.testing.assert_close(found, expected)
    for weight, other in zip(plain.parameters(), sparing.parameters(), strict=True):
        torch.testing.assert_close(other.grad, weight.grad)
    with torch.no_grad():
        torch.testing.assert_close(plain(make_batch(PACKED)), expected)


@pytest.mark.parametrize("with_gradients", [True, False])
def test_pieces_keep_their_inputs_only(with_gradients: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mdseq.model.recompute.PIECE_SLOTS", 10)
    lengths: list[int] = []

    def inside(x_nd: Tensor) -> Tensor:
        lengths.append(len(x_nd))
        return x_nd.exp().exp().exp().exp()

    x_nd = torch.randn(24, 3, requires_grad=True)
    with torch.set_grad_enabled(with_gradients), counted_bytes() as total:
        out_nd = in_pieces(inside, x_nd, recompute=True)
    assert lengths == [10, 10, 4]
    assert total == [x_nd.nbytes if with_gradients else 0]
    assert torch.equal(out_nd, inside(x_nd))

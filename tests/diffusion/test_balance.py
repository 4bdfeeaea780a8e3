"""The routers' losses are Switch's and ST-MoE's, over real slots of the global batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mdseq.diffusion.balance import RouterBalance

LAYERS, EXPERTS, TOP_K, SLOTS = 3, 5, 2, 40


def random_case(seed: int = 0) -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(SLOTS, EXPERTS, generator=generator) * (1 + layer) for layer in range(LAYERS)]
    return logits, torch.rand(SLOTS, generator=generator) < 0.7


def transcription(logits: list[torch.Tensor], real: torch.Tensor, share_je: np.ndarray) -> tuple[float, float]:
    """Sums over real slots of E sum_e f_e P_e and of (logsumexp)^2, each the mean over layers, in float64."""
    balance, z = [], []
    for layer, tensor in enumerate(logits):
        logits_ne = tensor.double().numpy()[real.numpy()]
        exponential = np.exp(logits_ne)
        probability = exponential / exponential.sum(axis=1, keepdims=True)
        balance.append(sum(EXPERTS * np.dot(share_je[layer], row) for row in probability))
        z.append(sum(np.log(row.sum()) ** 2 for row in exponential))
    return float(np.mean(balance)), float(np.mean(z))


def test_losses_against_their_transcription() -> None:
    logits, real = random_case()
    balance = RouterBalance(LAYERS, EXPERTS, TOP_K)
    share_je = np.random.default_rng(0).dirichlet(np.ones(EXPERTS), LAYERS)
    balance.load_state_dict({"share_je": torch.tensor(share_je, dtype=torch.float32)})
    ours = [loss.item() for loss in balance.losses(logits, real)]
    assert ours == pytest.approx(transcription(logits, real, share_je), rel=1e-5)


def test_shares_are_those_of_the_step_before() -> None:
    logits, real = random_case()
    balance = RouterBalance(LAYERS, EXPERTS, TOP_K)
    assert balance.share_je.tolist() == pytest.approx(np.full((LAYERS, EXPERTS), 1 / EXPERTS))
    balance.losses(logits, real)
    assert (balance.share_je == 1 / EXPERTS).all()  # known before the forward pass: nothing changes within a step

    expected = np.zeros((LAYERS, EXPERTS))
    for layer, tensor in enumerate(logits):
        for row in tensor.numpy()[real.numpy()]:
            expected[layer, np.argsort(row)[-TOP_K:]] += 1
    assert np.array_equal(balance.tally.numpy(), expected)
    balance.end_step()
    assert balance.share_je.numpy() == pytest.approx(expected / (TOP_K * int(real.sum())))
    assert (balance.tally == 0).all()
    second = [loss.item() for loss in balance.losses(logits, real)]
    assert second == pytest.approx(transcription(logits, real, balance.share_je.double().numpy()), rel=1e-5)


def test_padding_counts_nowhere() -> None:
    logits, real = random_case()
    others = [torch.where(real[:, None], tensor, 50 * torch.randn_like(tensor)) for tensor in logits]
    states = []
    for each in (logits, others):
        each = [tensor.clone().requires_grad_() for tensor in each]
        balance = RouterBalance(LAYERS, EXPERTS, TOP_K)
        balance.share_je = torch.linspace(0.1, 0.3, EXPERTS).expand(LAYERS, EXPERTS)
        losses = balance.losses(each, real)
        gradients = torch.autograd.grad(sum(losses), each)
        assert all((gradient[~real] == 0).all() for gradient in gradients)
        states.append((*losses, balance.tally))
    for a, b in zip(*states, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shares", [None, [0.5, 0.25, 0.25, 0.0]])
def test_a_uniform_router_loses_exactly_one_a_slot(shares: list[float] | None) -> None:
    balance = RouterBalance(num_layers=2, num_experts=4, top_k=2)
    if shares:
        balance.share_je = torch.tensor([shares, shares])
    loss, _ = balance.losses([torch.zeros(9, 4)] * 2, torch.ones(9, dtype=torch.bool))
    assert loss.item() == 9.0


def test_even_shares_lose_one_and_a_collapsed_router_loses_the_number_of_experts() -> None:
    logits = torch.full((9, 4), -50.0)
    logits[:, 2] = 50.0
    balance = RouterBalance(num_layers=1, num_experts=4, top_k=1)
    real = torch.ones(9, dtype=torch.bool)
    assert balance.losses([logits], real)[0].item() == pytest.approx(9 * 1.0)
    balance.end_step()
    assert balance.losses([logits], real)[0].item() == pytest.approx(9 * 4.0)


def test_the_gradient_takes_probability_from_the_busy_expert() -> None:
    logits = torch.zeros(9, 4, requires_grad=True)
    balance = RouterBalance(num_layers=1, num_experts=4, top_k=1)
    balance.share_je = torch.tensor([[0.7, 0.1, 0.1, 0.1]])
    balance.losses([logits], torch.ones(9, dtype=torch.bool))[0].backward()
    assert (logits.grad[:, 0] > 0).all()
    assert (logits.grad[:, 1:] < 0).all()


@pytest.mark.parametrize("pieces", [2, 4, 8])
def test_micro_batches_add_up_to_the_batch(pieces: int) -> None:
    logits, real = random_case()
    whole, parts = (RouterBalance(LAYERS, EXPERTS, TOP_K) for _ in range(2))
    for _ in range(3):  # shares of the earlier steps included
        expected = torch.stack(whole.losses(logits, real))
        chunks = zip(*(tensor.chunk(pieces) for tensor in logits), strict=True)
        sums = [
            torch.stack(parts.losses(list(chunk), mask)) for chunk, mask in zip(chunks, real.chunk(pieces), strict=True)
        ]
        torch.testing.assert_close(sum(sums), expected)
        whole.end_step()
        parts.end_step()
        assert torch.equal(whole.share_je, parts.share_je)


def test_a_step_of_padding_only() -> None:
    balance = RouterBalance(LAYERS, EXPERTS, TOP_K)
    losses = balance.losses(random_case()[0], torch.zeros(SLOTS, dtype=torch.bool))
    assert [loss.item() for loss in losses] == [0.0, 0.0]
    balance.end_step()
    assert torch.isfinite(balance.share_je).all()


def test_the_load_is_that_of_the_steps_since_it_was_taken() -> None:
    balance = RouterBalance(num_layers=1, num_experts=2, top_k=1)
    first, second = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    for logits in (first, first, first, second):
        balance.losses([logits], torch.ones(1, dtype=torch.bool))
        balance.end_step()
    assert balance.take_load().tolist() == [[0.75, 0.25]]
    balance.losses([second], torch.ones(1, dtype=torch.bool))
    balance.end_step()
    assert balance.take_load().tolist() == [[0.0, 1.0]]
    assert balance.take_load().tolist() == [[0.0, 0.0]]


def test_state_round_trip() -> None:
    logits, real = random_case()
    balance, again = (RouterBalance(LAYERS, EXPERTS, TOP_K) for _ in range(2))
    balance.losses(logits, real)
    balance.end_step()
    again.load_state_dict({name: value.clone() for name, value in balance.state_dict().items()})
    for ours, theirs in zip(balance.losses(logits, real), again.losses(logits, real), strict=True):
        assert torch.equal(ours, theirs)

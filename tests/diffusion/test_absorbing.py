"""The forward process with the soft absorbing state has the distribution of method.md 1.4."""

from __future__ import annotations

import pytest
import torch

from mdseq.diffusion.absorbing import AbsorbingSchedule, AbsorbingState, Absorption, corrupt
from mdseq.diffusion.schedule import NoiseSchedule
from mdseq.noise import NoiseKey, Purpose
from tests.diffusion.batches import make_batch, tiny_objective

SCHEDULE = NoiseSchedule("sqrt", 2000)
Z, LENGTH, ROWS = 4, 50, 400


def noised(timestep: int, gamma: float = 0.0, m: float = 3.0) -> dict[str, torch.Tensor]:
    """Many copies of one z_0, noised."""
    key = NoiseKey(seed=0, step=0, row_b=torch.arange(ROWS))
    t = torch.full((ROWS, LENGTH), timestep)
    alpha, sigma = SCHEDULE.alpha_sigma(t)
    z_0 = torch.linspace(-2, 2, Z).expand(ROWS, LENGTH, Z)
    m_z = torch.full((Z,), m)
    replaced = key.uniform(Purpose.ABSORBING, LENGTH) <= gamma * sigma
    epsilon = key.normal(Purpose.DIFFUSION, LENGTH, Z)
    z_t = corrupt(z_0, m_z, alpha, sigma, epsilon, replaced)
    return {"z_t": z_t, "z_0": z_0, "m": m_z, "alpha": alpha, "sigma": sigma, "replaced": replaced}


@pytest.mark.parametrize("timestep", [0, 200, 1000, 1999])
def test_targets_drift_from_z_0_to_m(timestep: int) -> None:
    """z_t ~ N(alpha z_0 + (1 - alpha) m, sigma^2)."""
    x = noised(timestep)
    alpha, sigma = x["alpha"][0, 0].double(), x["sigma"][0, 0].double()
    samples = x["z_t"].flatten(0, 1).double()
    n = len(samples)
    mean = alpha * x["z_0"][0, 0] + (1 - alpha) * x["m"]
    assert ((samples.mean(0) - mean).abs() < 4 * sigma / n**0.5).all()
    assert ((samples.var(0) / sigma**2 - 1).abs() < 4 * (2 / n) ** 0.5).all()
    correlation = torch.corrcoef(samples.T) - torch.eye(Z)
    assert (correlation.abs() < 5 / n**0.5).all()


def test_at_the_end_only_m_and_noise_are_left() -> None:
    x = noised(1999)
    samples = x["z_t"] - x["m"]
    assert samples.mean().abs() < 0.02
    assert (samples.std() - 1).abs() < 0.02


def test_without_m_it_is_the_plain_process() -> None:
    x = noised(700, m=0.0)
    z_t = x["alpha"][..., None] * x["z_0"]
    assert (x["z_t"] - z_t).mean().abs() < 0.02


def test_replaced_targets_are_exactly_m_without_noise() -> None:
    x = noised(1000, gamma=0.5)
    replaced = x["replaced"]
    assert replaced.any()
    assert (x["z_t"][replaced] == x["m"]).all()
    assert not (x["z_t"][~replaced] == x["m"]).all(dim=-1).any()


@pytest.mark.parametrize(("timestep", "rate"), [(0, 0.06), (200, 0.28), (500, 0.35), (1000, 0.42), (1999, 0.50)])
def test_the_published_rates_of_replacement(timestep: int, rate: float) -> None:
    """gamma * sigma_t, for gamma = 0.5 and T = 2000."""
    x = noised(timestep, gamma=0.5)
    share = x["replaced"].float().mean().item()
    assert share == pytest.approx(0.5 * x["sigma"][0, 0].item(), abs=4 * (0.25 / (ROWS * LENGTH)) ** 0.5)
    assert share == pytest.approx(rate, abs=0.015)


def test_the_objective_replaces_at_this_rate_and_only_with_an_absorbing_state() -> None:
    """What the denoiser receives: exactly m at gamma * sigma_t of the targets, never at the source."""
    batch = make_batch([[(4, 60)]] * 60, row_length=64)
    for overrides, expected in (
        (["diffusion.gamma=0.5"], 0.5),
        (["diffusion.gamma=0.0"], 0.0),
        (["diffusion.absorbing=false", "diffusion.gamma=0.5"], 0.0),
    ):
        objective = tiny_objective("diffusion.timestep_sampling=uniform", *overrides)
        received = []
        objective.denoiser.register_forward_pre_hook(lambda _, args, to=received: to.append(args))
        objective(batch)
        z_t, time = received[0][:2]
        absorbed = (z_t == objective.absorbing()).all(dim=-1)
        _, sigma = objective.schedule.alpha_sigma((time[:, -1] * 20 / 1000).round().long())
        assert not absorbed[:, :4].any()
        assert absorbed.sum() / (60 * 60) == pytest.approx(expected * sigma.mean().item(), abs=0.03)


@pytest.mark.parametrize("gamma", [1.0, 0.6])
def test_uniform_shares_are_the_documents_own_whatever_t_is(gamma: float) -> None:
    """Each document loses a share of its targets drawn from (0, gamma]; its tokens are lost independently."""
    target = 200
    batch = make_batch([[(4, target), (2, target)]] * 400, row_length=2 * target + 6)
    objective = tiny_objective(
        "diffusion.timestep_sampling=uniform", "diffusion.absorbing_schedule=uniform", f"diffusion.gamma={gamma}"
    )
    received = []
    objective.denoiser.register_forward_pre_hook(lambda _, args: received.append(args))
    objective(batch)
    z_t, time = received[0][:2]
    absorbed_bl = (z_t == objective.absorbing()).all(dim=-1)
    assert not absorbed_bl[~batch.target_bl].any()
    lost_n = absorbed_bl[batch.target_bl].view(800, target).double()
    share_n = NoiseKey(0, batch.step, batch.row_b).uniform(Purpose.SHARE, 2).flatten().double() * gamma
    error_n = (lost_n.mean(dim=1) - share_n) / (share_n * (1 - share_n) / target).sqrt().clamp(min=1 / target)
    assert error_n.abs().max() < 5
    assert error_n.square().mean().item() == pytest.approx(1, abs=0.2)
    ordered_n = share_n.sort().values / gamma
    assert (ordered_n - torch.linspace(0, 1, 800)).abs().max() < 1.63 / 800**0.5  # Kolmogorov-Smirnov, 1 %
    time_n = time[batch.target_bl].view(800, target)[:, 0].double()
    assert torch.corrcoef(torch.stack([time_n, share_n]))[0, 1].abs() < 4 / 800**0.5


@pytest.mark.parametrize(("schedule", "expected"), [("sigma", 0.5 * 0.9), ("uniform", 0.5 * 0.2)])
def test_on_the_way_from_noise_the_share_falls_with_sigma_or_evenly(
    schedule: AbsorbingSchedule, expected: float
) -> None:
    assert Absorption(0.5, schedule).probability(0.2, 0.9) == pytest.approx(expected)


def test_the_vector_is_learned_or_zero() -> None:
    torch.manual_seed(0)
    learned, fixed = AbsorbingState(4096, learned=True), AbsorbingState(4096, learned=False)
    assert learned().norm().item() == pytest.approx(1.0, abs=0.05)  # N(0, 1/z)
    assert [name for name, _ in learned.named_parameters()] == ["m"]
    learned().sum().backward()
    assert torch.equal(learned.m.grad, torch.ones(4096))
    assert torch.equal(fixed(), torch.zeros(4096))
    assert not list(fixed.parameters())
    assert not fixed.state_dict()

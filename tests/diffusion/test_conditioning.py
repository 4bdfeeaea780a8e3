"""What the denoiser is given besides noisy targets: an earlier estimate of them, and their source, or not."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from mdseq.data.batch import Batch
from mdseq.diffusion.estimates import Reader
from mdseq.diffusion.objective import DiffusionObjective
from tests.diffusion.batches import ANCHOR, PACKED, POSTERIOR, SQUARED_ERROR, make_batch, tiny_objective

MANY = [[(2, 3)] * 8] * 100
T = 20
LAST_TIME = 1000 * (T - 1) / T
NO_TIME = 2000  # no target is ever told so
EVENLY = ["diffusion.timestep_sampling=uniform", "experts.num_experts=0", "model.num_layers=1"]


@dataclass(frozen=True)
class Call:
    """One call of the denoiser: what it was shown, and what it said."""

    z_blz: Tensor
    time_bl: Tensor
    estimate_blz: Tensor | None
    f_blz: Tensor


def calls_of(objective: DiffusionObjective, batch: Batch) -> list[Call]:
    calls: list[Call] = []
    hook = objective.denoiser.register_forward_hook(
        lambda _, args, out: calls.append(Call(args[0], args[1], args[3], out))
    )
    objective(batch)
    hook.remove()
    return calls


def helped(lag: float = 0.25, share: float = 1.0, *overrides: str) -> DiffusionObjective:
    return tiny_objective(
        *overrides, f"diffusion.self_conditioning={share}", f"diffusion.self_conditioning_lag={lag}", *EVENLY
    )


def of_documents(values_bl: Tensor, batch: Batch) -> list[Tensor]:
    """The values at the targets of each document that has some."""
    groups = []
    for b in range(len(values_bl)):
        for document in range(batch.num_documents):
            here = batch.target_bl[b] & (batch.document_bl[b] == document)
            if here.any():
                groups.append(values_bl[b][here])
    return groups


def test_without_self_conditioning_there_is_one_pass() -> None:
    (call,) = calls_of(helped(share=0.0), make_batch(PACKED))
    assert call.estimate_blz is None


@pytest.mark.parametrize("overrides", [SQUARED_ERROR, [*ANCHOR, "diffusion.estimate=softmax"], POSTERIOR])
def test_the_second_pass_is_given_the_estimate_of_the_first_at_targets(overrides: list[str]) -> None:
    objective, batch = helped(0.25, 1.0, *overrides), make_batch(PACKED)
    first, second = calls_of(objective, batch)
    assert first.estimate_blz is None
    assert second.estimate_blz is not None
    m_z = objective.absorbing()
    reader = Reader.of(objective.spec.diffusion.estimate, objective.denoiser.vocabulary(), m_z)
    log_snr_bl = objective.schedule.log_snr(first.time_bl.double() * T / 1000)
    expected = reader.clean(first.f_blz, reader.scores(first.f_blz, first.z_blz, log_snr_bl), batch.target_bl)
    torch.testing.assert_close(second.estimate_blz[batch.target_bl], expected[batch.target_bl], rtol=1e-4, atol=1e-5)
    assert (second.estimate_blz[~batch.target_bl] == 0).all()


def test_the_first_pass_is_earlier_on_the_way_from_noise_by_a_uniform_lag() -> None:
    objective, batch = helped(lag=0.4), make_batch(MANY, row_length=40)
    first, second = calls_of(objective, batch)
    lags = []
    for early, late in zip(of_documents(first.time_bl, batch), of_documents(second.time_bl, batch), strict=True):
        assert len(early.unique()) == len(late.unique()) == 1, "all of a document at one time"
        assert late[0] <= early[0] <= LAST_TIME
        assert early[0] - late[0] <= 400.01
        if late[0] < LAST_TIME - 400:  # none of these is cut off at the last timestep
            lags.append(early[0] - late[0])
    lags_n = torch.stack(lags)
    assert lags_n.max() > 395
    assert lags_n.min() < 5
    assert lags_n.mean().item() == pytest.approx(200, abs=4 * 400 / (12 * len(lags_n)) ** 0.5)
    assert (first.time_bl[~batch.target_bl] == 0).all()


def test_without_a_lag_the_first_pass_sees_what_the_second_sees() -> None:
    first, second = calls_of(helped(lag=0.0), make_batch(PACKED))
    assert torch.equal(first.z_blz, second.z_blz)
    assert torch.equal(first.time_bl, second.time_bl)


def test_both_passes_are_on_one_path() -> None:
    """The same eps, and what is replaced by m later is so earlier, where there is more noise."""
    objective, batch = helped(lag=0.5), make_batch(PACKED)
    m_z, words = objective.absorbing(), objective.denoiser.embed(batch.tokens_bl)
    noises, replaced = [], []
    for call in calls_of(objective, batch):
        alpha_bl, sigma_bl = objective.schedule.alpha_sigma(call.time_bl.double() * T / 1000)
        noises.append((call.z_blz - m_z - alpha_bl[..., None] * (words - m_z)) / sigma_bl[..., None])
        replaced.append((call.z_blz == m_z).all(dim=-1) & batch.target_bl)
    kept = batch.target_bl & ~replaced[0]
    torch.testing.assert_close(noises[0][kept], noises[1][kept], rtol=1e-3, atol=1e-4)
    assert (replaced[0] | ~replaced[1]).all()
    assert replaced[0].sum() > replaced[1].sum() > 0


def test_the_share_of_steps_that_are_helped() -> None:
    """All documents of a step are, on whatever rank, or none; and those without do not pay for a second pass."""
    objective, batch = helped(0.1, 0.3), make_batch(PACKED)
    num_calls = []
    for step in range(300):
        calls = calls_of(objective, replace(batch, step=step))
        other = replace(batch, step=step, row_b=batch.row_b + 1000)
        assert len(calls_of(objective, other)) == len(calls), "decided by the step alone"
        assert calls[-1].estimate_blz is None or (calls[-1].estimate_blz[batch.target_bl] != 0).any(dim=-1).all()
        num_calls.append(len(calls))
    share = num_calls.count(2) / 300
    assert num_calls.count(1) + num_calls.count(2) == 300
    assert share == pytest.approx(0.3, abs=4 * (0.21 / 300) ** 0.5)


@pytest.mark.parametrize("overrides", [SQUARED_ERROR, POSTERIOR])
def test_no_gradient_goes_through_the_first_pass(overrides: list[str]) -> None:
    """The gradient is that of the second pass alone, its estimate a constant."""
    objective, batch = helped(0.25, 1.0, *overrides), make_batch(PACKED)
    first, second = calls_of(objective, batch)
    assert not first.f_blz.requires_grad
    assert second.f_blz.requires_grad
    assert second.estimate_blz is not None
    assert not second.estimate_blz.requires_grad

    objective(batch).backward()
    expected = {name: p.grad.clone() for name, p in objective.named_parameters()}
    objective.zero_grad()
    constant_blz, calls = second.estimate_blz.clone(), []

    def give_a_constant(_: object, args: tuple) -> tuple:
        calls.append(args)
        return args if len(calls) == 1 else (*args[:3], constant_blz)

    objective.denoiser.register_forward_pre_hook(give_a_constant)
    objective(batch).backward()
    for name, p in objective.named_parameters():
        assert torch.equal(p.grad, expected[name]), name


def test_the_routers_are_counted_once() -> None:
    """Their losses and their loads are those of the second pass."""
    lag = ["diffusion.self_conditioning=1.0", "diffusion.self_conditioning_lag=0.5"]
    objective, batch, gates = tiny_objective(*lag), make_batch(PACKED), []
    for name, module in objective.denoiser.named_modules():
        if name.endswith("feedforward.gate"):
            module.register_forward_hook(lambda _, __, out: gates.append(out.detach()))
    objective(batch)
    assert len(gates) == 4, "two layers, two passes"
    slots = batch.totals.tokens + objective.config.num_global * batch.totals.documents
    assert objective.balance is not None
    assert objective.balance.tally.sum().item() == slots * objective.config.top_k * 2

    real_n = objective.denoiser.layout(batch.documents()).real_bs.flatten()
    z_of = [sum(gate[real_n].logsumexp(dim=-1).square().sum() for gate in pair) / 2 for pair in (gates[:2], gates[2:])]
    assert objective.statistics.take()["router_z"] == pytest.approx((z_of[1] / slots).item(), rel=1e-5)
    assert z_of[0] != z_of[1]


def test_a_dropped_source_is_m_without_a_time() -> None:
    """Not an absorbed target's, whatever t; targets, padding and all draws are as they were."""
    batch = make_batch(PACKED)
    source_bl = batch.documents().real_bl & ~batch.target_bl
    objective = tiny_objective("diffusion.condition_dropout=1.0")
    (dropped,), (kept,) = calls_of(objective, batch), calls_of(tiny_objective(), batch)
    assert (dropped.z_blz[source_bl] == objective.absorbing()).all()
    assert (dropped.time_bl[source_bl] == NO_TIME).all()
    assert (kept.time_bl[source_bl] == 0).all()
    assert torch.equal(dropped.z_blz[~source_bl], kept.z_blz[~source_bl])
    assert torch.equal(dropped.time_bl[~source_bl], kept.time_bl[~source_bl])


def test_a_dropped_source_cannot_be_guessed_from_the_loss() -> None:
    """Other source tokens change nothing, where the rounding term does not see them either."""
    batch, other = make_batch(PACKED, seed=0), make_batch(PACKED, seed=1)
    tokens_bl = torch.where(batch.target_bl, batch.tokens_bl, other.tokens_bl)
    changed = Batch(**{**vars(batch), "tokens_bl": tokens_bl})
    for share, same in (("1.0", True), ("0.0", False)):
        losses = [tiny_objective(f"diffusion.condition_dropout={share}")(each).item() for each in (batch, changed)]
        assert (losses[0] == losses[1]) == same


def test_the_share_of_documents_that_lose_their_source() -> None:
    batch = make_batch(MANY, row_length=40)
    objective = tiny_objective("diffusion.condition_dropout=0.4", *EVENLY)
    (call,) = calls_of(objective, batch)
    source_bl = batch.documents().real_bl & ~batch.target_bl
    words = objective.denoiser.embed(batch.tokens_bl)
    lost_bl = (call.z_blz == objective.absorbing()).all(dim=-1)
    count = 0
    for b in range(len(MANY)):
        for document in range(8):
            here = source_bl[b] & (batch.document_bl[b] == document)
            lost = bool(lost_bl[b][here].all())
            count += lost
            assert (call.time_bl[b][here] == (NO_TIME if lost else 0)).all()
            assert lost or torch.equal(call.z_blz[b][here], words[b][here])
    assert count / 800 == pytest.approx(0.4, abs=4 * (0.24 / 800) ** 0.5)


def test_the_share_of_source_tokens_that_are_lost() -> None:
    """Each by itself; targets, padding and what is kept are as they were."""
    batch = make_batch(MANY, row_length=40)
    objective = tiny_objective("diffusion.source_dropout=0.3", *EVENLY)
    (call,), (kept,) = calls_of(objective, batch), calls_of(tiny_objective(*EVENLY), batch)
    source_bl = batch.documents().real_bl & ~batch.target_bl
    lost_bl = source_bl & (call.time_bl == NO_TIME)
    assert (call.z_blz[lost_bl] == objective.absorbing()).all()
    assert torch.equal(call.z_blz[~lost_bl], kept.z_blz[~lost_bl])
    assert torch.equal(call.time_bl[~lost_bl], kept.time_bl[~lost_bl])
    count = int(source_bl.sum())
    assert int(lost_bl.sum()) / count == pytest.approx(0.3, abs=4 * (0.21 / count) ** 0.5)


@pytest.mark.parametrize(
    "overrides",
    [["diffusion.self_conditioning=0.5"], ["diffusion.condition_dropout=0.5"], ["diffusion.source_dropout=0.5"]],
)
def test_the_draws_do_not_depend_on_the_company(overrides: list[str]) -> None:
    """What is dropped is a matter of seed, step, row and place."""
    objective = tiny_objective(*overrides, *EVENLY)
    whole = calls_of(objective, make_batch(PACKED))[-1]
    again = calls_of(objective, make_batch(PACKED, row_length=31))[-1]
    real_bl = make_batch(PACKED).documents().real_bl
    assert torch.equal(whole.time_bl[real_bl], again.time_bl[:, :24][real_bl])
    if whole.estimate_blz is not None and again.estimate_blz is not None:
        assert torch.equal(whole.estimate_blz[real_bl] == 0, again.estimate_blz[:, :24][real_bl] == 0)

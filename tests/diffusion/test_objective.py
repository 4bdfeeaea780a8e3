"""The training loss against independent transcriptions, and what it must not depend on."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mdseq.data.batch import Batch
from mdseq.diffusion.objective import DiffusionObjective
from mdseq.diffusion.timesteps import HISTORY
from mdseq.noise import NoiseKey, Purpose
from tests.diffusion.batches import VOCAB, make_batch, take_rows, tiny_objective

ONE_DOCUMENT_A_ROW = [[(4, 9)], [(2, 20)], [(1, 5)], [(10, 14)], [(0, 24)], [(23, 1)]]
PACKED = [[(4, 6), (2, 5)], [(3, 20)], [(1, 5), (2, 2), (4, 7)], [(0, 8)]]


def observed(objective: DiffusionObjective, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, and what went into and came out of the denoiser: z_t, time, f."""
    seen = []
    hook = objective.denoiser.register_forward_hook(lambda _, args, out: seen.append((args[0], args[1], out)))
    loss = objective(batch)
    hook.remove()
    ((z_t, time, f),) = seen
    return loss, z_t.detach(), time, f.detach()


def make_importance_uneven(objective: DiffusionObjective) -> None:
    """Give the timestep sampler a full history, so that draws have weights of their own."""
    generator = torch.Generator().manual_seed(5)
    history = torch.rand(objective.schedule.num_timesteps, HISTORY, generator=generator) * 4 + 0.1
    objective.timesteps.load_state_dict(
        {"squared_loss_th": history, "num_seen_t": torch.full((len(history),), float(HISTORY))}
    )


class Transcription:
    """Method.md 3.3, 3.4 and 1.4 in NumPy and float64, one document at a time; only f is taken from the model."""

    def __init__(self, objective: DiffusionObjective, batch: Batch, f: Tensor, published: bool) -> None:
        spec, self.batch, self.published = objective.spec, batch, published
        self.T, self.gamma = spec.diffusion.num_timesteps, spec.diffusion.gamma * spec.diffusion.absorbing
        self.emb = objective.denoiser.embedding.weight.detach().double().numpy()
        self.bias = objective.denoiser.head.bias.detach().double().numpy()
        self.m = objective.absorbing().detach().double().numpy()
        self.f = f.double().numpy()
        u = np.arange(self.T + 1) / self.T
        signal = 1 - np.sqrt(u + 1e-4)
        beta = np.minimum(1 - signal[1:] / signal[:-1], 0.999)
        self.abar = np.cumprod(1 - beta)

        key = NoiseKey(spec.seed, batch.step, batch.row_b)
        length, dim = batch.tokens_bl.shape[1], self.emb.shape[1]
        self.embedding_noise = key.normal(Purpose.EMBEDDING, length, dim).double().numpy()
        self.epsilon = key.normal(Purpose.DIFFUSION, length, dim).double().numpy()
        self.uniform = key.uniform(Purpose.ABSORBING, length).numpy()
        t, w = objective.timesteps.draw(key, batch.num_documents)
        self.t, self.w = t.numpy(), w.double().numpy()
        self.tokens, self.target = batch.tokens_bl.numpy(), batch.target_bl.numpy()
        self.document = batch.document_bl.numpy()

    def position(self, b: int, i: int) -> tuple[np.ndarray, float, float]:
        """z_t, the loss and the weight of one position."""
        document = max(self.document[b, i], 0)  # padding goes with the row's first document
        t, weight = self.t[b, document], self.w[b, document]
        word = self.emb[self.tokens[b, i]]
        noised = self.target[b, i] or (self.published and self.document[b, i] < 0)  # DiffuSeq's input_mask
        z_0 = word
        if noised or self.published:
            z_0 = word + math.sqrt(1 - self.abar[0]) * self.embedding_noise[b, i]
        z_t = z_0
        if noised:
            alpha, sigma = math.sqrt(self.abar[t]), math.sqrt(1 - self.abar[t])
            z_t = alpha * (z_0 - self.m) + sigma * self.epsilon[b, i] + self.m
            if self.uniform[b, i] <= self.gamma * sigma:
                z_t = self.m
        goal = word if t == 0 else z_0
        mse = np.mean((goal - self.f[b, i]) ** 2)
        tT = np.mean((math.sqrt(self.abar[-1]) * (z_0 - self.m)) ** 2)  # about u = z - m; m = 0 without it
        logits = self.emb @ z_0 + self.bias
        dnll = np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[self.tokens[b, i]]
        return z_t, mse + tT + dnll, weight

    def loss(self) -> float:
        """The weighted mean over all positions (published) or over target positions, and 0.01 ||m||."""
        rows, length = self.tokens.shape
        losses = []
        for b in range(rows):
            for i in range(length):
                if self.published or self.target[b, i]:
                    _, loss, weight = self.position(b, i)
                    losses.append(weight * loss)
        return float(np.mean(losses) + 0.01 * np.linalg.norm(self.m))


@pytest.mark.parametrize("published", [True, False], ids=["published", "target"])
@pytest.mark.parametrize("num_timesteps", [4, 100])  # with 4, t = 0 and the prior term tT count for something
@pytest.mark.parametrize("absorbing", [True, False])
@pytest.mark.parametrize("importance", [True, False])
@pytest.mark.parametrize("rows", [ONE_DOCUMENT_A_ROW, PACKED], ids=["one a row", "packed"])
def test_the_loss_against_its_transcription(
    published: bool, num_timesteps: int, absorbing: bool, importance: bool, rows: list
) -> None:
    objective = tiny_objective(
        f"diffusion.objective={'published' if published else 'target'}",
        f"diffusion.num_timesteps={num_timesteps}",
        f"diffusion.absorbing={str(absorbing).lower()}",
        "experts.num_experts=0",
    )
    if importance:
        make_importance_uneven(objective)
    batch = make_batch(rows)
    loss, z_t, time, f = observed(objective, batch)
    transcription = Transcription(objective, batch, f, published)
    assert loss.item() == pytest.approx(transcription.loss(), rel=1e-5)
    if importance:
        assert len(np.unique(transcription.w.round(4))) > 1
    if num_timesteps == 4:
        assert (transcription.t == 0).any()

    for b, i in np.ndindex(*batch.tokens_bl.shape):
        expected, _, _ = transcription.position(b, i)
        assert z_t[b, i].double().numpy() == pytest.approx(expected, abs=1e-5)
        noised = batch.target_bl[b, i] or (published and batch.document_bl[b, i] < 0)
        told = transcription.t[b, max(batch.document_bl[b, i], 0)] * 1000 / num_timesteps if noised else 0
        assert time[b, i].item() == pytest.approx(told)


def test_the_sources_are_received_clean_and_at_time_zero() -> None:
    """Exactly the word embeddings, whatever the noise level of their document."""
    objective, batch = tiny_objective(), make_batch(PACKED)
    _, z_t, time, _ = observed(objective, batch)
    clean = ~batch.target_bl
    words = objective.denoiser.embedding(batch.tokens_bl)
    assert torch.equal(z_t[clean], words[clean])
    assert (time[clean] == 0).all()
    assert (z_t[batch.target_bl] != words[batch.target_bl]).any(dim=-1).all()
    assert (time[batch.target_bl] > 0).any()


def test_only_predictions_at_targets_count() -> None:
    """Junk predicted at source and padding positions changes neither the loss nor any gradient."""
    batch = make_batch(PACKED)
    results = []
    for junk in (0.0, 100.0):
        objective = tiny_objective()
        mask = junk * ~batch.target_bl[..., None]
        objective.denoiser.register_forward_hook(lambda _, __, out, mask=mask: out + mask)
        loss = objective(batch)
        loss.backward()
        results.append([loss, *(p.grad for p in objective.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_predictions_everywhere_count_as_published() -> None:
    batch = make_batch(PACKED)
    for where in (batch.target_bl, ~batch.target_bl & batch.documents().real_bl, ~batch.documents().real_bl):
        losses = []
        for junk in (0.0, 100.0):
            objective = tiny_objective("diffusion.objective=published")
            mask = junk * where[..., None]
            objective.denoiser.register_forward_hook(lambda _, __, out, mask=mask: out + mask)
            losses.append(objective(batch).item())
        assert losses[1] > losses[0] + 100


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["experts.num_experts=0"],
        ["diffusion.objective=published"],
        ["attention.num_source_global=2", "attention.dilation=[[1,2]]"],
    ],
)
@pytest.mark.parametrize("sizes", [[1, 1, 1, 1], [2, 2], [1, 3]])
def test_the_loss_of_a_batch_is_the_mean_over_its_micro_batches(overrides: list[str], sizes: list[int]) -> None:
    """And so are its gradients, its history and its balance, however the rows are spread (design.md 5.1, 5.3)."""
    batch = make_batch(PACKED)
    whole, parts = tiny_objective(*overrides), tiny_objective(*overrides)
    make_importance_uneven(whole)
    make_importance_uneven(parts)
    for _ in range(2):  # in the second step, experts and timesteps have their history of the first
        whole.zero_grad()
        parts.zero_grad()
        expected = whole(batch)
        expected.backward()
        losses, first = [], 0
        for size in sizes:
            rows = list(range(first, first + size))
            loss = parts(take_rows(batch, rows, micro_batches=len(sizes))) / len(sizes)
            loss.backward()
            losses.append(loss.item())
            first += size
        assert sum(losses) == pytest.approx(expected.item(), rel=1e-5)
        for (name, mine), theirs in zip(parts.named_parameters(), whole.parameters(), strict=True):
            scale = theirs.grad.abs().max().clamp(min=1e-3)
            assert (mine.grad - theirs.grad).abs().max() <= 1e-5 * scale, name
        torch.testing.assert_close(parts.timesteps.tally, whole.timesteps.tally)
        for each in (whole, parts):
            each.timesteps.end_step()
            if each.balance is not None:
                each.balance.end_step()
        if whole.balance is not None:
            assert torch.equal(parts.balance.share_je, whole.balance.share_je)
    ours, theirs = parts.statistics.take(), whole.statistics.take()
    # a micro-batch's sum is scaled by their number, so the reported mean is the global loss
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_leading_source_tokens_are_global_and_none_is_counted_twice() -> None:
    """Of every document, as many as the spec says; what the routers see is as many slots as before."""
    batch, seen = make_batch(PACKED), []
    objective = tiny_objective("attention.num_source_global=2")
    hook = objective.denoiser.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    objective(batch)
    hook.remove()
    (documents,) = seen
    source = ~batch.target_bl & batch.documents().real_bl
    assert torch.equal(documents.global_bl, source & (batch.position_bl < 2))
    assert documents.global_bl.any()
    layout = objective.denoiser.layout(documents)
    assert layout.real_bs.sum() == batch.totals.tokens + objective.config.num_global * batch.totals.documents
    assert objective.statistics.take()["balance"] == pytest.approx(1.0)  # a mean over them: shares are even at first


def test_the_order_of_rows_does_not_matter() -> None:
    batch = make_batch(PACKED)
    losses = [tiny_objective()(take_rows(batch, order)).item() for order in ([0, 1, 2, 3], [2, 0, 3, 1])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("overrides", [[], ["experts.num_experts=0"], ["attention.kind=full"]])
def test_padding_contributes_nothing(overrides: list[str]) -> None:
    """The same documents in longer rows: the same draws, loss and gradients."""
    results = []
    for row_length in (24, 31, 64):
        objective = tiny_objective(*overrides)
        loss = objective(make_batch(PACKED, row_length))
        loss.backward()
        results.append((loss.item(), [p.grad for p in objective.parameters()], objective.timesteps.tally))
    for loss, gradients, tally in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        torch.testing.assert_close(gradients, results[0][1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(tally, results[0][2])


def test_a_micro_batch_without_targets_is_zero_but_for_the_regulariser() -> None:
    objective = tiny_objective("experts.num_experts=0")
    loss = objective(make_batch([[(24, 0)], []]))
    assert loss.item() == pytest.approx(0.01 * objective.absorbing().norm().item())
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in objective.parameters())


def test_the_routers_losses_are_added_per_real_slot() -> None:
    weights = ["experts.balance_weight=0.5", "experts.z_weight=0.25"]
    none = ["experts.balance_weight=0", "experts.z_weight=0"]
    batch = make_batch(PACKED)
    with_losses, without = tiny_objective(*weights), tiny_objective(*none)
    difference = with_losses(batch).item() - without(batch).item()
    parts = with_losses.statistics.take()
    assert parts["balance"] == pytest.approx(1.0)  # shares are even before the first step
    assert parts["router_z"] > 0
    layers = with_losses.config.num_layers  # reported as means over layers, added for each
    assert difference == pytest.approx(layers * (0.5 * parts["balance"] + 0.25 * parts["router_z"]), rel=1e-4)


def test_the_embedding_noise_is_that_of_the_first_timestep() -> None:
    """With alpha_0 z_0 + sigma_0 eps at t = 0, and all other timesteps unlikely."""
    objective, batch = tiny_objective("diffusion.objective=published"), make_batch(ONE_DOCUMENT_A_ROW)
    _, z_t, _, _ = observed(objective, batch)
    source = batch.documents().real_bl & ~batch.target_bl
    noise = (z_t - objective.denoiser.embedding(batch.tokens_bl))[source]
    sigma_0 = (1 - objective.schedule.alpha_bar_t[0]).sqrt().item()
    assert noise.std().item() == pytest.approx(sigma_0, rel=0.15)


def test_the_sampler_learns_the_mean_loss_of_each_document() -> None:
    """Without the weight of its draw, which is there because of the sampler."""
    objective, batch = tiny_objective("experts.num_experts=0"), make_batch(PACKED)
    make_importance_uneven(objective)
    _, _, _, f = observed(objective, batch)
    transcription = Transcription(objective, batch, f, published=False)
    squares, counts = np.zeros(20), np.zeros(20)
    for b, documents in enumerate(PACKED):
        for document, (_, targets) in enumerate(documents):
            t = transcription.t[b, document]
            places = np.flatnonzero((transcription.document[b] == document) & transcription.target[b])
            assert len(places) == targets
            squares[t] += np.mean([transcription.position(b, i)[1] for i in places]) ** 2
            counts[t] += 1
    assert objective.timesteps.tally[:, 1].tolist() == counts.tolist()
    assert objective.timesteps.tally[:, 0].tolist() == pytest.approx(squares.tolist(), rel=1e-5)


def test_every_weight_learns() -> None:
    for overrides in ([], ["experts.num_experts=0"], ["diffusion.objective=published"]):
        objective = tiny_objective(*overrides)
        objective(make_batch(PACKED)).backward()
        for name, parameter in objective.named_parameters():
            assert parameter.grad is not None, name
            assert (parameter.grad != 0).any(), name


def test_steps_and_seeds_noise_differently_and_the_same_step_alike() -> None:
    def loss(step: int = 3, seed: int = 0) -> float:
        return tiny_objective(f"seed={seed}")(make_batch(PACKED, step=step)).item()

    assert loss() == loss()
    assert len({loss(), loss(step=4), loss(seed=1)}) == 3


def test_tokens_beyond_the_vocabulary_are_not_scored() -> None:
    assert tiny_objective().denoiser.head.out_features == VOCAB

"""What the training loss depends on, and what it must not depend on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.diffusion.batches import (
    ANCHOR,
    EVERYTHING,
    ONE_DOCUMENT_A_ROW,
    PACKED,
    POSTERIOR,
    PUBLISHED,
    SQUARED_ERROR,
    VOCAB,
    make_batch,
    observed,
    take_rows,
    tiny_objective,
)
from tests.diffusion.transcription import Target, make_importance_uneven

DROPOUT = [*EVERYTHING, "model.dropout=0.3", "model.norm=post", "attention.num_source_global=2"]


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


@pytest.mark.parametrize("overrides", [SQUARED_ERROR, EVERYTHING])
def test_only_predictions_at_targets_count(overrides: list[str]) -> None:
    """Junk predicted at source and padding positions changes neither the loss nor any gradient."""
    batch = make_batch(PACKED)
    results = []
    for junk in (0.0, 100.0):
        objective = tiny_objective(*overrides)
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
            objective = tiny_objective(*PUBLISHED)
            mask = junk * where[..., None]
            objective.denoiser.register_forward_hook(lambda _, __, out, mask=mask: out + mask)
            losses.append(objective(batch).item())
        assert losses[1] > losses[0] + 100


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["experts.num_experts=0"],
        PUBLISHED,
        ["attention.num_source_global=2", "attention.dilation=[[1,2]]"],
        EVERYTHING,
        DROPOUT,
    ],
    ids=["experts", "dense", "published", "global sources", "everything", "dropout"],
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


@pytest.mark.parametrize("overrides", [SQUARED_ERROR, PUBLISHED, EVERYTHING])
def test_the_order_of_rows_does_not_matter(overrides: list[str]) -> None:
    batch = make_batch(PACKED)
    losses = [tiny_objective(*overrides)(take_rows(batch, order)).item() for order in ([0, 1, 2, 3], [2, 0, 3, 1])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("overrides", [[], ["experts.num_experts=0"], ["attention.kind=full"], EVERYTHING, DROPOUT])
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
    objective, batch = tiny_objective(*PUBLISHED), make_batch(ONE_DOCUMENT_A_ROW)
    _, z_t, _, _ = observed(objective, batch)
    source = batch.documents().real_bl & ~batch.target_bl
    noise = (z_t - objective.denoiser.embedding(batch.tokens_bl))[source]
    sigma_0 = (1 - objective.schedule.alpha_bar_t[0]).sqrt().item()
    assert noise.std().item() == pytest.approx(sigma_0, rel=0.15)


@pytest.mark.parametrize("overrides", [SQUARED_ERROR, ANCHOR, [*POSTERIOR, "diffusion.anchor_weight=2"]])
def test_the_sampler_learns_the_mean_loss_of_each_document(overrides: list[str]) -> None:
    """Of all terms with their weights, but without the weight of its draw, which is there because of the sampler."""
    objective, batch = tiny_objective(*overrides, "experts.num_experts=0"), make_batch(PACKED)
    make_importance_uneven(objective)
    _, _, _, f = observed(objective, batch)
    transcription = Target(objective, batch, f)
    squares, counts = np.zeros(20), np.zeros(20)
    for b, documents in enumerate(PACKED):
        for document, (_, targets) in enumerate(documents):
            t = transcription.t[b, document]
            places = np.flatnonzero((transcription.document[b] == document) & transcription.target[b])
            assert len(places) == targets
            losses = [transcription.loss(transcription.position(b, i).terms) for i in places]
            squares[t] += np.mean(losses) ** 2
            counts[t] += 1
    assert objective.timesteps.tally[:, 1].tolist() == counts.tolist()
    assert objective.timesteps.tally[:, 0].tolist() == pytest.approx(squares.tolist(), rel=1e-5)


def test_every_weight_learns() -> None:
    for overrides in ([], ["experts.num_experts=0"], PUBLISHED, EVERYTHING):
        objective = tiny_objective(*overrides)
        objective(make_batch(PACKED)).backward()
        for name, parameter in objective.named_parameters():
            assert parameter.grad is not None, name
            assert (parameter.grad != 0).any(), name


def test_dropout_is_of_the_pass_that_learns_and_of_no_other() -> None:
    """Not of losses without gradients, of evaluation, or of the estimate that self-conditioning gives."""
    batch, seen = make_batch(PACKED), []
    without, objective = tiny_objective(*EVERYTHING), tiny_objective(*EVERYTHING, "model.dropout=0.3")
    objective.denoiser.register_forward_pre_hook(lambda _, __, named: seen.append(named["dropout"]), with_kwargs=True)
    expected = without(batch).item()
    assert objective(batch).item() != pytest.approx(expected, rel=1e-5)
    assert [dropout is None for dropout in seen] == [True, False]
    with torch.no_grad():
        assert objective(batch).item() == expected
    assert objective.eval()(batch).item() == expected
    assert seen[2:] == [None] * 4


def test_what_goes_into_the_first_block_is_dropped_anew_each_step() -> None:
    objective, inputs = tiny_objective("model.dropout=0.3"), []
    objective.denoiser.blocks[0].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    for step in (3, 3, 4):
        objective(make_batch(PACKED, step=step))
    real_bs = objective.denoiser.layout(make_batch(PACKED).documents()).real_bs
    first, again, other = (x_bsd[real_bs] == 0 for x_bsd in inputs)
    assert 0.2 < first.float().mean() < 0.4
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_steps_and_seeds_noise_differently_and_the_same_step_alike() -> None:
    def loss(step: int = 3, seed: int = 0) -> float:
        return tiny_objective(f"seed={seed}")(make_batch(PACKED, step=step)).item()

    assert loss() == loss()
    assert len({loss(), loss(step=4), loss(seed=1)}) == 3


def test_the_whole_vocabulary_is_scored_and_no_more() -> None:
    vocabulary = tiny_objective().denoiser.vocabulary()
    assert (len(vocabulary.embedding_vz), len(vocabulary.bias_v)) == (VOCAB, VOCAB)

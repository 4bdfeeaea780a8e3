"""The training losses against their transcriptions, term by term."""

from __future__ import annotations

import numpy as np
import pytest
from torch import Tensor

from mdseq.diffusion.objective import DiffusionObjective
from tests.diffusion.batches import (
    ANCHOR,
    EVERYTHING,
    ONE_DOCUMENT_A_ROW,
    PACKED,
    POSTERIOR,
    PUBLISHED,
    SQUARED_ERROR,
    make_batch,
    observed,
    tiny_objective,
)
from tests.diffusion.transcription import Published, Target, Transcription, make_importance_uneven

TARGET_OBJECTIVES = {
    "squared error": SQUARED_ERROR,
    "squared error, no absorbing state": [*SQUARED_ERROR, "diffusion.absorbing=false"],
    "capped by the signal-to-noise ratio": [*SQUARED_ERROR, "diffusion.snr_cap=1.0"],
    "weights": [*ANCHOR, "diffusion.denoising_weight=0.5", "diffusion.anchor_weight=2", "diffusion.rounding_weight=3"],
    "no rounding": [*ANCHOR, "diffusion.rounding_weight=0"],
    "anchor": ANCHOR,
    "anchor alone": [*ANCHOR, "diffusion.estimate=softmax", "diffusion.denoising_weight=0.0"],
    "posterior": POSTERIOR,
    "posterior, no absorbing state": [*POSTERIOR, "diffusion.absorbing=false"],
    "posterior, all replaced": [*POSTERIOR, "diffusion.gamma=1", "diffusion.noise_factor=9"],
    "normalised": [*ANCHOR, "diffusion.normalise_embeddings=true"],
    "more noise": [*ANCHOR, "diffusion.noise_factor=3.0"],
    "less noise, so that some signal is left": [*ANCHOR, "diffusion.noise_factor=0.02"],
    "continuous time": [*ANCHOR, "diffusion.continuous_time=true"],
    "self-conditioning": [*ANCHOR, "diffusion.self_conditioning=1.0"],
    "condition dropout": [*ANCHOR, "diffusion.condition_dropout=0.5"],
    "source dropout": [*ANCHOR, "diffusion.source_dropout=0.5"],
    "uniform shares": [*POSTERIOR, "diffusion.absorbing_schedule=uniform", "diffusion.gamma=0.8"],
    "uniform shares, no absorbing state": [
        *POSTERIOR,
        "diffusion.absorbing_schedule=uniform",
        "diffusion.absorbing=false",
    ],
    "some signal is left": [*POSTERIOR, "diffusion.min_signal=0.5"],
    "everything": EVERYTHING,
}


def assert_shown(transcription: Transcription, z_t: Tensor, time: Tensor) -> None:
    """The denoiser was shown what the equations say."""
    for b, i in np.ndindex(*time.shape):
        expected = transcription.position(b, i)
        assert z_t[b, i].double().numpy() == pytest.approx(expected.z_t, abs=1e-5)
        assert time[b, i].item() == pytest.approx(expected.time)


@pytest.mark.parametrize("num_timesteps", [4, 100])  # with 4, t = 0 and the prior term tT count for something
@pytest.mark.parametrize("absorbing", [True, False])
@pytest.mark.parametrize("importance", [True, False])
@pytest.mark.parametrize("rows", [ONE_DOCUMENT_A_ROW, PACKED], ids=["one a row", "packed"])
def test_the_published_loss_term_by_term(num_timesteps: int, absorbing: bool, importance: bool, rows: list) -> None:
    """DiffuSeq's mse, tT and decoder_nll, and 0.01 ||m||."""
    objective = tiny_objective(
        *PUBLISHED,
        f"diffusion.num_timesteps={num_timesteps}",
        f"diffusion.absorbing={str(absorbing).lower()}",
        "experts.num_experts=0",
    )
    if importance:
        make_importance_uneven(objective)
    batch = make_batch(rows)
    loss, z_t, time, f = observed(objective, batch)
    transcription = Published(objective, batch, f)
    terms, norm = transcription.terms(), np.linalg.norm(transcription.m)
    reported = objective.statistics.take()
    assert reported["denoising"] == pytest.approx(terms["denoising"], rel=1e-6)
    assert reported["rounding"] == pytest.approx(terms["rounding"], rel=1e-6)
    assert loss.item() == reported["loss"] == pytest.approx(sum(terms.values()) + 0.01 * norm, rel=1e-6)
    rest = loss.item() - reported["denoising"] - reported["rounding"]
    assert rest == pytest.approx(terms["prior"] + 0.01 * norm, abs=1e-6 * loss.item())
    assert not reported["anchor"]
    assert_shown(transcription, z_t, time)

    assert (norm > 0.1) == absorbing
    assert (len(np.unique(transcription.weight.round(4))) > 1) == importance
    if num_timesteps == 4:
        assert (transcription.t == 0).any()
        assert terms["prior"] > 1e-5 * loss.item(), "ten times what the comparison would overlook"


def test_the_regulariser_is_the_norm_of_the_absorbing_state() -> None:
    with_it, without = (tiny_objective(f"diffusion.absorbing_weight={weight}") for weight in (10, 0))
    difference = with_it(make_batch(PACKED)) - without(make_batch(PACKED))
    assert difference.item() == pytest.approx(10 * with_it.absorbing().norm().item(), rel=1e-5)


@pytest.mark.parametrize("importance", [True, False])
@pytest.mark.parametrize("overrides", TARGET_OBJECTIVES.values(), ids=TARGET_OBJECTIVES.keys())
def test_the_loss_over_targets_term_by_term(overrides: list[str], importance: bool) -> None:
    objective = tiny_objective(*overrides, "experts.num_experts=0", "diffusion.num_timesteps=8")
    spec, batch = objective.spec.diffusion, make_batch(PACKED)
    if importance:
        make_importance_uneven(objective)
    loss, z_t, time, f = observed(objective, batch)
    transcription = Target(objective, batch, f)
    terms, reported = transcription.terms(), objective.statistics.take()
    weights = {"denoising": spec.denoising_weight, "anchor": spec.anchor_weight, "rounding": spec.rounding_weight}
    for name, weight in weights.items():
        if weight:
            assert reported[name] == pytest.approx(terms[name], rel=1e-5), name
        else:
            assert not reported[name]
    expected = transcription.loss(terms) + 0.01 * np.linalg.norm(transcription.m)
    assert loss.item() == reported["loss"] == pytest.approx(expected, rel=2e-6)
    assert_shown(transcription, z_t, time)


def test_the_cases_above_are_not_empty() -> None:
    """Both sides of the cap are met, a posterior with and without evidence, and t = 0."""
    objective, batch = tiny_objective("diffusion.num_timesteps=8"), make_batch(PACKED)
    _, _, _, f = observed(objective, batch)
    transcription = Target(objective, batch, f)
    targets = batch.target_bl.nonzero().tolist()
    replaced = [transcription.replaced(b, i) for b, i in targets]
    assert 0 < sum(replaced) < len(replaced)
    levels = [transcription.alpha_sigma(t) for t in transcription.t.flatten()]
    assert min(alpha / sigma for alpha, sigma in levels) ** 2 < 1 < max(alpha / sigma for alpha, sigma in levels) ** 2
    assert 0 in [transcription.t[b, transcription.owner(b, i)] for b, i in targets]


@pytest.mark.parametrize("overrides", [ANCHOR, POSTERIOR])
def test_the_anchor_teaches_the_denoiser_and_the_rounding_does_not(overrides: list[str]) -> None:
    """Rounding reaches embeddings and biases only; the anchor reaches everything."""
    off = ["diffusion.estimate=output", "diffusion.denoising_weight=1e-30", "diffusion.absorbing_weight=0"]
    quiet = ["experts.balance_weight=0", "experts.z_weight=0"]
    anchored = tiny_objective(*overrides, *quiet, "diffusion.rounding_weight=0")
    rounded = tiny_objective(*overrides, *quiet, *off, "diffusion.anchor_weight=0")
    for objective in (anchored, rounded):
        objective(make_batch(PACKED)).backward()

    def learning(objective: DiffusionObjective) -> set[str]:
        return {name for name, p in objective.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-20}

    # The prior term reaches the embeddings and m.
    assert learning(rounded) == {"denoiser.embedding.weight", "denoiser.head.bias", "absorbing.m"}
    assert learning(anchored) == {name for name, _ in anchored.named_parameters()}

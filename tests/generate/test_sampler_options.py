"""What each option does, and which values are refused."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mdseq.diffusion.absorbing import AbsorbingSchedule, Absorption
from mdseq.diffusion.denoising import DiffusionModel
from mdseq.diffusion.estimates import READINGS, Reading
from mdseq.diffusion.time_grids import TIME_GRIDS, time_grid
from mdseq.errors import UserError
from mdseq.generate.sampler import REVERSE_SOLVERS, SOLVERS, SamplerOptions, thresholded
from mdseq.noise import NoiseKey, Purpose
from tests.generate.sampling import (
    LENGTH,
    SCHEDULE,
    M,
    Shown,
    T,
    every_reading,
    every_solver,
    generate,
    slow_read,
    some_rows,
)


def test_every_reading_makes_a_difference(model: DiffusionModel) -> None:
    texts = [tuple(generate(replace(model, reading=reading)).tokens_bl.flatten().tolist()) for reading in READINGS]
    assert len(set(texts)) == len(READINGS)


@pytest.mark.parametrize("name", ["guidance", "clamp", "threshold", "absorb", "temperature"])
def test_every_option_makes_a_difference(model: DiffusionModel, name: str) -> None:
    options = {"guidance": 5.0, "threshold": 0.6, "absorb": True, "temperature": 0.5}
    options = {"clamp": True} if name == "clamp" else options
    without = {other: value for other, value in options.items() if other != name}
    assert not torch.equal(generate(model, **options).tokens_bl, generate(model, **without).tokens_bl)


def test_guidance_costs_a_second_pass_that_knows_no_source(model: DiffusionModel) -> None:
    _, target_bl, _ = (x[:2] for x in some_rows())
    with Shown(model) as shown:
        assert generate(model, [0, 1], guidance=1.0).calls_b.tolist() == [6, 6]
        assert len(shown.calls) == 6
        assert generate(model, [0, 1], guidance=2.0).calls_b.tolist() == [6, 6]
        assert len(shown.calls) == 18
    for with_source, without in zip(shown.calls[6::2], shown.calls[7::2], strict=True):
        assert torch.equal(with_source[0][target_bl], without[0][target_bl])
        assert (without[0][~target_bl] == M).all()
        assert with_source[2] is without[2]  # one layout for both


def test_clamping_makes_embeddings_of_estimates(self_conditioned: DiffusionModel) -> None:
    """From the first on, as the next call is shown; without it, they begin in between."""
    words_vz = self_conditioned.denoiser.embedding.weight.detach()
    _, target_bl, _ = (x[:5] for x in some_rows())

    def distances(clamp: bool) -> list[Tensor]:
        with Shown(self_conditioned) as shown:
            generate(self_conditioned, range(5), clamp=clamp)
        estimates = [call[3] for call in shown.calls[1:]]
        return [(x_blz[target_bl][:, None] - words_vz).norm(dim=-1).amin(dim=1) for x_blz in estimates]

    assert all((distance == 0).all() for distance in distances(clamp=True))
    assert distances(clamp=False)[0].mean() > 0.5


@every_reading
def test_the_denoiser_is_handed_its_previous_estimate(self_conditioned: DiffusionModel, reading: Reading) -> None:
    """As its output was read, on targets; none in the first call."""
    model = replace(self_conditioned, reading=reading)
    _, target_bl, _ = (x[:5] for x in some_rows())
    with Shown(model) as shown:
        generate(model, range(5))
    assert shown.calls[0][3] is None
    for i, t in enumerate(time_grid("uniform", SCHEDULE, 6)[:-1]):
        estimate_blz = shown.calls[i + 1][3]
        assert estimate_blz is not None
        expected_blz, _ = slow_read(model, shown.outputs[i], shown.calls[i][0], t)
        torch.testing.assert_close(estimate_blz, expected_blz * target_bl[..., None], rtol=1e-4, atol=1e-4)


def test_a_model_without_self_conditioning_is_handed_nothing(model: DiffusionModel) -> None:
    with Shown(model) as shown:
        generate(model, range(5))
    assert all(call[3] is None for call in shown.calls)


@every_solver
def test_without_temperature_there_is_no_noise_to_draw(model: DiffusionModel, solver: str) -> None:
    """The first call sees m alone, and neither the seed nor the sample's id makes a difference."""
    rows = [2, 3, 4]
    with Shown(model) as shown:
        cold_bl = generate(model, rows, solver=solver, temperature=0.0).tokens_bl
    _, target_bl, _ = (x[rows] for x in some_rows())
    assert (shown.calls[0][0][target_bl] == M).all()
    assert torch.equal(cold_bl, generate(model, rows, solver=solver, temperature=0.0, seed=9).tokens_bl)


@pytest.mark.parametrize("solver", ["ddpm", "dpm_2m_sde"])
def test_temperature_scales_the_noise_of_every_step(
    model: DiffusionModel, solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of the start: as if all normal numbers were drawn so much smaller."""
    expected = generate(model, solver=solver, temperature=0.3).tokens_bl
    draw = NoiseKey.normal
    monkeypatch.setattr(NoiseKey, "normal", lambda key, *what: 0.3 * draw(key, *what))
    assert torch.equal(generate(model, solver=solver).tokens_bl, expected)


@pytest.mark.parametrize("schedule", ["sigma", "uniform"])
@pytest.mark.parametrize("solver", REVERSE_SOLVERS)
def test_absorbed_targets_are_m_at_their_steps_end(
    model: DiffusionModel, solver: str, schedule: AbsorbingSchedule
) -> None:
    """With probability gamma * sigma or gamma * t / (T - 1), by noise of its own; but not where the last step ended."""
    rows = [0, 1, 2]
    model = replace(model, absorption=Absorption(0.5, schedule))
    _, target_bl, _ = (x[rows] for x in some_rows())
    with Shown(model) as shown:
        generate(model, rows, solver=solver, absorb=True, seed=11)
    levels = model.schedule.levels(time_grid("uniform", model.schedule, 6))
    inside_a_step = {"dpm_2s": [1, 3], "dpm_3m": [1]}.get(solver, [])
    for i, (level, (z_blz, _, _, _)) in enumerate(zip(levels, shown.calls, strict=True)):
        is_m_bl = (z_blz == M).all(dim=-1) & target_bl
        uniform_bl = NoiseKey(11, i, torch.tensor(rows)).uniform(Purpose.RESAMPLING, LENGTH)
        share = level.sigma if schedule == "sigma" else level.timestep / (T - 1)
        expected_bl = (uniform_bl <= 0.5 * share) & target_bl
        if i in (0, 5, *inside_a_step):
            expected_bl = torch.zeros_like(expected_bl)
        assert torch.equal(is_m_bl, expected_bl)


def test_nothing_is_absorbed_without_an_absorbing_state(model: DiffusionModel) -> None:
    plain = replace(model, absorption=replace(model.absorption, gamma=0.0))
    assert torch.equal(generate(plain, absorb=True).tokens_bl, generate(plain).tokens_bl)


@given(st.integers(1, 30), st.floats(0.01, 0.999), st.floats(0.1, 30), st.integers(0, 5))
def test_thresholding_is_by_the_quantile_of_each_rows_targets(
    num_targets: int, quantile: float, scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x_blz = scale * torch.randn(2, 30, 3, generator=generator)
    target_bl = torch.zeros(2, 30, dtype=torch.bool)
    target_bl[0, :num_targets] = target_bl[1, -1:] = True
    got_blz = thresholded(x_blz, target_bl, quantile, torch.tensor(2.0))
    for b in range(2):
        x, got = x_blz[b][target_bl[b]].numpy(), got_blz[b][target_bl[b]].numpy()
        limit = max(np.quantile(np.abs(x), quantile, method="higher"), 2.0)
        np.testing.assert_allclose(got, np.clip(x, -limit, limit) / limit * 2.0, rtol=1e-6)
        assert np.abs(got).max() <= 2.0 * (1 + 1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_calls": 0}, ["num_calls = 0", "1 or more"]),
        ({"solver": "dpm"}, ["solver = dpm", *SOLVERS]),
        ({"time_grid": "even"}, ["time_grid = even", *TIME_GRIDS]),
        ({"seed": -1}, ["seed = -1", "0 to 4294967295"]),
        ({"seed": 2**32}, ["seed = 4294967296"]),
        ({"temperature": -0.1}, ["temperature = -0.1", "at least 0"]),
        ({"temperature": math.nan}, ["temperature = nan", "finite"]),
        ({"temperature": math.inf}, ["temperature = inf"]),
        ({"guidance": -0.5}, ["guidance = -0.5", "at least 0"]),
        ({"guidance": math.nan}, ["guidance = nan", "finite"]),
        ({"guidance": math.inf}, ["guidance = inf"]),
        ({"threshold": 0.0}, ["threshold = 0.0", "at most 1"]),
        ({"threshold": 1.5}, ["threshold = 1.5"]),
        ({"threshold": math.nan}, ["threshold = nan"]),
        ({"patience": -1}, ["patience = -1", "0 or more"]),
        ({"solver": "mask_predict", "absorb": True}, ["absorb = True", "solver = mask_predict", "leave absorb out"]),
        ({"patience": 1, "confidence": 1.5}, ["confidence = 1.5", "0 to 1"]),
        ({"patience": 1, "confidence": math.nan}, ["confidence = nan"]),
        ({"confidence": 0.5}, ["confidence = 0.5", "a patience of 1"]),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        SamplerOptions(**options)
    assert all(word in str(refused.value) for word in words)


def test_the_ends_of_what_is_allowed_are_allowed() -> None:
    SamplerOptions(
        num_calls=1, seed=2**32 - 1, temperature=0.0, guidance=0.0, threshold=1.0, patience=1, confidence=1.0
    )

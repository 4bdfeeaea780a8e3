"""Mask-Predict: what the denoiser is shown in each call follows, row by row, from what it said in the one before."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mdseq.diffusion.denoising import DiffusionModel
from mdseq.diffusion.estimates import Reading
from mdseq.diffusion.rounding import NOT_TARGETS
from mdseq.diffusion.time_grids import time_grid
from mdseq.errors import UserError
from mdseq.noise import NoiseKey, Purpose
from tests.generate.sampling import ALL, DIM, LENGTH, M, Shown, every_reading, generate, slow_read, some_rows, unsure

CALLS = 6


@every_reading
@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_each_call_sees_the_likeliest_tokens_and_m(
    self_conditioned: DiffusionModel, reading: Reading, temperature: float
) -> None:
    model = replace(unsure(self_conditioned), reading=reading)
    with Shown(model) as shown:
        samples = generate(model, solver="mask_predict", num_calls=CALLS, temperature=temperature, seed=3)
    _, target_bl, _ = some_rows()
    rows = target_bl.any(dim=1).nonzero().flatten().tolist()  # a row without targets is not shown
    levels = model.schedule.levels(time_grid("uniform", model.schedule, CALLS))
    words_vz = model.denoiser.vocabulary().embedding_vz
    assert (shown.calls[0][0][target_bl[rows]] == M).all(), "all absorbed at first"
    best: list[dict[int, float]] = [{} for _ in rows]  # of each token, the probability when it was absorbed last
    absorbed: list[list[int]] = [target_bl[b].nonzero().flatten().tolist() for b in rows]
    for i, level in enumerate(levels):
        z_blz, time_bl, _, estimate_blz = shown.calls[i]
        _, logits_blv = slow_read(model, shown.outputs[i], z_blz, level.timestep)
        logits_blv[..., list(NOT_TARGETS)] = -torch.inf
        probability_blv = logits_blv.softmax(dim=-1)
        assert (time_bl[target_bl[rows]] - level.timestep * 1000 / model.schedule.num_timesteps).abs().max() < 1e-3
        assert (estimate_blz is None) == (i == 0)
        if i + 1 == CALLS:
            assert torch.equal(
                samples.tokens_bl[rows][target_bl[rows]], probability_blv.argmax(dim=-1)[target_bl[rows]]
            )
            break
        after, next_blz = levels[i + 1], shown.calls[i + 1][0]
        noise_blz = NoiseKey(3, i + 1, torch.tensor(ALL)).normal(Purpose.SAMPLING, LENGTH, DIM)
        for row, b in enumerate(rows):
            targets = target_bl[b].nonzero().flatten().tolist()
            best[row] |= {n: probability_blv[row, n].max().item() for n in absorbed[row]}
            count = len(targets) * (CALLS - i - 1) // CALLS
            absorbed[row] = sorted(targets, key=best[row].__getitem__)[:count]
            for n in targets:
                word_z = words_vz[probability_blv[row, n].argmax()]
                expected_z = after.alpha * (word_z - M) + temperature * after.sigma * noise_blz[b, n] + M
                torch.testing.assert_close(
                    next_blz[row, n], M if n in absorbed[row] else expected_z, rtol=1e-4, atol=1e-5, msg=f"{i} {b} {n}"
                )


def test_fewer_and_fewer_tokens_are_absorbed(model: DiffusionModel) -> None:
    _, target_bl, _ = some_rows()
    with Shown(model) as shown:
        generate(model, [0], solver="mask_predict", num_calls=12)
    absorbed = [int((z_blz == M).all(dim=-1)[target_bl[:1]].sum()) for z_blz, *_ in shown.calls]
    assert absorbed[0] == target_bl[0].sum()
    assert absorbed == sorted(absorbed, reverse=True)
    assert absorbed[-1] == absorbed[0] // 12


def test_a_model_without_an_absorbing_state_is_refused(model: DiffusionModel) -> None:
    with pytest.raises(UserError, match=r"mask_predict .* absorbed.*diffusion\.absorbing = true"):
        generate(replace(model, absorption=replace(model.absorption, gamma=0.0)), solver="mask_predict")

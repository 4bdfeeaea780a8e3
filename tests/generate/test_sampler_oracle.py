"""A batch's sampling is that of each of its rows, written out slowly.

`slow_sample` works in embeddings (z, not u), with every reading of the denoiser's output and every option.

Shapes: b rows, l length, z embedding dimension, v vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from mdseq.diffusion.denoising import DiffusionModel
from mdseq.diffusion.estimates import Reading
from mdseq.diffusion.rounding import NOT_TARGETS, nearest_tokens
from mdseq.diffusion.time_grids import time_grid
from mdseq.generate.sampler import Estimate, SamplerOptions
from mdseq.noise import NoiseKey, Purpose
from mdseq.sparse import Documents
from tests.generate.sampling import (
    ALL,
    DIM,
    LENGTH,
    WITHOUT_TARGET,
    M,
    T,
    every_reading,
    generate,
    slow_read,
    some_rows,
)


@torch.no_grad()
def slow_sample(model: DiffusionModel, row: int, options: SamplerOptions) -> list[tuple[Tensor, Tensor]]:
    """A row's tokens and their probabilities at each call, by DDIM or DDPM as their papers have them, shifted by m."""
    tokens_bl, target_bl, length_b = (x[[row]] for x in some_rows())
    schedule, denoiser = model.schedule, model.denoiser
    words, bias_v = denoiser.vocabulary().embedding_vz, denoiser.vocabulary().bias_v
    source_bl1, documents = ~target_bl[..., None], Documents.whole(length_b, LENGTH)
    grid = time_grid(options.time_grid, schedule, options.num_calls)
    log_snr = schedule.log_snr(torch.tensor(grid, dtype=torch.float64)).tolist()
    alpha = [math.sqrt(1 / (1 + math.exp(-2 * x))) for x in log_snr]
    sigma = [math.sqrt(1 / (1 + math.exp(2 * x))) for x in log_snr]

    def key(step: int) -> NoiseKey:
        return NoiseKey(options.seed, step, torch.tensor([row]))

    z = M + options.temperature * key(0).normal(Purpose.STARTING, LENGTH, DIM)
    x, rounded = None, []
    for i, t in enumerate(grid):
        earlier = None if x is None or not denoiser.config.self_conditioning else x.masked_fill(source_bl1, 0.0)
        time_bl = torch.where(target_bl, t * 1000 / T, 0.0)
        f = denoiser(torch.where(source_bl1, denoiser.embed(tokens_bl), z), time_bl, documents, earlier)
        if options.guidance != 1:
            time_bl = torch.where(target_bl, t * 1000 / T, 2000.0)
            free = denoiser(torch.where(source_bl1, M, z), time_bl, documents, earlier)
            f = (1 - options.guidance) * free + options.guidance * f
        x, logits = slow_read(model, f, z, t)
        if options.threshold < 1:
            limit = np.quantile(x[target_bl].abs().numpy(), options.threshold, method="higher")
            largest = words.abs().max().item()
            x = x.clamp(-limit, limit) * (largest / limit) if limit > largest else x.clamp(-largest, largest)
        if options.clamp:
            x = words[nearest_tokens(x, words)]
        if model.reading == "output":  # what was cut or clamped is what is rounded
            logits = x @ words.T + bias_v
        logits[..., NOT_TARGETS] = -torch.inf
        confidence, token = logits.softmax(dim=-1).max(dim=-1)
        rounded.append((torch.where(target_bl, token, tokens_bl)[0], torch.where(target_bl, confidence, 1.0)[0]))
        if i + 1 == len(grid):
            return rounded
        if options.solver == "ddim":
            epsilon = (z - M - alpha[i] * (x - M)) / sigma[i]
            z = M + alpha[i + 1] * (x - M) + sigma[i + 1] * epsilon
        else:
            ratio = (alpha[i] / alpha[i + 1]) ** 2
            mean = alpha[i + 1] * (1 - ratio) / sigma[i] ** 2 * (x - M)
            mean = mean + ratio**0.5 * sigma[i + 1] ** 2 / sigma[i] ** 2 * (z - M)
            deviation = (1 - ratio) ** 0.5 * sigma[i + 1] / sigma[i]
            z = M + mean + deviation * options.temperature * key(i + 1).normal(Purpose.SAMPLING, LENGTH, DIM)
        if options.absorb and i + 2 < len(grid):
            absorbed = key(i + 1).uniform(Purpose.RESAMPLING, LENGTH) <= model.absorption.gamma * sigma[i + 1]
            z = torch.where(absorbed[..., None], M, z)
    raise AssertionError("the loop returns at the last call")


FEATURES = {
    "plain": {},
    "guided": {"guidance": 2.5},
    "unguided": {"guidance": 0.0},
    "clamped": {"clamp": True},
    "thresholded": {"threshold": 0.6},
    "absorbed": {"absorb": True},
    "cold": {"temperature": 0.5},
    "everything": {"guidance": 3.0, "clamp": True, "threshold": 0.6, "absorb": True, "temperature": 0.8},
}
every_feature = pytest.mark.parametrize("options", FEATURES.values(), ids=FEATURES)


@every_feature
@every_reading
@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
@pytest.mark.parametrize("conditioned", [False, True], ids=["alone", "self_conditioned"])
def test_a_batch_is_its_rows_sampled_slowly(
    model: DiffusionModel,
    self_conditioned: DiffusionModel,
    conditioned: bool,
    solver: str,
    reading: Reading,
    options: dict,
) -> None:
    """At every call, with every option, alone and together."""
    chosen = replace(self_conditioned if conditioned else model, reading=reading)
    options = options | {"solver": solver, "seed": 3}
    seen: list[Estimate] = []
    samples = generate(chosen, observe=seen.append, **options)
    assert samples.calls_b.tolist() == [6 if row != WITHOUT_TARGET else 0 for row in ALL]
    for row in (0, 3, 7):
        expected = slow_sample(chosen, row, SamplerOptions(num_calls=6, **options))
        for estimate, (tokens_l, confidence_l) in zip(seen, expected, strict=True):
            assert estimate.tokens_bl[row].tolist() == tokens_l.tolist()
            torch.testing.assert_close(estimate.confidence_bl[row], confidence_l.float(), rtol=1e-3, atol=1e-3)
        assert torch.equal(samples.tokens_bl[row], expected[-1][0])


@every_reading
@every_feature
def test_looking_changes_nothing(self_conditioned: DiffusionModel, reading: Reading, options: dict) -> None:
    chosen = replace(self_conditioned, reading=reading)
    watched = generate(chosen, observe=lambda _: None, **options)
    assert torch.equal(watched.tokens_bl, generate(chosen, **options).tokens_bl)

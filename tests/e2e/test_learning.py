"""Learning is shown, not assumed: a tiny model learns a task with a known answer, and samples it exactly.

Each way to break the sampler that the test knows of must push the score below the bar that the model clears.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mdseq.data.tokenizer import SpecialToken
from mdseq.generate import sampler
from mdseq.generate.sampler import SamplerOptions
from tests.e2e.dictionary_task import accuracy, batch_of, learned_objective

pytestmark = pytest.mark.slow
BAR = 0.95


@pytest.fixture(scope="module")
def learned():
    return learned_objective()


@pytest.mark.parametrize("solver", ["dpm_2m", "ddpm"])
def test_twenty_denoiser_calls_translate_held_out_sources(learned, solver):
    assert accuracy(learned, options=SamplerOptions(20, solver)).share >= BAR


def test_a_sampler_that_ignores_the_source_fails(learned):
    batch = batch_of(step=10**6, rows=256)
    other_sources = torch.where(batch.target_bl, SpecialToken.PAD, batch.tokens_bl.roll(1, dims=0))
    assert accuracy(learned, tokens_bl=other_sources).share < 0.2


def test_a_sampler_that_ignores_the_shift_fails(learned):
    model = learned.model()
    assert accuracy(learned, model=replace(model, m_z=torch.zeros_like(model.m_z))).share < BAR - 0.05


def test_a_sampler_that_takes_the_steps_in_another_order_fails(learned, monkeypatch):
    time_grid = sampler.time_grid
    monkeypatch.setattr(sampler, "time_grid", lambda *sizes: time_grid(*sizes)[::-1])
    assert accuracy(learned).share < BAR - 0.05

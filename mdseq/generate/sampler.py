"""Fill the target positions of rows by solving the reverse process.

Shapes: b batch, l length, z embedding dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mdseq.diffusion.denoising import DiffusionModel, GivenRows
from mdseq.diffusion.rounding import likeliest_tokens, nearest_tokens
from mdseq.diffusion.solvers import SOLVERS, time_grid
from mdseq.noise import NoiseKey, Purpose
from mdseq.sparse import Documents


@dataclass(frozen=True)
class SamplerOptions:
    """How to solve.

    Attributes:
        num_calls: Denoiser calls.
        solver: A key of `mdseq.diffusion.solvers.SOLVERS`.
        time_grid: A key of `mdseq.diffusion.solvers.TIME_GRIDS`: where between T - 1 and 0 the calls are spent.
        seed: Key of all noise.
        guidance: Weight w of the source: e' + w (e - e'), with e' the estimate without source (classifier-free
            guidance, arXiv 2207.12598); 1 for none. Costs a second pass of the denoiser in each call.
        clamp: Replace every estimate by its nearest embedding (DiffuSeq's clamping trick).
        threshold: Quantile of an estimate's values that is scaled down to the largest value of an embedding (dynamic
            thresholding, Imagen, arXiv 2205.11487, section 2.3); 1 for none.
        absorb: Apply the discrete part of the soft absorbing state while sampling: after each step a target token is
            m with probability gamma * sigma.
        patience: Calls for which all tokens of a row must stay the same until the row is done; 0 to make all calls.
    """

    num_calls: int = 20
    solver: str = "dpm_2m"
    time_grid: str = "uniform"
    seed: int = 0
    guidance: float = 1.0
    clamp: bool = False
    threshold: float = 1.0
    absorb: bool = False
    patience: int = 0


@dataclass(frozen=True)
class Estimate:
    """What the sampler holds true at one denoiser call.

    Attributes:
        call: Counted from 0.
        timestep: Of the call.
        tokens_bl: The likeliest token of each position; given tokens where nothing is generated.
        confidence_bl: Its probability; 1 for given tokens.
    """

    call: int
    timestep: float
    tokens_bl: Tensor
    confidence_bl: Tensor


@dataclass(frozen=True)
class Samples:
    """What was generated.

    Attributes:
        tokens_bl: int64; given tokens where nothing was to be generated.
        calls_b: Denoiser calls made for each row.
    """

    tokens_bl: Tensor
    calls_b: Tensor


@torch.no_grad()
def sample(
    model: DiffusionModel,
    tokens_bl: Tensor,
    target_bl: Tensor,
    documents: Documents,
    sample_b: Tensor,
    options: SamplerOptions,
    observe: Callable[[Estimate], None] | None = None,
) -> Samples:
    """Generate tokens wherever `target_bl` is True.

    Args:
        model: Trained weights and their process.
        tokens_bl: Given tokens; what stands at target positions is ignored.
        target_bl: Positions to fill.
        documents: What each row holds.
        sample_b: Id of each row's noise: with the seed, it fixes the result, whatever else is in the batch.
        options: Solver, calls, seed.
        observe: Called with the state of each call.
    """
    rows = GivenRows.of(model, tokens_bl, target_bl, documents)
    vocabulary = model.denoiser.vocabulary()

    def predict(u_blz: Tensor, timestep: float) -> Tensor:
        timestep_b = torch.full((len(u_blz),), timestep, device=u_blz.device, dtype=torch.float64)
        x_blz = rows.predict(u_blz + model.m_z, timestep_b)
        if options.clamp:
            x_blz = vocabulary.embedding_vz[nearest_tokens(x_blz, vocabulary)]
        return x_blz - model.m_z

    def draw_normal(step: int) -> Tensor:
        return NoiseKey(options.seed, step, sample_b).normal(Purpose.SAMPLING, *rows.source_blz.shape[1:])

    grid = time_grid(model.schedule.num_timesteps, options.num_calls)
    start_blz = NoiseKey(options.seed, 0, sample_b).normal(Purpose.STARTING, *rows.source_blz.shape[1:])
    u_blz = SOLVERS[options.solver](predict, start_blz, model.schedule, grid, draw_normal)
    generated_bl, _ = likeliest_tokens(u_blz + model.m_z, vocabulary)
    return Samples(torch.where(target_bl, generated_bl, tokens_bl), torch.full_like(sample_b, options.num_calls))

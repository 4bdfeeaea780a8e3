"""Fill the target positions of rows by solving the reverse process.

Shapes: b batch, l length, z embedding dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mdseq.diffusion.rounding import nearest_tokens
from mdseq.diffusion.schedule import NoiseSchedule
from mdseq.diffusion.solvers import SOLVERS, time_grid
from mdseq.model.denoiser import Denoiser
from mdseq.noise import NoiseKey, Purpose
from mdseq.sparse import Documents
from mdseq.sparse.documents import leading_source


@dataclass(frozen=True)
class SamplerOptions:
    """How to solve.

    Attributes:
        num_steps: Denoiser calls.
        solver: A key of `mdseq.diffusion.solvers.SOLVERS`.
        seed: Key of all noise.
        clamp: Replace every estimate by its nearest embedding (DiffuSeq's clamping trick).
    """

    num_steps: int = 20
    solver: str = "dpm"
    seed: int = 0
    clamp: bool = False


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    m_z: Tensor,
    schedule: NoiseSchedule,
    tokens_bl: Tensor,
    target_bl: Tensor,
    documents: Documents,
    sample_b: Tensor,
    options: SamplerOptions,
) -> Tensor:
    """Tokens [b, l]: those given wherever `target_bl` is False, generated ones elsewhere.

    Args:
        denoiser: Trained weights.
        m_z: The absorbing state; zeros without one.
        schedule: The schedule of the training.
        tokens_bl: Source tokens; what stands at target positions is ignored.
        target_bl: Positions to fill.
        documents: What each row holds.
        sample_b: Id of each row's noise: with the seed, it fixes the result, whatever else is in the batch.
        options: Solver, steps, seed.
    """
    if count := denoiser.config.num_source_global:
        documents = documents.marked(leading_source(documents, target_bl, count))
    source_blz = denoiser.embedding(tokens_bl).float()
    # Through the module, not its weight: under ZeRO-3 the weight is whole only inside a call.
    embedding_vz = denoiser.embedding(torch.arange(denoiser.config.vocab_size, device=tokens_bl.device)).float()

    def predict(u_blz: Tensor, timestep: int) -> Tensor:
        time_bl = target_bl * schedule.time(torch.tensor(timestep)).item()
        z_blz = torch.where(target_bl[..., None], u_blz + m_z, source_blz)
        x_blz = denoiser(z_blz, time_bl, documents)
        if options.clamp:
            x_blz = denoiser.embedding(nearest_tokens(x_blz, embedding_vz)).float()
        return x_blz - m_z

    def draw_normal(step: int) -> Tensor:
        return NoiseKey(options.seed, step, sample_b).normal(Purpose.SAMPLING, *source_blz.shape[1:])

    grid = time_grid(schedule.num_timesteps, options.num_steps)
    start_blz = NoiseKey(options.seed, 0, sample_b).normal(Purpose.STARTING, *source_blz.shape[1:])
    u_blz = SOLVERS[options.solver](predict, start_blz, schedule, grid, draw_normal)
    return torch.where(target_bl, nearest_tokens(u_blz + m_z, embedding_vz), tokens_bl)

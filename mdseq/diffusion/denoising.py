"""A trained denoiser applied to rows whose source is given: what samplers and the likelihood bound call.

Shapes: b batch, l length, z embedding dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mdseq.diffusion.schedule import NoiseSchedule
from mdseq.model.denoiser import Denoiser
from mdseq.model.saved import SavedModel
from mdseq.sparse import Documents
from mdseq.sparse.documents import leading_source


@dataclass(frozen=True)
class DiffusionModel:
    """A denoiser and the process that it was trained on.

    Attributes:
        denoiser: In evaluation mode.
        m_z: The absorbing state, fp32; zeros without one.
        schedule: Noise schedule.
        gamma: Share of target tokens replaced by m at t = T; 0 without an absorbing state.
    """

    denoiser: Denoiser
    m_z: Tensor
    schedule: NoiseSchedule
    gamma: float

    @classmethod
    def of(cls, saved: SavedModel) -> DiffusionModel:
        config = saved.config
        return cls(saved.denoiser, saved.m_z, NoiseSchedule(config.noise_schedule, config.num_timesteps), config.gamma)


@dataclass(frozen=True)
class GivenRows:
    """Rows with clean tokens wherever nothing is to be generated.

    Attributes:
        model: The denoiser and its process.
        source_blz: What stands where nothing is generated: embeddings of the clean tokens.
        source_timestep: How noisy that is: 0 for clean.
        target_bl: Positions to denoise.
        documents: What each row holds, its global source tokens marked.
    """

    model: DiffusionModel
    source_blz: Tensor
    source_timestep: int
    target_bl: Tensor
    documents: Documents

    @classmethod
    def of(cls, model: DiffusionModel, tokens_bl: Tensor, target_bl: Tensor, documents: Documents) -> GivenRows:
        """Embed the tokens, and mark those that the model takes as global."""
        if count := model.denoiser.config.num_source_global:
            documents = documents.marked(leading_source(documents, target_bl, count))
        return cls(model, model.denoiser.embed(tokens_bl), 0, target_bl, documents)

    def without_source(self) -> GivenRows:
        """The same rows with nothing given: what `condition_dropout` trains, m at the last timestep."""
        nothing_blz = self.model.m_z.expand_as(self.source_blz)
        return replace(self, source_blz=nothing_blz, source_timestep=self.model.schedule.last)

    def take(self, index_n: Tensor) -> GivenRows:
        """Some of the rows."""
        return replace(
            self,
            source_blz=self.source_blz[index_n],
            target_bl=self.target_bl[index_n],
            documents=self.documents.take(index_n),
        )

    def predict(self, z_blz: Tensor, timestep_b: Tensor, estimate_blz: Tensor | None = None) -> Tensor:
        """The clean embeddings [b, l, z], fp32.

        Args:
            z_blz: Noisy embeddings; only target positions are looked at.
            timestep_b: Timestep of each row, any number in [0, T - 1].
            estimate_blz: For a model with self-conditioning, its prediction at an earlier, noisier time.
        """
        time_b = self.model.schedule.time(timestep_b)
        source_time = self.model.schedule.time(torch.tensor(self.source_timestep, device=time_b.device))
        time_bl = torch.where(self.target_bl, time_b[:, None], source_time)
        target_bl1 = self.target_bl[..., None]
        z_blz = torch.where(target_bl1, z_blz, self.source_blz)
        if estimate_blz is not None:
            estimate_blz = estimate_blz * target_bl1
        return self.model.denoiser(z_blz, time_bl, self.documents, estimate_blz)

"""A trained denoiser applied to rows whose source is given: what samplers and the likelihood bound call.

Shapes: b batch, l length, z embedding dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mdseq.diffusion.absorbing import Absorption
from mdseq.diffusion.estimates import Reader, Reading
from mdseq.diffusion.schedule import NO_TIME, NoiseSchedule
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
        absorption: Which target tokens are replaced by m; none, with a gamma of 0, without an absorbing state.
        reading: What the denoiser's output is; see `mdseq/diffusion/estimates.py`.
    """

    denoiser: Denoiser
    m_z: Tensor
    schedule: NoiseSchedule
    absorption: Absorption
    reading: Reading

    @classmethod
    def of(cls, saved: SavedModel) -> DiffusionModel:
        config = saved.config
        schedule = NoiseSchedule(config.noise_schedule, config.num_timesteps, config.noise_factor, config.min_signal)
        absorption = Absorption(config.gamma, config.absorbing_schedule)
        return cls(saved.denoiser, saved.m_z, schedule, absorption, config.estimate)

    @property
    def absorbs(self) -> bool:
        """Whether the denoiser has been trained on all shares of absorbed targets alike, none to all of them."""
        return self.absorption == Absorption(1.0, "uniform")


@dataclass(frozen=True)
class Prediction:
    """What a denoiser call says of the clean embeddings.

    Attributes:
        clean_blz: Their estimate, fp32; anything but at target positions.
        scores_bly: Their tokens' scores: the logits are scores @ reader.scored.embedding.T + bias.
    """

    clean_blz: Tensor
    scores_bly: Tensor


@dataclass(frozen=True)
class GivenRows:
    """Rows with clean tokens wherever nothing is to be generated.

    Attributes:
        model: The denoiser and its process.
        reader: How the denoiser's output is read.
        source_blz: What stands where nothing is generated: embeddings of the clean tokens.
        source_time: What the denoiser is told of it: 0 for clean.
        target_bl: Positions to denoise.
        documents: What each row holds, its global source tokens marked.
    """

    model: DiffusionModel
    reader: Reader
    source_blz: Tensor
    source_time: float
    target_bl: Tensor
    documents: Documents

    @classmethod
    def of(cls, model: DiffusionModel, tokens_bl: Tensor, target_bl: Tensor, documents: Documents) -> GivenRows:
        """Embed the tokens, and mark those that the model takes as global."""
        denoiser = model.denoiser
        if count := denoiser.config.num_source_global:
            documents = documents.marked(leading_source(documents, target_bl, count))
        reader = Reader.of(model.reading, denoiser.vocabulary(), model.m_z)
        return cls(model, reader, denoiser.embed(tokens_bl), 0.0, target_bl, documents)

    def without_source(self) -> GivenRows:
        """The same rows with nothing given: what `condition_dropout` trains, m without a time."""
        nothing_blz = self.model.m_z.expand_as(self.source_blz)
        return replace(self, source_blz=nothing_blz, source_time=NO_TIME)

    def take(self, index_n: Tensor) -> GivenRows:
        """Some of the rows."""
        return replace(
            self,
            source_blz=self.source_blz[index_n],
            target_bl=self.target_bl[index_n],
            documents=self.documents.take(index_n),
        )

    def predict(
        self, z_blz: Tensor, timestep_b: Tensor, estimate_blz: Tensor | None = None, guidance: float = 1.0
    ) -> Prediction:
        """Denoise.

        Args:
            z_blz: Noisy embeddings; only target positions are looked at.
            timestep_b: Timestep of each row, any number in [0, T - 1].
            estimate_blz: For a model with self-conditioning, its estimate at an earlier, noisier time.
            guidance: Weight w of the source: the output is f' + w (f - f'), with f' the one without source; 1 for f.
        """
        f_blz = self._output(z_blz, timestep_b, estimate_blz)
        if guidance != 1:
            free_blz = self.without_source()._output(z_blz, timestep_b, estimate_blz)
            f_blz = free_blz + guidance * (f_blz - free_blz)
        log_snr_bl = self.model.schedule.log_snr(timestep_b)[:, None].expand_as(self.target_bl)
        scores_bly = self.reader.scores(f_blz, z_blz, log_snr_bl)
        return Prediction(self.reader.clean(f_blz, scores_bly, self.target_bl), scores_bly)

    def _output(self, z_blz: Tensor, timestep_b: Tensor, estimate_blz: Tensor | None) -> Tensor:
        schedule = self.model.schedule
        time_bl = torch.where(self.target_bl, schedule.time(timestep_b)[:, None], self.source_time)
        target_bl1 = self.target_bl[..., None]
        z_blz = torch.where(target_bl1, z_blz, self.source_blz)
        if estimate_blz is not None:
            estimate_blz = estimate_blz * target_bl1
        return self.model.denoiser(z_blz, time_bl, self.documents, estimate_blz)

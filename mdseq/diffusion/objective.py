"""The training objective: what DeepSpeed wraps, so that `engine(batch)` is the loss.

Shapes: b batch, l length, m documents in a row, z embedding dimension, v vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mdseq.data.batch import Batch
from mdseq.diffusion.absorbing import AbsorbingState, Absorption, corrupt
from mdseq.diffusion.balance import RouterBalance
from mdseq.diffusion.denoising import DiffusionModel
from mdseq.diffusion.estimates import Reader
from mdseq.diffusion.rounding import cross_entropy
from mdseq.diffusion.schedule import NO_TIME, NoiseSchedule
from mdseq.diffusion.statistics import LossStatistics
from mdseq.diffusion.timesteps import TimestepSampler
from mdseq.model.denoiser import Denoiser, DenoiserConfig
from mdseq.model.dropout import Dropout
from mdseq.model.experts import captured_router_logits
from mdseq.noise import NoiseKey, Purpose
from mdseq.spec import RunSpec


class DiffusionObjective(nn.Module):
    """Noise, denoise, compare.

    With e = Emb(w), and f the denoiser's prediction, the loss of one token is the sum of these, each with its weight:

        min(SNR_t, snr_cap) |e - f(z_t, t)|^2 / z    denoising (DiffuSeq; the cap is Min-SNR's, arXiv 2303.09556, eq. 6)
        - log p(w | f(z_t, t))                       anchor (Difformer, arXiv 2212.09412, eq. 6), p read as `estimate`
        - log p(w | e + sigma_0 eps)                 rounding: keeps embeddings apart, does not pass the denoiser
        |alpha_{T-1} (e - m)|^2 / z                  prior: what is left of e at the end, if it is not left on purpose

    The objective "target" sums it over target tokens, and divides by their count in the global batch. "published" is
    DiffuSeq's (`training_losses_seq2seq`): z_0 = e + sigma_0 eps in place of e, but in the denoising at t = 0, the
    source's too, no anchor, and the mean over every position of a row, source and padding included. Both add
    absorbing_weight * ||m||, and the routers' losses.
    """

    def __init__(self, spec: RunSpec, vocab_size: int, device: torch.device | str = "cpu") -> None:
        super().__init__()
        config = DenoiserConfig.of(spec, vocab_size)
        diffusion = spec.diffusion
        self.spec = spec
        self.config = config  # AutoEP reads the number of experts here
        self.denoiser = Denoiser(config, spec.model.activation_checkpointing)
        self.absorbing = AbsorbingState(config.embedding_dim, learned=diffusion.absorbing)
        self.schedule = NoiseSchedule.of(diffusion)
        gamma = diffusion.gamma * diffusion.absorbing
        self.absorption = Absorption(gamma, diffusion.absorbing_schedule)
        self.timesteps = TimestepSampler(diffusion, device)
        self.balance = (
            RouterBalance(config.num_layers, config.num_experts, config.top_k, device) if config.num_experts else None
        )
        self.statistics = LossStatistics(diffusion.num_timesteps, device)

    def model(self) -> DiffusionModel:
        """What sampling needs, with the weights as they are now."""
        reading = self.spec.diffusion.estimate
        return DiffusionModel(self.denoiser, self.absorbing(), self.schedule, self.absorption, reading)

    def forward(self, batch: Batch) -> Tensor:
        """The micro-batch's share of the loss: its mean over all micro-batches of all ranks is the global loss."""
        diffusion = self.spec.diffusion
        published = diffusion.objective == "published"
        documents = batch.documents(self.config.num_source_global)
        target_bl = batch.target_bl | ~documents.real_bl if published else batch.target_bl
        document_bl = documents.document_bl.clamp(min=0)  # padding, where it counts, belongs to the first
        length, dim = batch.tokens_bl.shape[1], self.config.embedding_dim
        key = NoiseKey(self.spec.seed, batch.step, batch.row_b)

        # 1. Draw a timestep for each document.
        timestep_bm, weight_bm = self.timesteps.draw(
            key, batch.num_documents, batch.first_document_b, batch.totals.documents
        )

        # 2. Embed.
        vocabulary = self.denoiser.vocabulary()
        word_blz = self.denoiser.embed(batch.tokens_bl)
        rounded_blz = word_blz
        if diffusion.rounding_weight:
            first_sigma = (1.0 - self.schedule.alpha_bar_t[0].item()) ** 0.5
            rounded_blz = word_blz + first_sigma * key.normal(Purpose.EMBEDDING, length, dim)
        z_0 = rounded_blz if published else word_blz

        # 3. Noise the targets, z_t ~ q(z_t | z_0), and denoise. What is dropped of a source is absorbed, and says so.
        m_z = self.absorbing()
        reader = Reader.of(diffusion.estimate, vocabulary, m_z)
        epsilon = key.normal(Purpose.DIFFUSION, length, dim)
        uniform_bl = key.uniform(Purpose.ABSORBING, length)
        dropped_bm = key.uniform(Purpose.CONDITION, batch.num_documents) <= diffusion.condition_dropout
        dropped_bl = dropped_bm.gather(1, document_bl)
        if diffusion.source_dropout:
            dropped_bl = dropped_bl | (key.uniform(Purpose.SOURCE, length) <= diffusion.source_dropout)
        dropped_bl = dropped_bl & ~target_bl & documents.real_bl
        clean_blz = torch.where(dropped_bl[..., None], m_z, z_0)
        clean_time_bl = dropped_bl * NO_TIME
        share_bl = key.uniform(Purpose.SHARE, batch.num_documents).gather(1, document_bl)

        def denoise(timestep_bm: Tensor, estimate_blz: Tensor | None) -> tuple[Tensor, Tensor]:
            """The denoiser's output f, and its scores."""
            timestep_bl = timestep_bm.gather(1, document_bl)
            alpha_bl, sigma_bl = self.schedule.alpha_sigma(timestep_bl)
            replaced_bl = uniform_bl <= self.absorption.probability(share_bl, sigma_bl)
            z_t = corrupt(z_0, m_z, alpha_bl, sigma_bl, epsilon, replaced_bl)
            z_t = torch.where(target_bl[..., None], z_t, clean_blz)
            time_bl = torch.where(target_bl, self.schedule.time(timestep_bl), clean_time_bl)
            learns = self.training and torch.is_grad_enabled()
            dropout = Dropout(key, self.spec.model.dropout) if learns and self.spec.model.dropout else None
            f_blz = self.denoiser(z_t, time_bl, documents, estimate_blz, dropout=dropout)
            return f_blz, reader.scores(f_blz, z_t, self.schedule.log_snr(timestep_bl))

        # 4. In some steps, documents have an estimate at hand, made earlier on their way from noise.
        estimate_blz = None
        if self._helped(batch.step):
            lag_bm = diffusion.self_conditioning_lag * key.uniform(Purpose.LAG, batch.num_documents)
            earlier_bm = (timestep_bm + lag_bm * self.schedule.num_timesteps).clamp(max=self.schedule.last)
            with torch.no_grad():
                estimate_blz = reader.clean(*denoise(earlier_bm, None), target_bl)
            estimate_blz = estimate_blz * target_bl[..., None]
        with captured_router_logits(self.denoiser) as router_logits:
            f_blz, scores_bly = denoise(timestep_bm, estimate_blz)

        # 5. Compare, token by token.
        counted_bl = torch.ones_like(target_bl) if published else target_bl
        count = batch.totals.rows * length if published else batch.totals.target_tokens
        scale = batch.totals.micro_batches / max(count, 1)
        weight_bl = weight_bm.gather(1, document_bl) * counted_bl * scale
        timestep_bl = timestep_bm.gather(1, document_bl)
        goal_blz = torch.where((timestep_bl == 0)[..., None], word_blz, z_0)
        denoising_bl = (goal_blz - f_blz).square().mean(dim=-1)
        if diffusion.snr_cap:
            snr_bl = (2 * self.schedule.log_snr(timestep_bl)).exp().float()
            denoising_bl = denoising_bl * snr_bl.clamp(max=diffusion.snr_cap)
        # With a min_signal it would draw m and all embeddings together, until they are hard to tell apart.
        left = 0.0 if diffusion.min_signal else self.schedule.alpha_bar_t[-1].item()
        prior_bl = left * (z_0 - m_z).square().mean(dim=-1)
        token_loss_bl = diffusion.denoising_weight * denoising_bl + prior_bl

        # 6. Average over the global batch.
        parts = {"denoising": (weight_bl * denoising_bl).sum()} if diffusion.denoising_weight else {}
        loss = (weight_bl * token_loss_bl).sum()
        for name, part_weight, scored_bly, words in (
            ("anchor", diffusion.anchor_weight, scores_bly, reader.scored),
            ("rounding", diffusion.rounding_weight, rounded_blz, vocabulary),
        ):
            if part_weight:
                parts[name], each_n = cross_entropy(
                    scored_bly.flatten(0, 1), words, batch.tokens_bl.flatten(), weight_bl.flatten()
                )
                loss = loss + part_weight * parts[name]
                token_loss_bl = token_loss_bl + part_weight * each_n.view_as(token_loss_bl)
        self._record(timestep_bm, document_bl, counted_bl, token_loss_bl)

        # 7. Regularise the absorbing state and the routers.
        loss = loss + diffusion.absorbing_weight * m_z.norm()
        if self.balance is not None:
            layout = self.denoiser.layout(documents)
            slots = batch.totals.tokens + self.config.num_global * batch.totals.documents
            balance, router_z = self.balance.losses(router_logits, layout.real_bs.flatten())
            parts["balance"] = balance * batch.totals.micro_batches / slots
            parts["router_z"] = router_z * batch.totals.micro_batches / slots
            # Reported as the mean over layers, added for each of them, as published.
            experts, layers = self.spec.experts, self.config.num_layers
            loss = loss + layers * (experts.balance_weight * parts["balance"] + experts.z_weight * parts["router_z"])

        self.statistics.add(loss, parts)
        return loss

    def _helped(self, step: int) -> bool:
        """Whether a step's documents have an estimate; drawn for all of them, or those without would pay for it too."""
        share = self.spec.diffusion.self_conditioning
        key = NoiseKey(self.spec.seed, step, torch.zeros(1, dtype=torch.int64))
        return share > 0 and key.uniform(Purpose.SELF_CONDITIONING, 1).item() <= share

    def _record(self, timestep_bm: Tensor, document_bl: Tensor, counted_bl: Tensor, token_loss_bl: Tensor) -> None:
        """Tell the timestep sampler and the statistics the mean loss of each document, unweighted."""
        loss_bl = token_loss_bl.detach() * counted_bl
        loss_bm = torch.zeros(timestep_bm.shape, device=loss_bl.device).scatter_add_(1, document_bl, loss_bl)
        count_bm = torch.zeros_like(loss_bm).scatter_add_(1, document_bl, counted_bl.float())
        mean_bm = loss_bm / count_bm.clamp(min=1)
        self.timesteps.record(timestep_bm, mean_bm, count_bm > 0)
        self.statistics.add_documents(timestep_bm, mean_bm, count_bm > 0)

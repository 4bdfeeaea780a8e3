"""The training objective: what DeepSpeed wraps, so that `engine(batch)` is the loss.

Shapes: b batch, l length, m documents in a row, z embedding dimension, v vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdseq.data.batch import Batch
from mdseq.diffusion.absorbing import AbsorbingState, corrupt
from mdseq.diffusion.balance import RouterBalance
from mdseq.diffusion.schedule import NoiseSchedule
from mdseq.diffusion.statistics import LossStatistics
from mdseq.diffusion.timesteps import TimestepSampler
from mdseq.model.denoiser import Denoiser, DenoiserConfig
from mdseq.model.experts import captured_router_logits
from mdseq.noise import NoiseKey, Purpose
from mdseq.spec import RunSpec


class DiffusionObjective(nn.Module):
    """Noise, denoise, compare.

    The loss of one token, with f the denoiser's prediction, is (DiffuSeq, `training_losses_seq2seq`)

        |z_0 - f(z_t, t)|^2 / z          denoising; |Emb(w) - f|^2 / z at t = 0
        - log p(w | z_0)                 rounding: keeps embeddings apart, does not pass through the denoiser
        |alpha_{T-1} (z_0 - m)|^2 / z    prior: what is left of z_0 at the end

    The objective "target" sums it over target tokens, divides by their count in the global batch, and keeps the source
    exactly clean. The objective "published" is DiffuSeq's: the mean over every position of a row, source and padding
    included, with the embedding noise sigma_0 on the source too. Both add absorbing_weight * ||m||, and the routers'
    losses.
    """

    def __init__(self, spec: RunSpec, vocab_size: int, device: torch.device | str = "cpu") -> None:
        super().__init__()
        config = DenoiserConfig.of(spec, vocab_size)
        diffusion = spec.diffusion
        self.spec = spec
        self.config = config  # AutoEP reads the number of experts here
        self.denoiser = Denoiser(config)
        self.absorbing = AbsorbingState(config.embedding_dim, learned=diffusion.absorbing)
        self.schedule = NoiseSchedule(diffusion.num_timesteps)
        self.timesteps = TimestepSampler(diffusion.num_timesteps, diffusion.timestep_sampling == "loss_aware", device)
        self.balance = (
            RouterBalance(config.num_layers, config.num_experts, config.top_k, device) if config.num_experts else None
        )
        self.statistics = LossStatistics(diffusion.num_timesteps, device)

    def forward(self, batch: Batch) -> Tensor:
        """The micro-batch's share of the loss: its mean over all micro-batches of all ranks is the global loss."""
        diffusion = self.spec.diffusion
        documents = batch.documents(self.config.num_source_global)
        published = diffusion.objective == "published"
        noised_bl = batch.target_bl | ~documents.real_bl if published else batch.target_bl
        length, dim = batch.tokens_bl.shape[1], self.config.embedding_dim
        key = NoiseKey(self.spec.seed, batch.step, batch.row_b)

        # 1. Draw a timestep for each document.
        timestep_bm, weight_bm = self.timesteps.draw(key, batch.num_documents)
        document_bl = documents.document_bl.clamp(min=0)  # padding, where it counts, belongs to the first
        timestep_bl = timestep_bm.gather(1, document_bl)
        alpha_bl, sigma_bl = self.schedule.alpha_sigma(timestep_bl)

        # 2. Embed: z_0 = Emb(w) + sigma_0 * noise.
        word_blz = self.denoiser.embedding(batch.tokens_bl).float()
        first_sigma = (1.0 - self.schedule.alpha_bar_t[0].item()) ** 0.5
        embedding_noise = first_sigma * key.normal(Purpose.EMBEDDING, length, dim)
        z_0 = word_blz + embedding_noise * (1.0 if published else noised_bl[..., None])

        # 3. Noise the targets: z_t ~ q(z_t | z_0).
        m_z = self.absorbing()
        epsilon = key.normal(Purpose.DIFFUSION, length, dim)
        replaced_bl = key.uniform(Purpose.ABSORBING, length) <= diffusion.gamma * sigma_bl * diffusion.absorbing
        z_t = corrupt(z_0, m_z, alpha_bl, sigma_bl, epsilon, replaced_bl, noised_bl)

        # 4. Denoise.
        time_bl = torch.where(noised_bl, self.schedule.time(timestep_bl), 0.0)
        with captured_router_logits(self.denoiser) as router_logits:
            f = self.denoiser(z_t, time_bl, documents)

        # 5. Compare, token by token.
        goal = torch.where((timestep_bl == 0)[..., None], word_blz, z_0)
        denoising_bl = (goal - f).square().mean(dim=-1)
        logits_blv = self.denoiser.head(z_0.to(self.denoiser.head.weight.dtype))
        rounding_bl = F.cross_entropy(logits_blv.flatten(0, 1).float(), batch.tokens_bl.flatten(), reduction="none")
        rounding_bl = rounding_bl.view(batch.tokens_bl.shape)
        last_alpha_bar = self.schedule.alpha_bar_t[-1].item()
        prior_bl = last_alpha_bar * (z_0 - m_z).square().mean(dim=-1)
        token_loss_bl = denoising_bl + rounding_bl + prior_bl

        # 6. Average over the global batch.
        counted_bl = torch.ones_like(batch.target_bl) if published else batch.target_bl
        count = batch.totals.rows * length if published else batch.totals.target_tokens
        weighted_bl = weight_bm.gather(1, document_bl) * counted_bl
        scale = batch.totals.micro_batches / max(count, 1)
        loss = (weighted_bl * token_loss_bl).sum() * scale
        self._record(timestep_bm, document_bl, counted_bl, token_loss_bl)
        parts = {
            "denoising": (weighted_bl * denoising_bl).sum() * scale,
            "rounding": (weighted_bl * rounding_bl).sum() * scale,
        }

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

    def _record(self, timestep_bm: Tensor, document_bl: Tensor, counted_bl: Tensor, token_loss_bl: Tensor) -> None:
        """Tell the timestep sampler and the statistics the mean loss of each document, unweighted."""
        loss_bl = token_loss_bl.detach() * counted_bl
        loss_bm = torch.zeros(timestep_bm.shape, device=loss_bl.device).scatter_add_(1, document_bl, loss_bl)
        count_bm = torch.zeros_like(loss_bm).scatter_add_(1, document_bl, counted_bl.float())
        mean_bm = loss_bm / count_bm.clamp(min=1)
        self.timesteps.record(timestep_bm, mean_bm, count_bm > 0)
        self.statistics.add_documents(timestep_bm, mean_bm, count_bm > 0)

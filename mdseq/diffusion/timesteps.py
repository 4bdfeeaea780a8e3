"""How the timestep of each document is drawn.

Shapes: b batch, m documents in a row, t timesteps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mdseq.noise import NoiseKey, Purpose
from mdseq.spec import DiffusionSpec

HISTORY = 10
UNIFORM_SHARE = 0.001


class TimestepSampler:
    """Draws t by importance: p_t proportional to the root mean square of the losses seen at t, or uniformly.

    This is `LossSecondMomentResampler` of improved-diffusion (Nichol & Dhariwal, arXiv 2102.09672, section 3.3), which
    DiffuSeq uses: uniform until every t has HISTORY losses, then importance mixed with UNIFORM_SHARE of uniform, and
    each loss weighted by 1 / (T p_t), which leaves the expected loss unchanged. Here the history takes one entry per
    step and t, the mean over the global batch, so that it does not depend on how the batch is spread over ranks.

    Either way t is the inverse of the cumulative distribution at a uniform number. Stratified, these numbers are a
    lattice over the global batch with one random shift (VDM, arXiv 2107.00630, appendix I.1): every t is as likely as
    before, but a batch never has many alike. In continuous time t is any number of its T-th of [0, T - 1].

    Not a module: its state must stay in fp32 when the model is cast, and is the same on every rank.

    Attributes:
        squared_loss_th: The last HISTORY mean squared losses at each t, oldest first.
        num_seen_t: Losses recorded at each t, at most HISTORY.
        tally: fp32 [t, 2], this step's sums of squared losses and of counts; summed over ranks before `end_step`.
    """

    def __init__(self, spec: DiffusionSpec, device: torch.device | str = "cpu") -> None:
        self.num_timesteps = spec.num_timesteps
        self.loss_aware = spec.timestep_sampling == "loss_aware"
        self.stratified = spec.stratified
        self.continuous_time = spec.continuous_time
        kept = spec.num_timesteps if self.loss_aware else 0
        self.squared_loss_th = torch.zeros(kept, HISTORY, device=device)
        self.num_seen_t = torch.zeros(kept, device=device)
        self.tally = torch.zeros(kept, 2, device=device)

    def draw(
        self, key: NoiseKey, num_documents: int, first_document_b: Tensor, global_documents: int
    ) -> tuple[Tensor, Tensor]:
        """Timesteps, float64 [b, m], and the weights of their losses, fp32 [b, m].

        Args:
            key: Seed, step and rows.
            num_documents: m.
            first_document_b: Index of each row's first document in the global batch.
            global_documents: Documents in the global batch.
        """
        if self.stratified:
            uniform_bm = _lattice(key, first_document_b, num_documents, global_documents)
        else:
            uniform_bm = key.uniform(Purpose.TIMESTEP, num_documents).double()
        weight_bm = torch.ones_like(uniform_bm)
        if self.loss_aware:
            probability_t = self.probabilities()
            cumulative_t = probability_t.cumsum(dim=0)
            wanted_bm = uniform_bm * cumulative_t[-1]
            drawn_bm = torch.searchsorted(cumulative_t, wanted_bm).clamp(max=self.num_timesteps - 1)
            passed_bm = (wanted_bm - cumulative_t[drawn_bm]) / probability_t[drawn_bm]  # in (-1, 0]
            uniform_bm = (drawn_bm + 1 + passed_bm) / self.num_timesteps
            weight_bm = 1.0 / (self.num_timesteps * probability_t[drawn_bm])
        if self.continuous_time:
            return uniform_bm * (self.num_timesteps - 1), weight_bm.float()
        return ((uniform_bm * self.num_timesteps).ceil() - 1).clamp(0, self.num_timesteps - 1), weight_bm.float()

    def probabilities(self) -> Tensor:
        """p_t, float64 [t]."""
        uniform_t = self.num_seen_t.new_full((self.num_timesteps,), 1.0 / self.num_timesteps, dtype=torch.float64)
        weight_t = self.squared_loss_th.double().mean(dim=1).sqrt()
        importance_t = weight_t / weight_t.sum().clamp(min=1e-30)
        mixed_t = (1.0 - UNIFORM_SHARE) * importance_t + UNIFORM_SHARE * uniform_t
        warm = (self.num_seen_t >= HISTORY).all()
        return torch.where(warm, mixed_t, uniform_t)

    def record(self, timestep_bm: Tensor, loss_bm: Tensor, counted_bm: Tensor) -> None:
        """Add the unweighted losses of the documents that count to this rank's tally."""
        if self.loss_aware:
            width = 1.0 - 1.0 / self.num_timesteps if self.continuous_time else 1.0
            index_bm = (timestep_bm / width).long().clamp(max=self.num_timesteps - 1)
            entries = torch.stack([loss_bm.square(), torch.ones_like(loss_bm)], dim=-1) * counted_bm[..., None]
            self.tally.index_add_(0, index_bm.flatten(), entries.flatten(0, 1).detach().float())

    def end_step(self) -> None:
        """Move the tally, by now the sum over all ranks and micro-batches, into the history."""
        sum_t, count_t = self.tally.unbind(dim=1)
        mean_t = sum_t / count_t.clamp(min=1)
        full_t = self.num_seen_t >= HISTORY
        slot_t = torch.where(full_t, HISTORY - 1, self.num_seen_t).long()
        kept_th = torch.where(full_t[:, None], self.squared_loss_th.roll(-1, dims=1), self.squared_loss_th)
        updated_th = kept_th.scatter(1, slot_t[:, None], mean_t[:, None])
        seen_t = count_t > 0
        self.squared_loss_th = torch.where(seen_t[:, None], updated_th, self.squared_loss_th)
        self.num_seen_t = (self.num_seen_t + seen_t).clamp(max=HISTORY)
        self.tally.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        return {"squared_loss_th": self.squared_loss_th, "num_seen_t": self.num_seen_t}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.squared_loss_th = state["squared_loss_th"].to(self.tally.device)
        self.num_seen_t = state["num_seen_t"].to(self.tally.device)


def _lattice(key: NoiseKey, first_document_b: Tensor, num_documents: int, global_documents: int) -> Tensor:
    """For document i of n, (shift + stride * i / n) mod 1: one number in each n-th of (0, 1], float64 [b, m].

    A stride near n / 1.618 that shares no divisor with n keeps neighbours, which mostly share a rank, apart.
    """
    n = max(global_documents, 1)
    stride = next(k for k in range(max(round(n / 1.618), 1), n + 1) if math.gcd(k, n) == 1)
    shift = NoiseKey(key.seed, key.step, torch.zeros_like(key.row_b[:1])).uniform(Purpose.STRATA, 1).double()
    index_bm = first_document_b[:, None] + torch.arange(num_documents, device=first_document_b.device)
    return 1.0 - (shift + (index_bm * stride % n).double() / n) % 1.0

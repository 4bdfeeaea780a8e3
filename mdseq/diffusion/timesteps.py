"""How the timestep of each document is drawn.

Shapes: b batch, m documents in a row, t timesteps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mdseq.noise import NoiseKey, Purpose

HISTORY = 10
UNIFORM_SHARE = 0.001


class TimestepSampler:
    """Draws t by importance: p_t proportional to the root mean square of the losses seen at t, or uniformly.

    This is `LossSecondMomentResampler` of improved-diffusion (Nichol & Dhariwal, arXiv 2102.09672, section 3.3), which
    DiffuSeq uses: uniform until every t has HISTORY losses, then importance mixed with UNIFORM_SHARE of uniform, and
    each loss weighted by 1 / (T p_t), which leaves the expected loss unchanged. Here the history takes one entry per
    step and t, the mean over the global batch, so that it does not depend on how the batch is spread over ranks.

    Not a module: its state must stay in fp32 when the model is cast, and is the same on every rank.

    Attributes:
        squared_loss_th: The last HISTORY mean squared losses at each t, oldest first.
        num_seen_t: Losses recorded at each t, at most HISTORY.
        tally: fp32 [t, 2], this step's sums of squared losses and of counts; summed over ranks before `end_step`.
    """

    def __init__(self, num_timesteps: int, loss_aware: bool, device: torch.device | str = "cpu") -> None:
        self.num_timesteps = num_timesteps
        self.loss_aware = loss_aware
        kept = num_timesteps if loss_aware else 0
        self.squared_loss_th = torch.zeros(kept, HISTORY, device=device)
        self.num_seen_t = torch.zeros(kept, device=device)
        self.tally = torch.zeros(kept, 2, device=device)

    def draw(self, key: NoiseKey, num_documents: int) -> tuple[Tensor, Tensor]:
        """Timesteps int64 [b, m] and the weights of their losses, fp32 [b, m]."""
        uniform_bm = key.uniform(Purpose.TIMESTEP, num_documents).double()
        if not self.loss_aware:
            timestep_bm = (uniform_bm * self.num_timesteps).ceil().long() - 1
            return timestep_bm, torch.ones_like(uniform_bm, dtype=torch.float32)
        probability_t = self.probabilities()
        cumulative_t = probability_t.cumsum(dim=0)
        timestep_bm = torch.searchsorted(cumulative_t, uniform_bm * cumulative_t[-1])
        timestep_bm = timestep_bm.clamp(max=self.num_timesteps - 1)
        return timestep_bm, (1.0 / (self.num_timesteps * probability_t[timestep_bm])).float()

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
            entries = torch.stack([loss_bm.square(), torch.ones_like(loss_bm)], dim=-1) * counted_bm[..., None]
            self.tally.index_add_(0, timestep_bm.flatten(), entries.flatten(0, 1).detach().float())

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

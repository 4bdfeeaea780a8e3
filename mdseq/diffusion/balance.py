"""Keeping the experts evenly loaded.

Shapes: j layers, e experts, n slots of a micro-batch, k experts per slot.
"""

from __future__ import annotations

import torch
from torch import Tensor


class RouterBalance:
    """The load-balance loss and the router z-loss, over the global batch and over real slots only.

    balance = E sum_e f_e P_e per layer (Switch, arXiv 2101.03961, eq. 4), with f_e the share of assignments that went
    to expert e and P_e its mean probability; z = mean (logsumexp logits)^2 (ST-MoE, arXiv 2202.08906, eq. 5).

    f_e is that of the previous step, over all ranks and micro-batches: known before the forward pass, it makes the
    loss a sum over slots, whatever the number of ranks, and needs no collective inside the model. The gradient, which
    treats f_e as a constant anyway, is that of the definition one step late.

    Not a module: its state must stay in fp32 when the model is cast, and is the same on every rank.

    Attributes:
        share_je: f_e of each layer in the last step; uniform before the first.
        tally: fp32 [j, e], this step's assignments; summed over ranks before `end_step`.
        assigned_je: Assignments since `take_load`.
    """

    def __init__(self, num_layers: int, num_experts: int, top_k: int, device: torch.device | str = "cpu") -> None:
        self.num_experts = num_experts
        self.top_k = top_k
        self.share_je = torch.full((num_layers, num_experts), 1.0 / num_experts, device=device)
        self.tally = torch.zeros_like(self.share_je)
        self.assigned_je = torch.zeros_like(self.share_je)

    def losses(self, logits: list[Tensor], real_n: Tensor) -> tuple[Tensor, Tensor]:
        """This micro-batch's sums over real slots of the balance loss and the z-loss, each the mean over layers.

        Args:
            logits: Router logits [n, e] of each layer.
            real_n: Slots that hold something.
        """
        assert len(logits) == len(self.share_je), f"{len(logits)} routers ran, {len(self.share_je)} layers have one"
        logits_jne = torch.stack(logits).float()
        real_jn = real_n.float().expand(logits_jne.shape[:2])

        chosen_jnk = logits_jne.detach().topk(self.top_k, dim=-1).indices
        real_jnk = real_jn[..., None].expand(chosen_jnk.shape)
        self.tally.scatter_add_(1, chosen_jnk.flatten(1), real_jnk.flatten(1))

        balance_jn = self.num_experts * (logits_jne.softmax(dim=-1) * self.share_je[:, None]).sum(dim=-1)
        z_jn = logits_jne.logsumexp(dim=-1).square()
        return (balance_jn * real_jn).sum(dim=1).mean(), (z_jn * real_jn).sum(dim=1).mean()

    def end_step(self) -> None:
        """Take the tally, by now the sum over all ranks and micro-batches, as the next step's shares."""
        self.share_je = self.tally / self.tally.sum(dim=1, keepdim=True).clamp(min=1)
        self.assigned_je += self.tally
        self.tally.zero_()

    def take_load(self) -> Tensor:
        """Each expert's share of its layer's assignments since the last call, [j, e]."""
        load_je = self.assigned_je / self.assigned_je.sum(dim=1, keepdim=True).clamp(min=1)
        self.assigned_je.zero_()
        return load_je

    def state_dict(self) -> dict[str, Tensor]:
        return {"share_je": self.share_je}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.share_je = state["share_je"].to(self.tally.device)

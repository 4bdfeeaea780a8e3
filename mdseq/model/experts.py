"""Feed-forward layers: one dense SwiGLU, or routed experts, in the form that DeepSpeed's AutoEP adopts.

Shapes: b batch, s slots, d hidden dimension, f inner dimension, e experts, k experts per token, n = b * s tokens,
a = n * k assignments.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdseq.model.recompute import in_pieces


class DenseFeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer, arXiv 2002.05202).

    With `recompute`, long rows are trained on piece by piece, see `mdseq/model/recompute.py`.
    """

    def __init__(self, hidden_dim: int, feedforward_dim: int, *, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.gate_up = nn.Linear(hidden_dim, 2 * feedforward_dim, bias=False)
        self.down = nn.Linear(feedforward_dim, hidden_dim, bias=False)

    def forward(self, x_bsd: Tensor) -> Tensor:
        out_nd = in_pieces(
            lambda x_nd: self.down(swiglu(self.gate_up(x_nd))), x_bsd.flatten(0, 1), recompute=self.recompute
        )
        return out_nd.view(x_bsd.shape)


class Experts(nn.Module):
    """The weights of all experts of a layer, each a SwiGLU; names and shapes are AutoEP's."""

    def __init__(self, num_experts: int, hidden_dim: int, feedforward_dim: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * feedforward_dim, hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_dim, feedforward_dim))

    def forward(self, x_ad: Tensor, count_e: Tensor) -> Tensor:
        """Apply to rows sorted by expert, `count_e` of them each."""
        groups = x_ad.split(count_e.tolist())
        outputs = [
            F.linear(swiglu(F.linear(x, gate_up)), down)
            for x, gate_up, down in zip(groups, self.gate_up_proj, self.down_proj, strict=True)
        ]
        return torch.cat(outputs)


class RoutedExperts(nn.Module):
    """A mixture of experts: softmax router, top-k without dropping; weights sum to 1 over the k, if there are several.

    AutoEP (DeepSpeed) recognises a module with `gate` and `experts` and replaces it by its own layer, which computes
    the same function and spreads the experts over ranks. With `recompute`, long rows are trained on piece by piece, see
    `mdseq/model/recompute.py`.
    """

    def __init__(
        self, hidden_dim: int, feedforward_dim: int, num_experts: int, top_k: int, *, recompute: bool = False
    ) -> None:
        super().__init__()
        self.top_k = top_k
        self.recompute = recompute
        self.gate = nn.Linear(hidden_dim, num_experts, bias=False)
        self.experts = Experts(num_experts, hidden_dim, feedforward_dim)

    def forward(self, x_bsd: Tensor) -> Tensor:
        x_nd = x_bsd.flatten(0, 1)
        probability_ne = self.gate(x_nd).float().softmax(dim=-1)
        weight_nk, expert_nk = probability_ne.topk(self.top_k, dim=-1)
        if self.top_k > 1:  # a single weight would always be 1, and the router learn nothing from the output
            weight_nk = weight_nk / weight_nk.sum(dim=-1, keepdim=True)
        return in_pieces(self._combined, x_nd, weight_nk, expert_nk, recompute=self.recompute).view(x_bsd.shape)

    def _combined(self, x_nd: Tensor, weight_nk: Tensor, expert_nk: Tensor) -> Tensor:
        """The weighted sum of each slot's experts."""
        order_a = expert_nk.flatten().argsort(stable=True)
        count_e = expert_nk.flatten().bincount(minlength=self.gate.out_features)
        out_ad = self.experts(x_nd[order_a // self.top_k], count_e)
        out_ad = torch.empty_like(out_ad).index_copy(0, order_a, out_ad)
        out_nd = (out_ad.view(*expert_nk.shape, -1) * weight_nk[..., None]).sum(dim=1)
        return out_nd.to(x_nd.dtype)


@contextmanager
def captured_router_logits(denoiser: nn.Module) -> Iterator[list[Tensor]]:
    """The logits [n, e] of every router that runs inside the block, in layer order, with their gradients.

    Works for `RoutedExperts` and for the layers that AutoEP puts in their place, whose router is `router.gate`.
    """
    logits: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _module, _args, output: logits.append(output))
        for name, module in denoiser.named_modules()
        if name.endswith((".feedforward.gate", ".feedforward.router.gate"))
    ]
    try:
        yield logits
    finally:
        for hook in hooks:
            hook.remove()


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up

"""Feed-forward layers: one dense SwiGLU, or routed experts, in the form that DeepSpeed's AutoEP adopts.

Shapes: b batch, s slots, d hidden dimension, f inner dimension, e experts, k experts per token, n = b * s tokens,
a = n * k assignments.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mdseq.kernels import grouped_linear, swiglu
from mdseq.model.assignment import Assignment
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

    def forward(self, x_ad: Tensor, weight_a: Tensor, end_e: Tensor) -> Tensor:
        """Apply to rows sorted by expert, and weight the results.

        The weight comes before the last product, which is linear: so its gradient does not need the product's result.

        Args:
            weight_a: fp32.
            end_e: int32, the row behind the last of each expert.
        """
        inner_af = swiglu(grouped_linear(x_ad, self.gate_up_proj, end_e), weight_a)
        return grouped_linear(inner_af, self.down_proj, end_e)


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
        assignment = Assignment.of(expert_nk, self.gate.out_features)
        out_ad = self.experts(
            assignment.rows_of_tokens(x_nd), assignment.rows_of_assignments(weight_nk), assignment.end_e
        )
        return assignment.sum_of_rows(out_ad)


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

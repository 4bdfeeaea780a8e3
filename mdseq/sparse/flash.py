"""Attention by torch's FlashAttention kernel for segments of variable length, on a GPU, in bfloat16 or float16.

The kernel knows segments and windows, but neither dilation nor global slots. So attention is put together from parts:
the window of each residue class of the tokens (every d-th row, in place); tokens to the global slots of their document;
global slots to the tokens of their document; global slots to each other. Outputs merge by log-sum-exp. In the backward
pass every part's kernel gets the *merged* output and lse: with P = exp(S - lse) and rowsum(dO * O) those of the whole,
its gradients are exactly its share, and they add up.

Shapes: b batch, s slots, g global slots, n = b * s rows, h heads, d head dimension, r copies of global slots, c copies
of one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mdseq.sparse.documents import Layout
from mdseq.sparse.merge import merge_many, merge_two
from mdseq.sparse.pattern import Pattern
from mdseq.sparse.segments import GlobalSegments, Segments, global_segments, window_segments

Three = tuple[Tensor, Tensor, Tensor]


class Kernel(Protocol):
    """Attention within segments, over keys that are at most `window` rows away (None: over all).

    A query without keys gets zeros and an lse of inf; a key without queries gets zero gradients. Rows outside all
    segments stay as they were found in memory.
    """

    def forward(
        self, q_nhd: Tensor, k_nhd: Tensor, v_nhd: Tensor, segments: Segments, window: int | None
    ) -> tuple[Tensor, Tensor]:
        """The output, [n, h, d], and lse, [h, n] in float32."""

    def backward(
        self,
        grad_nhd: Tensor,
        q_nhd: Tensor,
        k_nhd: Tensor,
        v_nhd: Tensor,
        out_nhd: Tensor,
        lse_hn: Tensor,
        segments: Segments,
        window: int | None,
    ) -> Three:
        """The gradients of q, k and v, given the output and lse over all keys, of which these may be a part."""


class TorchKernel:
    """The kernel that comes with torch (FlashAttention-2, arXiv 2307.08691). The last dimension must be contiguous."""

    def forward(
        self, q_nhd: Tensor, k_nhd: Tensor, v_nhd: Tensor, segments: Segments, window: int | None
    ) -> tuple[Tensor, Tensor]:
        out_nhd, lse_hn, *_ = torch.ops.aten._flash_attention_forward(
            q_nhd, k_nhd, v_nhd, *_bounds(segments), 0.0, False, False, **_window(window)
        )
        return out_nhd, lse_hn

    def backward(
        self,
        grad_nhd: Tensor,
        q_nhd: Tensor,
        k_nhd: Tensor,
        v_nhd: Tensor,
        out_nhd: Tensor,
        lse_hn: Tensor,
        segments: Segments,
        window: int | None,
    ) -> Three:
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=q_nhd.device)
        inputs = (grad_nhd.contiguous(), q_nhd, k_nhd, v_nhd, out_nhd.contiguous(), lse_hn.contiguous())
        return torch.ops.aten._flash_attention_backward(
            *inputs, *_bounds(segments), 0.0, False, no_dropout, no_dropout, **_window(window)
        )


def _bounds(segments: Segments) -> tuple[Tensor, Tensor, int, int]:
    return segments.start_q, segments.start_k, segments.max_q, segments.max_k


def _window(window: int | None) -> dict[str, int]:
    keys = -1 if window is None else window
    return {"window_size_left": keys, "window_size_right": keys}


TORCH_KERNEL = TorchKernel()


def attend_flash(
    q_bshd: Tensor,
    k_bshd: Tensor,
    v_bshd: Tensor,
    pattern: Pattern,
    layout: Layout,
    kernel: Kernel = TORCH_KERNEL,
) -> Tensor:
    plan = FlashPlan.of(pattern, layout, q_bshd.shape[2])
    flat = (x_bshd.flatten(0, 1) for x_bshd in (q_bshd, k_bshd, v_bshd))
    out_nhd: Tensor = _Flash.apply(*flat, plan, kernel)
    return out_nhd.view(q_bshd.shape)


@dataclass(frozen=True)
class WindowPart:
    """The tokens of one residue class in the heads of one dilation."""

    rows: slice
    heads: slice
    segments: Segments


@dataclass(frozen=True)
class FlashPlan:
    """The parts of one layer's attention.

    Attributes:
        window: Keys per side; None for all.
        parts: Together they hold every row in every head once.
        to_global: None where the layout has no global slots.
        batch, num_global: b and g.
    """

    window: int | None
    parts: tuple[WindowPart, ...]
    to_global: GlobalSegments | None
    batch: int
    num_global: int

    @classmethod
    def of(cls, pattern: Pattern, layout: Layout, num_heads: int) -> FlashPlan:
        parts = []
        for heads, dilation in pattern.groups(num_heads):
            stride = 1 if pattern.window is None else dilation
            classes = layout.plan(("flash", "window", stride), lambda stride=stride: window_segments(layout, stride))  # type: ignore[misc]
            parts += [WindowPart(slice(i, None, stride), heads, segments) for i, segments in enumerate(classes)]
        to_global = None
        if layout.num_global:
            to_global = layout.plan(("flash", "global"), lambda: global_segments(layout))
        return cls(pattern.window, tuple(parts), to_global, len(layout.document_bs), layout.num_global)

    def at_globals(self, x_nhd: Tensor) -> Tensor:
        """The rows of global slots, as a view [b, g, h, d]."""
        return x_nhd.view(self.batch, -1, *x_nhd.shape[1:])[:, : self.num_global]


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_nhd: Tensor, k_nhd: Tensor, v_nhd: Tensor, plan: FlashPlan, kernel: Kernel) -> Tensor:
        out_nhd, lse_hn = _attend_windows(q_nhd, k_nhd, v_nhd, plan, kernel)
        if plan.to_global is not None:
            out_nhd, lse_hn = _attend_globals(q_nhd, k_nhd, v_nhd, out_nhd, lse_hn, plan, plan.to_global, kernel)
        ctx.save_for_backward(q_nhd, k_nhd, v_nhd, out_nhd, lse_hn)
        ctx.plan, ctx.kernel = plan, kernel
        return out_nhd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_nhd: Tensor) -> tuple[Tensor | None, ...]:
        plan, kernel = ctx.plan, ctx.kernel
        q_nhd, k_nhd, v_nhd, out_nhd, lse_hn = ctx.saved_tensors
        # As the kernel has it: the lse of nothing is inf, for then exp(S - lse) is zero.
        whole = (grad_nhd, q_nhd, k_nhd, v_nhd, out_nhd, lse_hn.masked_fill(lse_hn == -torch.inf, torch.inf))
        gradients = _window_gradients(*whole, plan, kernel)
        if plan.to_global is not None:
            _add_global_gradients(*whole, gradients, plan, plan.to_global, kernel)
        return (*gradients, None, None)


def _attend_windows(
    q_nhd: Tensor, k_nhd: Tensor, v_nhd: Tensor, plan: FlashPlan, kernel: Kernel
) -> tuple[Tensor, Tensor]:
    """Tokens to the tokens of their window; zeros at global slots."""
    outputs = []
    for part in plan.parts:
        q, k, v = (x[part.rows, part.heads] for x in (q_nhd, k_nhd, v_nhd))
        outputs.append(kernel.forward(q, k, v, part.segments, plan.window))
    out_nhd, lse_hn = outputs[0]
    if len(outputs) > 1:
        out_nhd = q_nhd.new_empty(q_nhd.shape)
        lse_hn = lse_hn.new_empty(q_nhd.shape[1], q_nhd.shape[0])
        for part, (out, lse) in zip(plan.parts, outputs, strict=True):
            out_nhd[part.rows, part.heads] = out
            lse_hn[part.heads, part.rows] = lse
    return out_nhd, _or_nothing(lse_hn)


def _window_gradients(
    grad_nhd: Tensor,
    q_nhd: Tensor,
    k_nhd: Tensor,
    v_nhd: Tensor,
    out_nhd: Tensor,
    lse_hn: Tensor,
    plan: FlashPlan,
    kernel: Kernel,
) -> Three:
    def gradients_of(part: WindowPart) -> Three:
        grad, q, k, v, out = (x[part.rows, part.heads] for x in (grad_nhd, q_nhd, k_nhd, v_nhd, out_nhd))
        return kernel.backward(grad, q, k, v, out, lse_hn[part.heads, part.rows], part.segments, plan.window)

    if len(plan.parts) == 1:
        return gradients_of(plan.parts[0])
    gradients = (torch.empty_like(q_nhd), torch.empty_like(k_nhd), torch.empty_like(v_nhd))
    for part in plan.parts:
        for whole_nhd, share in zip(gradients, gradients_of(part), strict=True):
            whole_nhd[part.rows, part.heads] = share
    return gradients


def _attend_globals(
    q_nhd: Tensor,
    k_nhd: Tensor,
    v_nhd: Tensor,
    out_nhd: Tensor,
    lse_hn: Tensor,
    plan: FlashPlan,
    to_global: GlobalSegments,
    kernel: Kernel,
) -> tuple[Tensor, Tensor]:
    """Merge the global keys into the output of the tokens, and fill in that of the global queries."""
    q_g, k_g, v_g = (plan.at_globals(x).flatten(0, 1) for x in (q_nhd, k_nhd, v_nhd))
    q_r, k_r, v_r = (x[to_global.source_r] for x in (q_g, k_g, v_g))

    out, lse = kernel.forward(q_nhd, k_r, v_r, to_global.pieces, None)
    out_nhd, lse_hn = merge_two(out_nhd, lse_hn, out, _or_nothing(lse))

    out_r, lse_hr = kernel.forward(q_r, k_nhd, v_nhd, to_global.pieces.swapped(), None)
    is_copy = to_global.is_copy_bgc
    out_gchd = torch.where(is_copy[..., None, None], out_r[to_global.copy_bgc], 0.0)
    lse_hgc = torch.where(is_copy, lse_hr[:, to_global.copy_bgc], -torch.inf)
    out, lse = kernel.forward(q_g, k_g, v_g, to_global.among, None)
    out_g, lse_hg = merge_two(*merge_many(out_gchd, lse_hgc), out, _or_nothing(lse))

    at_globals = plan.at_globals(out_nhd)
    at_globals.copy_(out_g.view(at_globals.shape))
    plan.at_globals(lse_hn.t()).copy_(lse_hg.t().view(at_globals.shape[:-1]))
    return out_nhd, lse_hn


def _add_global_gradients(
    grad_nhd: Tensor,
    q_nhd: Tensor,
    k_nhd: Tensor,
    v_nhd: Tensor,
    out_nhd: Tensor,
    lse_hn: Tensor,
    gradients: Three,
    plan: FlashPlan,
    to_global: GlobalSegments,
    kernel: Kernel,
) -> None:
    grad_g, q_g, k_g, v_g, out_g = (plan.at_globals(x).flatten(0, 1) for x in (grad_nhd, q_nhd, k_nhd, v_nhd, out_nhd))
    lse_hg = plan.at_globals(lse_hn.t()).flatten(0, 1).t()
    grad_r, q_r, k_r, v_r, out_r = (x[to_global.source_r] for x in (grad_g, q_g, k_g, v_g, out_g))
    lse_hr = lse_hg[:, to_global.source_r]

    def total(x_rhd: Tensor) -> Tensor:
        """Of all copies of a global slot; rows that are no copy may hold anything."""
        x_gchd = x_rhd[to_global.copy_bgc].masked_fill(~to_global.is_copy_bgc[..., None, None], 0.0)
        return x_gchd.sum(dim=1, dtype=torch.promote_types(x_rhd.dtype, torch.float32))

    from_tokens = kernel.backward(grad_nhd, q_nhd, k_r, v_r, out_nhd, lse_hn, to_global.pieces, None)
    from_globals = kernel.backward(grad_r, q_r, k_nhd, v_nhd, out_r, lse_hr, to_global.pieces.swapped(), None)
    among = kernel.backward(grad_g, q_g, k_g, v_g, out_g, lse_hg, to_global.among, None)

    of_tokens = (from_tokens[0], from_globals[1], from_globals[2])
    of_globals = (total(from_globals[0]), total(from_tokens[1]), total(from_tokens[2]))
    for whole_nhd, token_share, global_share, among_share in zip(gradients, of_tokens, of_globals, among, strict=True):
        whole_nhd += token_share
        at_globals = plan.at_globals(whole_nhd)
        at_globals.copy_((global_share + among_share).view(at_globals.shape))


def _or_nothing(lse: Tensor) -> Tensor:
    """The kernel marks queries without keys by an lse of inf; as a sum of nothing it is -inf."""
    return lse.masked_fill(lse == torch.inf, -torch.inf)

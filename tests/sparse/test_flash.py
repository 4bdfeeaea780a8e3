"""The flash engine's parts, their merging and their backward pass, with a slow exact kernel in place of the GPU's."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mdseq.sparse import Pattern, segments
from mdseq.sparse.flash import attend_flash
from mdseq.sparse.merge import merge_many, merge_two
from mdseq.sparse.reference import attend_reference
from mdseq.sparse.segments import Segments
from tests.sparse.layouts import layouts, pack


class SlowKernel:
    """The contract of `Kernel`, by its definition. Memory that the GPU kernel would leave as found is NaN here."""

    def forward(self, q_nhd, k_nhd, v_nhd, segments: Segments, window):
        out_nhd = torch.full_like(q_nhd, torch.nan)
        lse_hn = torch.full((q_nhd.shape[1], len(q_nhd)), torch.nan, dtype=torch.float64)
        for queries, keys in _slices(segments):
            score_hqk = _scores(q_nhd[queries], k_nhd[keys], window)
            lse_hn[:, queries] = score_hqk.logsumexp(-1) if keys.stop > keys.start else torch.inf
            out_nhd[queries] = torch.einsum("hqk,khd->qhd", score_hqk.softmax(-1), v_nhd[keys])
        return out_nhd, lse_hn

    def backward(self, grad_nhd, q_nhd, k_nhd, v_nhd, out_nhd, lse_hn, segments: Segments, window):
        grad_q, grad_k, grad_v = (torch.full_like(x, torch.nan) for x in (q_nhd, k_nhd, v_nhd))
        for queries, keys in _slices(segments):
            q, k, v, grad = q_nhd[queries], k_nhd[keys], v_nhd[keys], grad_nhd[queries]
            weight_hqk = torch.exp(_scores(q, k, window) - lse_hn[:, queries, None])
            delta_hq1 = (grad * out_nhd[queries]).sum(-1).t()[..., None]
            grad_score_hqk = weight_hqk * (torch.einsum("qhd,khd->hqk", grad, v) - delta_hq1) / q.shape[-1] ** 0.5
            grad_q[queries] = torch.einsum("hqk,khd->qhd", grad_score_hqk, k)
            grad_k[keys] = torch.einsum("hqk,qhd->khd", grad_score_hqk, q)
            grad_v[keys] = torch.einsum("hqk,qhd->khd", weight_hqk, grad)
        return grad_q, grad_k, grad_v


def _slices(segments: Segments):
    pairs = zip(pairwise(segments.start_q.tolist()), pairwise(segments.start_k.tolist()), strict=True)
    for queries, keys in pairs:
        assert 0 <= queries[1] - queries[0] <= segments.max_q
        assert 0 <= keys[1] - keys[0] <= segments.max_k
        yield slice(*queries), slice(*keys)


def _scores(q: Tensor, k: Tensor, window: int | None) -> Tensor:
    score_hqk = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    if window is None:
        return score_hqk
    distance_qk = (torch.arange(len(q))[:, None] - torch.arange(len(k))).abs()
    return score_hqk.masked_fill(distance_qk > window, -torch.inf)


patterns = st.builds(
    Pattern,
    window=st.none() | st.integers(1, 60),
    dilations=st.sampled_from([(1,), (2,), (5,), (1, 3), (4, 1), (100,)]),
)


@settings(max_examples=120)
@given(layouts(), patterns, st.sampled_from([3, 16, 2048]), st.integers(0, 9))
def test_parts_merge_to_the_definition(layout, pattern, min_piece, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (*layout.document_bs.shape, 2, 8)
    *inputs, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4))
    q, k, v = (x.requires_grad_() for x in inputs)

    def outcome(out: Tensor) -> list[Tensor]:
        return [out, *torch.autograd.grad(out, (q, k, v), grad)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "MIN_PIECE", min_piece)
        ours = outcome(attend_flash(q, k, v, pattern, layout, SlowKernel()))
    exact = outcome(attend_reference(q, k, v, pattern, layout))
    for one, other in zip(ours, exact, strict=True):
        assert (one - other).abs().max() <= 1e-12 * other.abs().max().clamp(min=1.0)


def test_a_long_document_is_cut_for_its_global_slots(monkeypatch):
    """... and its pieces run abreast: the longest segment does not grow with the document."""
    monkeypatch.setattr(segments, "MIN_PIECE", 10)
    layout = pack([[95]], 100).layout(4)
    pieces = segments.global_segments(layout).pieces
    lengths_q, lengths_k = pieces.start_q.diff(), pieces.start_k.diff()
    assert lengths_q.max() == pieces.max_q == 10
    assert lengths_q.sum() == 104
    assert lengths_k.tolist().count(4) == 10  # slots 4 to 98 touch ten stretches of ten


def test_merging_with_nothing_changes_nothing():
    out, other = torch.randn(3, 2, 4), torch.zeros(3, 2, 4)
    lse, nothing = torch.randn(2, 3), torch.full((2, 3), -torch.inf)
    for merged, merged_lse in (merge_two(out, lse, other, nothing), merge_two(other, nothing, out, lse)):
        torch.testing.assert_close(merged, out)
        torch.testing.assert_close(merged_lse, lse)
    merged, merged_lse = merge_two(other, nothing, other, nothing)
    assert (merged == 0).all()
    assert (merged_lse == -torch.inf).all()
    merged, merged_lse = merge_many(torch.stack([out, other], 1), torch.stack([lse, nothing], 2))
    torch.testing.assert_close(merged, out)
    torch.testing.assert_close(merged_lse, lse)

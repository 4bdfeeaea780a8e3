"""The fused engine's plan; and where triton can interpret its kernels, these on a CPU.

With triton installed: `TRITON_INTERPRET=1 pytest tests/sparse/test_fused.py`. The tests on a GPU are in test_cuda.py.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings

from mdseq.sparse import NO_DOCUMENT, Pattern, fused
from mdseq.sparse.fused import FusedPlan, Tile, Tiles, attend_fused, document_ranges
from mdseq.sparse.reference import attend_reference
from tests.sparse.layouts import layouts, pack

interpreted = pytest.mark.skipif(
    find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs triton, and TRITON_INTERPRET=1 in the environment",
)


@settings(max_examples=50)
@given(layouts())
def test_ranges_hold_the_slots_of_the_document_and_no_others(layout):
    g = layout.num_global
    for document_s, ranges_ns in zip(layout.document_bs.tolist(), document_ranges(layout), strict=True):
        for slot, document in enumerate(document_s):
            token, token_end, shared, shared_end = ranges_ns[:, slot].tolist()
            met = [*range(shared, shared_end), *range(g + token, g + token_end)]
            same = [other for other, owner in enumerate(document_s) if owner == document != NO_DOCUMENT]
            assert met == same


def test_neighbouring_heads_of_one_dilation_share_a_launch():
    layout = pack([[50]], 60).layout(2)
    assert FusedPlan.of(Pattern(5, (1, 1, 2, 1)), layout, 8).groups == ((0, 4, 1), (4, 2, 2), (6, 2, 1))
    assert FusedPlan.of(Pattern(None, (1, 2)), layout, 8).groups == ((0, 8, 1),)


def test_a_long_row_is_cut_into_pieces_for_few_global_slots_and_stays_whole_for_many():
    few, many = pack([[9000]], 9000).layout(1), pack([[9000]], 9000).layout(2000)
    assert FusedPlan.of(Pattern(5), few, 1).pieces == 9001 // fused.MIN_PIECE
    assert FusedPlan.of(Pattern(5), many, 1).pieces == 1


@interpreted
@pytest.mark.parametrize(
    ("pattern", "marked_share", "num_global"),
    [(Pattern(20), 0.0, 0), (Pattern(7, (1, 3)), 0.2, 1), (Pattern(None), 1.0, 0)],
)
def test_kernels_equal_the_definition(pattern, marked_share, num_global, monkeypatch):
    small = Tile(16, 16, 4, 1)
    monkeypatch.setattr(Tiles, "of", lambda head_dim, dtype: Tiles(small, small, small))
    monkeypatch.setattr(fused, "MIN_PIECE", 32)
    layout = pack([[60, 0, 1, 20], [], [30, 50]], 90, marked_share).layout(num_global)
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(*layout.document_bs.shape, 2, 16, generator=generator) for _ in range(4))

    def outcome(attention, *inputs):
        inputs = [x.requires_grad_() for x in inputs]
        out = attention(*inputs, pattern, layout)
        return [out, *torch.autograd.grad(out, inputs, grad.to(out.dtype))]

    ours = outcome(attend_fused, q, k, v)
    exact = outcome(attend_reference, q.double(), k.double(), v.double())
    for one, other in zip(ours, exact, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()
    assert ours[0][~layout.real_bs].abs().sum() == 0

"""Dropout drops what it says, where it says, and the same in any company."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from mdseq.model.attention import SelfAttention
from mdseq.model.block import Block
from mdseq.model.dropout import ATTENTION, FEEDFORWARD, Dropout
from mdseq.model.embedding import rotary_angles
from mdseq.model.experts import DenseFeedForward
from mdseq.noise import NoiseKey
from mdseq.sparse import Layout, Pattern
from tests.sparse.layouts import pack


def dropout(share: float = 0.3, step: int = 2, rows: tuple[int, ...] = (7,), seed: int = 1) -> Dropout:
    return Dropout(NoiseKey(seed, step, torch.tensor(rows)), share)


def whole_row(length: int = 200) -> Layout:
    return pack([[length]], length).layout(0)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_drops_its_share_and_scales_the_rest(share):
    x_bsd = torch.ones(1, 200, 100, dtype=torch.float64)
    out_bsd = dropout(share).add(None, x_bsd, whole_row())
    dropped_bsd = out_bsd == 0
    assert abs(dropped_bsd.double().mean() - share) <= 4 * (share * (1 - share) / out_bsd.numel()) ** 0.5 + 2**-16
    assert out_bsd[~dropped_bsd].unique().item() == pytest.approx(1 / (1 - share), rel=1e-3)
    assert torch.equal(dropout(share).add(x_bsd, x_bsd, whole_row()), x_bsd + out_bsd)


def test_the_largest_share_is_finite():
    assert torch.isfinite(dropout(1 - 1e-9).add(None, torch.ones(1, 200, 1000), whole_row())).all()


def test_decisions_are_independent():
    """Of features, slots, places, steps, rows and seeds: each agrees with the first mask as chance has it."""
    layout = whole_row()
    base = dropout(0.5)
    masks = [base.kept(layout, place, 100) for place in range(4)]
    masks += [
        each.kept(layout, 0, 100) for each in (dropout(0.5, step=3), dropout(0.5, rows=(8,)), dropout(0.5, seed=2))
    ]
    masks += [masks[0].roll(shift, dim) for dim in (1, 2) for shift in (1, 2, 13, 26)]
    for other in masks[1:]:
        assert abs((masks[0] == other).double().mean() - 0.5) < 4 * 0.5 / other.numel() ** 0.5


def test_every_sublayer_has_its_place():
    x_bsd, layout = torch.ones(1, 20, 16), whole_row(20)
    places = [dropout(), *(dropout().of_layer(index) for index in range(3))]
    masks = [each.add(None, x_bsd, layout, sublayer) for each in places for sublayer in (ATTENTION, FEEDFORWARD)]
    assert len({mask.numpy().tobytes() for mask in masks}) == len(masks)


@given(
    st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=4),
    st.sampled_from([0.0, 0.4, 1.0]),
    st.integers(0, 2),
    st.integers(0, 5),
)
def test_a_row_drops_the_same_in_any_company_and_at_any_length(lengths, marked_share, num_global, padding):
    """However many documents, global slots and global tokens the other rows have."""
    documents = pack(lengths, 12, marked_share)
    layout, rows = documents.layout(num_global), tuple(range(5, 5 + len(lengths)))
    together_bsd = dropout(rows=rows).kept(layout, 0, 9)
    for b, row_lengths in enumerate(lengths):
        alone = pack([row_lengths], 12 + padding)
        if documents.global_bl is not None:
            global_bl = torch.zeros_like(alone.real_bl)
            global_bl[0, :12] = documents.global_bl[b]
            alone = alone.marked(global_bl)
        alone_layout = alone.layout(num_global)
        alone_bsd = dropout(rows=rows[b : b + 1]).kept(alone_layout, 0, 9)
        real_s, alone_s = layout.real_bs[b], alone_layout.real_bs[0]
        assert torch.equal(layout.identity_bs[b, real_s], alone_layout.identity_bs[0, alone_s])
        assert torch.equal(together_bsd[b, real_s], alone_bsd[0, alone_s])
        assert layout.identity_bs[b, real_s].unique().numel() == real_s.sum()


def test_the_identity_of_a_token_is_its_index_of_a_global_vector_its_documents():
    layout = pack([[2, 1], [3]], 4).layout(2)
    first = 2**31
    assert layout.identity_bs.tolist() == [
        [first, first + 1, first + 2, first + 3, 0, 1, 2, 3],
        [first, first + 1, *layout.identity_bs[1, 2:4].tolist(), 0, 1, 2, 3],
    ]


def small_block(post_norm: bool) -> Block:
    torch.manual_seed(0)
    return Block(16, SelfAttention(16, 2, Pattern(3)), DenseFeedForward(16, 24), post_norm=post_norm).double()


@pytest.mark.parametrize("post_norm", [False, True])
def test_a_block_equals_one_whose_masks_are_written_out(post_norm):
    layout = pack([[9, 4], [12]], 13).layout(1)
    block, angles = small_block(post_norm), rotary_angles(layout.position_bs, 8)
    x_bsd = torch.randn(*layout.document_bs.shape, 16, dtype=torch.float64, requires_grad=True)
    drops = dropout(0.25, rows=(3, 4)).of_layer(5)
    attention_bsd, feedforward_bsd = (drops.kept(layout, place, 16) / 0.75 for place in (12, 13))
    if post_norm:
        _, expected = block.attention_norm(x_bsd + attention_bsd.double() * block.attention(x_bsd, angles, layout))
        _, expected = block.feedforward_norm(expected + feedforward_bsd.double() * block.feedforward(expected))
    else:
        expected = x_bsd + attention_bsd.double() * block.attention(block.attention_norm(x_bsd)[1], angles, layout)
        expected = expected + feedforward_bsd.double() * block.feedforward(block.feedforward_norm(expected)[1])
    ours = block(x_bsd, angles, layout, drops)
    inputs, weight = (x_bsd, *block.parameters()), torch.randn_like(ours)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)  # the masks above are of float32
    for one, other in zip(
        torch.autograd.grad(ours, inputs, weight), torch.autograd.grad(expected, inputs, weight), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_block_that_is_computed_again_drops_the_same(use_reentrant):
    layout = pack([[9, 4], [12]], 13).layout(1)
    block, angles = small_block(post_norm=False), rotary_angles(layout.position_bs, 8)
    x_bsd = torch.randn(*layout.document_bs.shape, 16, dtype=torch.float64, requires_grad=True)
    drops, gradients = replace(dropout(0.25), key=NoiseKey(0, 1, torch.tensor([3, 4]))), []
    for out in (
        block(x_bsd, angles, layout, drops),
        checkpoint(block, x_bsd, angles, layout, drops, use_reentrant=use_reentrant),
    ):
        out.square().sum().backward()
        gradients.append([p.grad.clone() for p in (x_bsd, *block.parameters())])
        for p in (x_bsd, *block.parameters()):
            p.grad = None
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)

"""FlexAttention against the definition where there is no GPU: forward, and without compiling anew."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters

from mdseq.sparse import Pattern
from mdseq.sparse.flex import BLOCK, FlexPlan, RowOrder, attend_flex
from mdseq.sparse.reference import attend_reference, visible
from tests.sparse.layouts import layouts, pack

LENGTHS = [[[300, 20, 100], [500]], [[1, 0, 250], []], [[130], [7, 160, 200]]]
PATTERNS = [Pattern(9), Pattern(40, (3,)), Pattern(1, (7,)), Pattern(600), Pattern(None)]


def test_forward_equals_the_definition_and_nothing_is_compiled_twice():
    torch._dynamo.reset()
    counters.clear()
    generator = torch.Generator().manual_seed(0)
    for pattern in PATTERNS:
        for lengths in LENGTHS:
            layout = pack(lengths, 510).layout(2)
            q, k, v = (torch.randn(*layout.document_bs.shape, 2, 16, generator=generator) for _ in range(3))
            with torch.no_grad():
                out = attend_flex(q, k, v, pattern, layout)
            exact = attend_reference(q.double(), k.double(), v.double(), pattern, layout)
            assert (out - exact).abs().max() <= 1e-5
            assert (out[~layout.real_bs] == 0).all()
    assert counters["stats"]["unique_graphs"] == 1


@settings(max_examples=60)
@given(layouts(max_length=600), st.none() | st.integers(1, 400), st.integers(1, 9))
def test_the_block_mask_holds_just_the_visible_pairs(layout, window, dilation):
    """Blocks left out hold no visible pair, full blocks no other; within the rest the mask itself is exact."""
    pattern = Pattern(window, (dilation,))
    plan = FlexPlan.of(window, 1 if window is None else dilation, layout)
    b, n = len(layout.document_bs), plan.order.num_rows
    index = torch.arange(n)
    mask_bqk = plan.mask.mask_mod(torch.arange(b)[:, None, None], torch.tensor(0), index[:, None], index)

    # The definition's pairs, in the order of the rows: once over queries, once over keys.
    exact_bqk = visible(pattern, layout, dilation)
    by_query = plan.order.to_rows(exact_bqk[:, :, None].int())[:, :, 0]
    exact_bqk = plan.order.to_rows(by_query.transpose(1, 2)[:, :, None])[:, :, 0].transpose(1, 2).bool()
    assert torch.equal(mask_bqk, exact_bqk)

    blocks = mask_bqk.unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK))
    any_bxx, all_bxx = blocks.any(4).any(2), blocks.all(4).all(2)
    listed, full = plan.mask, torch.zeros_like(all_bxx)
    some = torch.zeros_like(any_bxx)
    for row in range(b):
        for x in range(n // BLOCK):
            some[row, x, listed.kv_indices[row, 0, x, : listed.kv_num_blocks[row, 0, x]].long()] = True
            full[row, x, listed.full_kv_indices[row, 0, x, : listed.full_kv_num_blocks[row, 0, x]].long()] = True
    assert not (any_bxx & ~some & ~full).any()
    assert not (full & ~all_bxx).any()
    assert not (some & full).any()


def test_few_blocks_are_visited_whatever_the_dilation():
    for dilation in (1, 4):
        layout = pack([[8192]], 8192).layout()
        plan = FlexPlan.of(128, dilation, layout)
        visited = plan.mask.kv_num_blocks.sum() + plan.mask.full_kv_num_blocks.sum()
        assert visited <= 3 * 8192 // BLOCK


@given(st.integers(0, 40), st.integers(1, 3000), st.integers(1, 9))
def test_rows_are_filled_up_in_coarse_steps_and_come_back_in_order(num_global, num_tokens, dilation):
    layout = pack([[num_tokens]], num_tokens).layout(num_global)
    order = RowOrder.of(layout, dilation)
    assert order.num_rows % BLOCK == 0
    assert order.num_rows <= max(BLOCK, (num_global + num_tokens + dilation) * 9 / 8) + BLOCK
    x = torch.randn(1, num_global + num_tokens, 1, 2)
    assert torch.equal(order.to_slots(order.to_rows(x)), x)

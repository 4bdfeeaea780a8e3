"""What is counted by arithmetic is what the mask shows."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mdseq.sparse import NO_DOCUMENT, Documents, Layout, Pattern
from mdseq.sparse.count import forward_flops, visible_pairs
from mdseq.sparse.reference import visible

NUM_HEADS = 6


def lay_out(rows: list[list[int]], num_global: int, marked: set[int]) -> Layout:
    """Rows of documents of the given lengths; the tokens at the `marked` places of each row are global."""
    row_length = max(sum(row) for row in rows) + 3
    document_bl = torch.full((len(rows), row_length), NO_DOCUMENT)
    for b, lengths in enumerate(rows):
        owners = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.long))
        document_bl[b, : len(owners)] = owners
    global_bl = torch.zeros_like(document_bl, dtype=torch.bool)
    global_bl[:, [place for place in marked if place < row_length]] = True
    num_documents = max(1, *(len(row) for row in rows))
    documents = Documents(document_bl, torch.zeros_like(document_bl), num_documents)
    return documents.marked(global_bl).layout(num_global)


layouts = st.builds(
    lay_out,
    rows=st.lists(st.lists(st.integers(0, 30), max_size=4), min_size=1, max_size=3),
    num_global=st.integers(0, 3),
    marked=st.sets(st.integers(0, 60), max_size=5),
)
patterns = st.builds(
    Pattern,
    window=st.none() | st.integers(1, 40),
    dilations=st.sampled_from([(1,), (3,), (1, 4), (2, 1, 5)]),
)


@given(layouts, patterns)
def test_pairs_are_those_of_the_mask(layout: Layout, pattern: Pattern) -> None:
    expected_b = sum(
        (heads.stop - heads.start) * visible(pattern, layout, dilation).sum(dim=(1, 2))
        for heads, dilation in pattern.groups(NUM_HEADS)
    )
    pairs_b = visible_pairs(pattern, layout, NUM_HEADS)
    assert pairs_b.dtype == torch.int64
    assert pairs_b.tolist() == expected_b.tolist()


def test_a_row_too_long_for_its_mask_is_counted_at_once() -> None:
    """A million tokens: the mask would hold 10^12 pairs."""
    n, window, g = 2**20, 256, 8
    layout = Documents.whole(torch.tensor([n]), n).layout(g)
    started = time.monotonic()
    (pairs,) = visible_pairs(Pattern(window), layout, num_heads=1).tolist()
    assert time.monotonic() - started < 2
    assert pairs == n * (2 * window + 1) - window * (window + 1) + 2 * n * g + g * g
    assert visible_pairs(Pattern(None), layout, num_heads=1).tolist() == [(n + g) ** 2]


def test_heads_must_divide_into_groups() -> None:
    layout = Documents.whole(torch.tensor([4]), 4).layout()
    with pytest.raises(ValueError, match="4 heads do not divide into 3 groups"):
        visible_pairs(Pattern(2, (1, 2, 3)), layout, num_heads=4)


def test_flops_are_those_of_two_matrix_products() -> None:
    """q k^T and p v over all pairs, as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    n, heads, head_dim = 12, 2, 16
    q, k, v = (torch.randn(1, heads, n, head_dim) for _ in range(3))
    with FlopCounterMode(display=False) as counter:
        (q @ k.transpose(-1, -2)).softmax(dim=-1) @ v
    layout = Documents.whole(torch.tensor([n]), n).layout()
    pairs = int(visible_pairs(Pattern(None), layout, heads).sum())
    assert forward_flops(pairs, head_dim) == counter.get_total_flops()

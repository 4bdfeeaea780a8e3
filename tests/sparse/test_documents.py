"""Every token, and every document's own global slots, has one place in the layout, and finds its way back."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from mdseq.sparse import NO_DOCUMENT, Documents
from mdseq.sparse.documents import leading_source
from tests.sparse.layouts import layouts, pack


def some_documents() -> tuple[Documents, torch.Tensor]:
    """Three documents of 4, 1 and 0 source tokens and 2, 2 and 3 target tokens, then padding."""
    target_bl = torch.tensor([[0, 0, 0, 0, 1, 1, 0, 1, 1, 1, 1, 1, 0, 0]]).bool()
    return pack([[6, 3, 3]], 14), target_bl


def test_slots_are_those_of_the_documents_then_their_tokens_then_padding():
    documents, _ = some_documents()
    layout = documents.layout(num_global=2)
    assert layout.num_global == 6
    assert layout.document_bs[0].tolist() == [0, 0, 1, 1, 2, 2] + [0] * 6 + [1] * 3 + [2] * 3 + [NO_DOCUMENT] * 2
    assert layout.position_bs[0].tolist() == [0] * 6 + [*range(6), *range(3), *range(3), 0, 0]


def test_marked_tokens_move_to_the_global_slots_of_their_document():
    documents, _ = some_documents()
    marked_bl = torch.zeros(1, 14, dtype=torch.bool)
    marked_bl[0, [1, 4, 10, 13]] = True  # the last is padding, and stays
    layout = documents.marked(marked_bl).layout(num_global=1)
    own, x = 100 + torch.zeros(1, 1), torch.arange(14.0)[None, :, None]
    assert layout.to_slots(x, own)[0, :, 0].tolist() == [100, 1, 4, 100, 100, 10, 0, 2, 3, 5, 6, 7, 8, 9, 11, 12, 13]
    assert layout.document_bs[0].tolist() == [0, 0, 0, 1, 2, 2] + [0] * 4 + [1] * 3 + [2] * 2 + [NO_DOCUMENT] * 2


@given(
    st.lists(st.lists(st.integers(0, 9), max_size=5), min_size=1, max_size=3),
    st.integers(1, 30),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.integers(0, 3),
)
def test_tokens_come_back_from_their_slots(lengths, row_length, marked_share, num_global):
    documents = pack(lengths, row_length, marked_share)
    layout = documents.layout(num_global)
    x_bld = torch.randn(len(lengths), row_length, 3)
    x_bsd = layout.to_slots(x_bld, torch.full((num_global, 3), 7.0))
    assert torch.equal(layout.to_tokens(x_bsd), x_bld)
    present = torch.stack([(documents.document_bl == m).any(dim=1) for m in range(documents.num_documents)])
    assert int((x_bsd == 7.0).all(dim=-1).sum()) == int(present.sum()) * num_global
    assert int(layout.real_bs.sum()) == int(documents.real_bl.sum()) + int(present.sum()) * num_global
    # Each document's slots stand together, among the global ones and among the others.
    for region in (layout.document_bs[:, : layout.num_global], layout.document_bs[:, layout.num_global :]):
        for row in region.tolist():
            real = [document for document in row if document != NO_DOCUMENT]
            assert real == sorted(real)
            assert row == real + [NO_DOCUMENT] * (len(row) - len(real))


def random_content(layout, dtype=torch.float64):
    """Tokens and global vectors of 3 features for a layout, with gradients; and what to sum slots and tokens by."""
    b, length = layout._slot_bl.shape
    num_own = layout._own_slot_bn.shape[1] // layout.num_documents
    generator = torch.Generator().manual_seed(length)

    def draw(*shape):
        return torch.randn(*shape, 3, generator=generator, dtype=torch.float64).to(dtype)

    x_bld, own_gd = draw(b, length).requires_grad_(), draw(num_own).requires_grad_()
    return x_bld, own_gd, draw(*layout.document_bs.shape), draw(b, length)


@given(layouts())
def test_slots_and_tokens_and_their_gradients_equal_the_definition(layout):
    x_bld, own_gd, weight_bsd, weight_bld = random_content(layout)
    nothing = x_bld.new_zeros(1, 3)
    expected_bsd = torch.cat([x_bld.flatten(0, 1), nothing, own_gd])[layout._content_bs]
    ours_bsd = layout.to_slots(x_bld, own_gd)
    assert torch.equal(ours_bsd, expected_bsd)

    slots = weight_bsd.clone().requires_grad_()
    expected_bld, ours_bld = slots.flatten(0, 1)[layout._slot_bl], layout.to_tokens(slots)
    assert torch.equal(ours_bld, expected_bld)

    for ours, expected, weight, inputs in (
        (ours_bsd, expected_bsd, weight_bsd, (x_bld, own_gd)),
        (ours_bld, expected_bld, weight_bld, (slots,)),
    ):
        for one, other in zip(
            torch.autograd.grad(ours, inputs, weight), torch.autograd.grad(expected, inputs, weight), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


def test_gradients_of_slots_are_those_of_finite_differences_and_have_gradients_themselves():
    layout = pack([[4, 0, 2], [3]], 7, 0.4).layout(2)
    x_bld, own_gd, weight_bsd, _ = random_content(layout)
    slots = weight_bsd.requires_grad_()
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(layout.to_slots, (x_bld, own_gd))
        assert check(layout.to_tokens, (slots,))


def test_gradients_of_global_vectors_come_in_their_own_precision():
    """A sum over many documents, in float32 where they are so, though tokens are not."""
    layout = pack([[4, 3], [7]], 7).layout(2)
    x_bld, own_gd, weight_bsd, _ = random_content(layout, torch.bfloat16)
    own_gd = own_gd.detach().float().requires_grad_()
    gradient_gd, gradient_bld = torch.autograd.grad(layout.to_slots(x_bld, own_gd), (own_gd, x_bld), weight_bsd)
    assert (gradient_gd.dtype, gradient_bld.dtype) == (torch.float32, torch.bfloat16)
    exact_gd = torch.stack([weight_bsd[0, 0:2], weight_bsd[0, 2:4], weight_bsd[1, 0:2]]).double().sum(dim=0)
    torch.testing.assert_close(gradient_gd, exact_gd.float())


def test_tokens_alone_take_no_gradient_of_global_vectors():
    layout = pack([[4, 3]], 7).layout(0)
    x_bld, _, weight_bsd, _ = random_content(layout)
    (gradient_bld,) = torch.autograd.grad(layout.to_slots(x_bld), x_bld, weight_bsd)
    assert torch.equal(gradient_bld, weight_bsd)


def test_rows_of_equally_many_global_tokens_have_no_slot_to_spare():
    documents = pack([[8], [3, 5]], 8)
    layout = documents.marked(documents.position_bl < 2, None).layout(0)
    assert documents.marked(documents.position_bl < 2).num_global_tokens == (2, 4)
    assert layout.document_bs.shape == (2, 4 + 6)


def test_a_layout_is_made_once_for_all_who_ask():
    documents, _ = some_documents()
    assert documents.layout(2) is documents.layout(2)
    assert documents.layout(2) is not documents.layout(1)


def test_the_leading_source_is_what_is_not_to_be_generated():
    documents, target_bl = some_documents()
    for count, expected in ((1, [0, 6]), (2, [0, 1, 6]), (9, [0, 1, 2, 3, 6])):
        assert leading_source(documents, target_bl, count)[0].nonzero().flatten().tolist() == expected


def test_a_clean_suffix_is_not_the_leading_source():
    """Though it is source too: what a document ends with, and what the next one's target comes after."""
    documents = pack([[7, 5]], 14)
    target_bl = torch.tensor([[0, 0, 1, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0]]).bool()
    for count in (1, 2, 3, 9):
        leading = leading_source(documents, target_bl, count)[0].nonzero().flatten().tolist()
        assert leading == [0, 1][:count]


def test_a_document_without_targets_is_source_from_end_to_end():
    documents, nothing_bl = pack([[4, 3]], 9), torch.zeros(1, 9, dtype=torch.bool)
    for count, expected in ((2, [0, 1, 4, 5]), (9, [0, 1, 2, 3, 4, 5, 6])):
        assert leading_source(documents, nothing_bl, count)[0].nonzero().flatten().tolist() == expected


@st.composite
def documents_of_three_parts(draw):
    """Documents and their targets: each document is so many tokens of source, of target and of clean suffix."""
    part = st.integers(0, 4)
    rows = draw(st.lists(st.lists(st.tuples(part, part, part), max_size=3), min_size=1, max_size=3))
    row_length = max(1, *(sum(map(sum, row)) for row in rows)) + draw(st.integers(0, 3))
    target_bl = torch.zeros(len(rows), row_length, dtype=torch.bool)
    for b, row in enumerate(rows):
        begin = 0
        for source, target, suffix in row:
            target_bl[b, begin + source : begin + source + target] = True
            begin += source + target + suffix
    return rows, pack([[sum(parts) for parts in row] for row in rows], row_length), target_bl


@given(documents_of_three_parts(), st.integers(1, 6), st.booleans())
def test_the_leading_source_against_a_slow_one(parts, count, restarted):
    """Wherever a document lies, whatever its positions are: those of a pair's target count from 1 again."""
    rows, documents, target_bl = parts
    if restarted:
        position_bl = torch.where(target_bl, 1, documents.position_bl)
        documents = Documents(documents.document_bl, position_bl, documents.num_documents)
    expected_bl = torch.zeros_like(target_bl)
    for b, row in enumerate(rows):
        begin = 0
        for source, target, suffix in row:
            before = source if target else source + suffix
            expected_bl[b, begin : begin + min(count, before)] = True
            begin += source + target + suffix
    assert torch.equal(leading_source(documents, target_bl, count), expected_bl)


def test_one_document_a_row():
    documents = Documents.whole(torch.tensor([4, 0, 6]), 6)
    assert documents.document_bl.tolist() == [[0, 0, 0, 0, -1, -1], [-1] * 6, [0] * 6]
    assert documents.position_bl.tolist() == [[0, 1, 2, 3, 0, 0], [0] * 6, [0, 1, 2, 3, 4, 5]]


def test_of_a_pair_the_target_counts_from_1_again():
    """As a word and its counterpart have nearly the same position; a source of no or one token changes nothing."""
    documents = Documents.whole(torch.tensor([7, 4, 5, 3]), 7, torch.tensor([3, 0, 1, 3]))
    assert documents.position_bl.tolist() == [
        [0, 1, 2, 1, 2, 3, 4],
        [0, 1, 2, 3, 0, 0, 0],
        [0, 1, 2, 3, 4, 0, 0],
        [0, 1, 2, 0, 0, 0, 0],
    ]
    plain = Documents.whole(torch.tensor([7, 4, 5, 3]), 7)
    assert torch.equal(documents.document_bl, plain.document_bl)
    none = Documents.whole(torch.tensor([7, 4, 5, 3]), 7, torch.zeros(4, dtype=torch.long))
    assert torch.equal(none.position_bl, plain.position_bl)


@given(
    st.lists(st.lists(st.integers(0, 6), max_size=4), min_size=1, max_size=4),
    st.sampled_from([0.0, 0.4, 1.0]),
    st.integers(0, 2),
    st.data(),
)
def test_rows_that_are_taken_out_have_the_slots_they_had(lengths, marked_share, num_global, data):
    """In any order, more than once, or none; though the others may have had more global tokens, or fewer."""
    documents = pack(lengths, 12, marked_share)
    index_n = torch.tensor(data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=5)), dtype=torch.long)
    taken = documents.take(index_n)
    before, after = documents.layout(num_global), taken.layout(num_global)
    x_bld, own_gd = torch.randn(len(lengths), 12, 3), torch.randn(num_global, 3)
    assert after.num_global == before.num_global
    assert torch.equal(after.document_bs, before.document_bs[index_n])
    assert torch.equal(after.position_bs, before.position_bs[index_n])
    assert torch.equal(after.to_slots(x_bld[index_n], own_gd), before.to_slots(x_bld, own_gd)[index_n])
    assert torch.equal(after.to_tokens(after.to_slots(x_bld[index_n], own_gd)), x_bld[index_n])

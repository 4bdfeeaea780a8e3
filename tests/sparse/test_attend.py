"""Every engine against the dense float64 definition, forward and backward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mdseq.sparse import Documents, Layout, Pattern, attend
from mdseq.sparse.documents import NO_DOCUMENT
from mdseq.sparse.reference import visible


def pack(lengths: list[list[int]], row_length: int) -> Documents:
    """Rows of documents of the given lengths, padded."""
    document_bl = torch.full((len(lengths), row_length), NO_DOCUMENT)
    position_bl = torch.zeros(len(lengths), row_length, dtype=torch.long)
    for row, row_lengths in enumerate(lengths):
        start = 0
        for document, length in enumerate(row_lengths):
            document_bl[row, start : start + length] = document
            position_bl[row, start : start + length] = torch.arange(length)
            start += length
    return Documents(document_bl, position_bl, max(1, *(len(row) for row in lengths)))


def run(engine: str, layout: Layout, pattern: Pattern, seed: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Output and gradients of q, k, v for random inputs."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*layout.document_bs.shape, 2, 8)
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(4)]
    q, k, v = (x.requires_grad_() for x in inputs[:3])
    out = attend(q, k, v, pattern, layout, engine)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad_outputs=inputs[3])]


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    row_length = draw(st.integers(1, 150))
    rows = []
    for _ in range(draw(st.integers(1, 2))):
        row, left = [], row_length
        for length in draw(st.lists(st.integers(0, row_length), max_size=4)):
            row.append(min(length, left))
            left -= row[-1]
        rows.append(row)
    return pack(rows, row_length).layout(draw(st.integers(0, 5)), draw(st.sampled_from([1, 4])))


patterns = st.builds(Pattern, window=st.none() | st.integers(1, 50), dilations=st.lists(st.integers(1, 5), min_size=1, max_size=2).filter(lambda d: len(d) in (1, 2)).map(tuple))


@settings(max_examples=60)
@given(layouts(), patterns, st.sampled_from([torch.float32, torch.float64]), st.integers(0, 9))
def test_banded_equals_the_definition(layout, pattern, dtype, seed):
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    for ours, exact in zip(
        run("banded", layout, pattern, seed, dtype), run("reference", layout, pattern, seed, torch.float64), strict=True
    ):
        scale = exact.abs().max().clamp(min=1.0)
        assert ((ours - exact).abs().max() / scale) <= tolerance


def test_a_window_is_cut_at_its_document_and_at_its_dilation():
    layout = pack([[6, 4]], 12).layout(1)
    seen = visible(Pattern(window=1, dilations=(2,)), layout, dilation=2)[0]
    # slots: globals of documents 0 and 1, then 6 + 4 tokens, then 2 of padding
    assert seen[2 + 2].nonzero().flatten().tolist() == [0, 2 + 0, 2 + 2, 2 + 4]
    assert seen[2 + 6].nonzero().flatten().tolist() == [1, 2 + 6, 2 + 8]
    assert seen[0].nonzero().flatten().tolist() == [0, 2, 3, 4, 5, 6, 7]
    assert not seen[2 + 10].any()


@pytest.mark.parametrize("engine", ["banded", "reference"])
@pytest.mark.parametrize("pattern", [Pattern(None), Pattern(3), Pattern(2, dilations=(3,))])
def test_documents_do_not_leak(engine, pattern):
    """The gradient of one document's output with respect to another's inputs is exactly zero."""
    layout = pack([[7, 9, 5]], 24).layout(2)
    shape = (*layout.document_bs.shape, 2, 8)
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
    out = attend(q, k, v, pattern, layout, engine)
    mine = layout.document_bs == 1
    for gradient in torch.autograd.grad(out[mine].square().sum(), (q, k, v)):
        assert gradient[mine].abs().sum() > 0
        assert gradient[~mine].abs().sum() == 0


@pytest.mark.parametrize("engine", ["banded", "reference"])
def test_rows_with_nothing_to_attend_to_give_zeros_and_finite_gradients(engine):
    layout = pack([[], [5]], 40).layout(2)
    outputs = run(engine, layout, Pattern(window=4), seed=0, dtype=torch.float32)
    assert outputs[0][0].abs().sum() == 0
    assert all(torch.isfinite(x).all() for x in outputs)

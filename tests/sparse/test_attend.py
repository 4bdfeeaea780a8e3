"""Every engine against the dense float64 definition, forward and backward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mdseq.sparse import Layout, Pattern, attend
from mdseq.sparse.band import Band
from mdseq.sparse.reference import visible
from tests.sparse.layouts import layouts, pack


def inputs(layout: Layout, seed: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Random q, k, v, that want a gradient, and a gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*layout.document_bs.shape, 2, 8)
    q, k, v, grad = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(4))
    return [q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad]


def run(engine: str, layout: Layout, pattern: Pattern, seed: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Output and gradients of q, k, v for random inputs."""
    q, k, v, grad = inputs(layout, seed, dtype)
    out = attend(q, k, v, pattern, layout, engine)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad_outputs=grad)]


def assert_equal(ours: list[torch.Tensor], layout: Layout, pattern: Pattern, seed: int, tolerance: float) -> None:
    for mine, exact in zip(ours, run("reference", layout, pattern, seed, torch.float64), strict=True):
        assert torch.isfinite(mine).all()
        assert (mine - exact).abs().max() <= tolerance * exact.abs().max().clamp(min=1.0)


@st.composite
def patterns(draw: st.DrawFn) -> Pattern:
    """Windows up to wider than any document, of one or two groups of heads; or none."""
    window = draw(st.none() | st.integers(1, 8) | st.integers(1, 700))
    return Pattern(window, tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=2))))


TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


@pytest.mark.parametrize("engine", ["dense", "banded"])
@settings(max_examples=100)
@given(layouts(max_length=150), patterns(), st.sampled_from(list(TOLERANCE)), st.integers(0, 9))
def test_an_engine_equals_the_definition(engine, layout, pattern, dtype, seed):
    assert_equal(run(engine, layout, pattern, seed, dtype), layout, pattern, seed, TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("lengths", "num_global", "pattern"),
    [
        ([[1900]], 3, Pattern(40, (1, 3))),  # many tiles, most of them without a boundary
        ([[700, 1, 0, 690, 500]], 64, Pattern(65, (2,))),
        ([[31] * 60], 2, Pattern(100)),  # more documents in a tile than may share their global slots
        ([[900, 900]], 2, Pattern(None)),  # queries in several pieces
    ],
)
def test_banded_equals_the_definition_over_rows_of_many_tiles(lengths, num_global, pattern):
    layout = pack(lengths, 1931).layout(num_global)
    assert_equal(run("banded", layout, pattern, 0, torch.float32), layout, pattern, 0, TOLERANCE[torch.float32])


def test_bfloat16_is_no_worse_than_twice_dense_attention_in_bfloat16():
    """Judged where both compute the same: one document, a window that reaches all of it."""
    layout = pack([[150]], 150).layout(4)
    pattern = Pattern(150)
    ours = run("banded", layout, pattern, 0, torch.bfloat16)
    exact = run("reference", layout, pattern, 0, torch.float64)
    q, k, v, grad = inputs(layout, 0, torch.bfloat16)
    q, k, v = (x.transpose(1, 2).detach().requires_grad_() for x in (q, k, v))
    dense = torch.softmax(q @ k.transpose(2, 3) / q.shape[-1] ** 0.5, dim=-1) @ v
    gradients = torch.autograd.grad(dense, (q, k, v), grad_outputs=grad.transpose(1, 2))
    for mine, theirs, right in zip(ours, (dense, *gradients), exact, strict=True):
        error, dense_error = ((x.double() - right).abs().max() for x in (mine, theirs.transpose(1, 2)))
        assert error <= 2 * dense_error


def test_the_same_twice_gives_the_same_bits():
    layout = pack([[300, 200]], 520).layout(3)
    first, second = (run("banded", layout, Pattern(50, (1, 2)), 0, torch.float32) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_half_precision_and_strided_inputs_are_taken_as_they_are():
    layout = pack([[40]], 40).layout(2)
    q, k, v, grad = inputs(layout, 0, torch.float32)
    strided = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k, v)]
    expected, found = (attend(*x, Pattern(8), layout, "banded") for x in ((q, k, v), strided))
    assert torch.equal(expected, found)
    gradients = (torch.autograd.grad(out, x, grad) for out, x in ((expected, (q, k, v)), (found, strided)))
    assert all(torch.equal(x, y) for x, y in zip(*gradients, strict=True))


def test_layers_share_their_plans():
    layout = pack([[40]], 40).layout(2)
    q, k, v, _ = inputs(layout, 0, torch.float32)
    for pattern in (Pattern(8), Pattern(8, (1, 2)), Pattern(8), Pattern(8, (2,))):
        attend(q, k, v, pattern, layout, "banded")
    assert len(layout._plans) == 3  # two dilations, and the documents


def test_a_slice_of_a_row_with_its_halos_gives_what_the_whole_row_gives():
    """All that a process needs, to hold a part of a document, is `halo` tokens of each residue class on either side."""
    window, dilation, first, last = 16, 2, 100, 180
    whole = pack([[300]], 300).layout()
    halo = Band.of(whole, window, dilation).halo * dilation
    assert halo == window * dilation
    q, k, v, _ = inputs(whole, 0, torch.float64)
    part = pack([[last - first + 2 * halo]], last - first + 2 * halo).layout()
    outer = slice(first - halo, last + halo)
    pattern = Pattern(window, (dilation,))
    expected = attend(q, k, v, pattern, whole, "banded")[:, first:last]
    found = attend(q[:, outer], k[:, outer], v[:, outer], pattern, part, "banded")[:, halo:-halo]
    assert torch.allclose(found, expected, rtol=0, atol=1e-14)


def test_a_window_is_cut_at_its_document_and_at_its_dilation():
    layout = pack([[6, 4]], 12).layout(1)
    seen = visible(Pattern(window=1, dilations=(2,)), layout, dilation=2)[0]
    # slots: globals of documents 0 and 1, then 6 + 4 tokens, then 2 of padding
    assert seen[2 + 2].nonzero().flatten().tolist() == [0, 2 + 0, 2 + 2, 2 + 4]
    assert seen[2 + 6].nonzero().flatten().tolist() == [1, 2 + 6, 2 + 8]
    assert seen[0].nonzero().flatten().tolist() == [0, 2, 3, 4, 5, 6, 7]
    assert not seen[2 + 10].any()


@pytest.mark.parametrize("engine", ["banded", "dense", "reference"])
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


@pytest.mark.parametrize("engine", ["banded", "dense", "reference"])
def test_rows_with_nothing_to_attend_to_give_zeros_and_finite_gradients(engine):
    layout = pack([[], [5]], 40).layout(2)
    outputs = run(engine, layout, Pattern(window=4), seed=0, dtype=torch.float32)
    assert outputs[0][0].abs().sum() == 0
    assert all(torch.isfinite(x).all() for x in outputs)

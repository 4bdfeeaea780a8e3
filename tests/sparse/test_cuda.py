"""The engines `fused`, `flash` and `flex` on a GPU, against the definition in float64, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters

from mdseq.sparse import Layout, Pattern, attend, fused, segments
from mdseq.sparse.reference import attend_reference, visible
from tests.sparse.layouts import layouts, pack

triton = pytest.importorskip("triton", reason="comes with torch for GPUs")
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("exact_products"),
]

HEADS, HEAD_DIM = 4, 64
ENGINES = [
    ("fused", torch.bfloat16),
    ("fused", torch.float32),
    ("flash", torch.bfloat16),
    ("flex", torch.bfloat16),
    ("flex", torch.float32),
]
# Types and head dimensions in which an engine is compared with dense attention of the same type.
LOW_PRECISION = [
    ("fused", [(torch.bfloat16, 64), (torch.float16, 64), (torch.bfloat16, 128), (torch.bfloat16, 16)]),
    ("flash", [(torch.bfloat16, 64), (torch.float16, 64), (torch.bfloat16, 128), (torch.bfloat16, 40)]),
]
PATTERNS = [Pattern(3), Pattern(64), Pattern(20, (3,)), Pattern(1000), Pattern(None)]
# Of three documents a row, so that all have layouts of the same shape.
LENGTHS = [[[300, 20, 100], [500, 0, 0]], [[1, 0, 250], [0, 0, 0]], [[130, 0, 0], [7, 160, 200]]]

Attention = Callable[[Tensor, Tensor, Tensor, Pattern, Layout], Tensor]


def random_inputs(layout: Layout, dtype: torch.dtype, seed: int = 0, head_dim: int = HEAD_DIM) -> list[Tensor]:
    """q, k, v and a gradient of the output."""
    generator = torch.Generator("cuda").manual_seed(seed)
    shape = (*layout.document_bs.shape, HEADS, head_dim)
    return [torch.randn(shape, generator=generator, device="cuda").to(dtype) for _ in range(4)]


def outcome(attention: Attention, inputs: list[Tensor], pattern: Pattern, layout: Layout) -> list[Tensor]:
    """Output and gradients of q, k, v."""
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    out = attention(q, k, v, pattern, layout)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), inputs[3])]


def exact_outcome(inputs: list[Tensor], pattern: Pattern, layout: Layout) -> list[Tensor]:
    return outcome(attend_reference, [x.double() for x in inputs], pattern, layout)


def by(engine: str) -> Attention:
    return lambda q, k, v, pattern, layout: attend(q, k, v, pattern, layout, engine)


def dense(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, layout: Layout) -> Tensor:
    """Attention as one would write it in a low precision: every intermediate result rounded to it."""
    outputs = []
    for heads, dilation in pattern.groups(HEADS):
        score = torch.einsum("bqhd,bkhd->bhqk", q[:, :, heads], k[:, :, heads]) / q.shape[-1] ** 0.5
        mask = visible(pattern, layout, dilation)[:, None]
        weight = score.masked_fill(~mask, torch.finfo(q.dtype).min).softmax(-1).masked_fill(~mask, 0.0)
        outputs.append(torch.einsum("bhqk,bkhd->bqhd", weight, v[:, :, heads]))
    return torch.cat(outputs, dim=2)


def fill_free_memory_with_nan() -> None:
    """What a kernel then leaves unwritten shows."""
    blocks = [torch.full((2**exponent,), torch.nan, device="cuda") for exponent in range(7, 24) for _ in range(4)]
    del blocks


def assert_as_exact_as_dense(ours: list[Tensor], inputs: list[Tensor], pattern: Pattern, layout: Layout) -> None:
    """An error of at most twice that of dense attention of the same type, or what rounding a number near 1 costs."""
    exact = exact_outcome(inputs, pattern, layout)
    rounding = torch.finfo(ours[0].dtype).eps / 2
    for name, one, other, best in zip("oqkv", ours, outcome(dense, inputs, pattern, layout), exact, strict=True):
        error, allowed = (
            (one - best).abs().max(),
            2 * (other - best).abs().max() + rounding * best.abs().max().clamp(min=1.0),
        )
        assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"


@pytest.mark.parametrize(("engine", "kinds"), LOW_PRECISION, ids=["fused", "flash"])
@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    layouts(max_length=700, device="cuda"),
    st.builds(
        Pattern,
        window=st.none() | st.integers(1, 300),
        dilations=st.sampled_from([(1,), (2,), (5,), (1, 3), (4, 1, 1, 2), (100,)]),
    ),
    st.sampled_from([128, 2048]),
    st.integers(0, 3),
    st.integers(0, 9),
)
def test_is_as_exact_as_dense_attention(engine, kinds, layout, pattern, min_piece, kind, seed):
    inputs = random_inputs(layout, kinds[kind][0], seed, kinds[kind][1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "MIN_PIECE", min_piece)
        patch.setattr(fused, "MIN_PIECE", min_piece)
        fill_free_memory_with_nan()
        ours = outcome(by(engine), inputs, pattern, layout)
    assert_as_exact_as_dense(ours, inputs, pattern, layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_global", [0, 3])
def test_flex_equals_the_definition_and_compiles_once(dtype, num_global):
    torch._dynamo.reset()
    counters.clear()
    for pattern in PATTERNS:
        for seed, lengths in enumerate(LENGTHS):
            layout = pack(lengths, 500, device="cuda").layout(num_global)
            inputs = random_inputs(layout, dtype, seed)
            ours = outcome(by("flex"), inputs, pattern, layout)
            if dtype == torch.bfloat16:
                assert_as_exact_as_dense(ours, inputs, pattern, layout)
                continue
            for one, best in zip(ours, exact_outcome(inputs, pattern, layout), strict=True):
                assert (one - best).abs().max() <= 1e-5 * best.abs().max()
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_global", [0, 3, 20])
def test_fused_equals_the_definition_and_compiles_once(dtype, num_global, monkeypatch):
    """... that is, the kernels that the first layout needs, for any window, dilation, batch of documents."""
    compiled: list[object] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda **compilation: compiled.append(compilation))
    kernels_needed = None
    for pattern in PATTERNS:
        for seed, lengths in enumerate(LENGTHS):
            layout = pack(lengths, 500 + 3 * seed, device="cuda").layout(num_global)
            inputs = random_inputs(layout, dtype, seed)
            ours = outcome(by("fused"), inputs, pattern, layout)
            kernels_needed = kernels_needed or len(compiled)
            if dtype == torch.bfloat16:
                assert_as_exact_as_dense(ours, inputs, pattern, layout)
                continue
            for one, best in zip(ours, exact_outcome(inputs, pattern, layout), strict=True):
                assert (one - best).abs().max() <= 1e-5 * best.abs().max()
    assert len(compiled) == (kernels_needed or 0) <= 8


def test_fused_is_deterministic_and_takes_slices_of_one_projection():
    layout = pack([[300, 20, 100], [500]], 500, marked_share=0.02, device="cuda").layout(2)
    q, k, v, grad = random_inputs(layout, torch.bfloat16)
    pattern = Pattern(20, (1, 3))
    ours = outcome(by("fused"), [q, k, v, grad], pattern, layout)
    projected = torch.stack([q, k, v], dim=2).requires_grad_()
    out = attend(*projected.unbind(2), pattern, layout, "fused")
    (gradient,) = torch.autograd.grad(out, projected, grad.transpose(2, 3).contiguous().transpose(2, 3))
    for one, other in zip(ours, [out, *gradient.unbind(2)], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("engine", "dtype"), ENGINES)
@pytest.mark.parametrize("pattern", [Pattern(9, (1, 2)), Pattern(None)])
def test_documents_do_not_leak(engine, dtype, pattern):
    """The gradient of one document's output with respect to another's inputs is exactly zero."""
    layout = pack([[170, 90, 150], [300, 200, 0]], 511, marked_share=0.1, device="cuda").layout(2)
    q, k, v = (x.requires_grad_() for x in random_inputs(layout, dtype)[:3])
    out = attend(q, k, v, pattern, layout, engine)
    mine = layout.document_bs == 1
    for gradient in torch.autograd.grad(out[mine].float().square().sum(), (q, k, v)):
        assert gradient[mine].abs().sum() > 0
        assert gradient[~mine].abs().sum() == 0


@pytest.mark.parametrize(("engine", "dtype"), ENGINES)
def test_rows_with_nothing_to_attend_to_give_zeros_and_finite_gradients(engine, dtype):
    layout = pack([[], [50]], 511, device="cuda").layout(2)
    fill_free_memory_with_nan()
    results = outcome(by(engine), random_inputs(layout, dtype), Pattern(9), layout)
    assert all(torch.isfinite(x).all() for x in results)
    assert all(x[~layout.real_bs].abs().sum() == 0 for x in results)
    assert results[0][layout.real_bs].abs().min() > 0


@pytest.mark.parametrize(("engine", "dtype"), ENGINES)
@pytest.mark.parametrize("pattern", [Pattern(9, (1, 2)), Pattern(None)])
def test_nothing_waits_for_the_gpu(engine, dtype, pattern):
    """... neither in laying out the slots, nor in the plan, nor in attention forward and backward."""
    documents = pack([[170, 90, 150], [300, 200, 0]], 511, marked_share=0.1, device="cuda")
    inputs = random_inputs(documents.layout(2), dtype)
    outcome(by(engine), inputs, pattern, documents.layout(2))  # compiles what there is to compile
    fresh = replace(documents, _layouts={})
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        outcome(by(engine), inputs, pattern, fresh.layout(2))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_slots_and_their_gradients_are_those_of_a_cpu_and_nothing_waits_for_the_gpu():
    def outcome_on(device: str) -> list[Tensor]:
        layout = pack([[170, 90, 150], [300, 200, 0]], 511, marked_share=0.1, device=device).layout(2)
        generator = torch.Generator().manual_seed(0)
        x_bld, own_gd, weight_bsd = (
            torch.randn(shape, generator=generator).to(device)
            for shape in ((2, 511, 8), (2, 8), (*layout.document_bs.shape, 8))
        )
        inputs = x_bld.requires_grad_(), own_gd.requires_grad_()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            x_bsd = layout.to_slots(*inputs)
            out_bld = layout.to_tokens(x_bsd * weight_bsd)
            results = [x_bsd, out_bld, *torch.autograd.grad([x_bsd, out_bld], inputs, [weight_bsd, x_bld.detach()])]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return [x.detach().cpu() for x in results]

    for ours, expected in zip(outcome_on("cuda"), outcome_on("cpu"), strict=True):
        torch.testing.assert_close(ours, expected)

"""Dropout on a GPU: that of a CPU, forward and backward, without waiting."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mdseq.model.dropout import Dropout
from mdseq.noise import NoiseKey
from tests.sparse.layouts import pack

triton = pytest.importorskip("triton", reason="comes with torch for GPUs")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

KINDS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float64, torch.float64),
]


def outcome(device: str, lengths, share: float, dim: int, kind: int, step: int, with_residual: bool) -> list[Tensor]:
    """Output and gradients."""
    layout = pack(lengths, 300, 0.1, device).layout(2)
    dropout = Dropout(NoiseKey(2**32 - 5, step, torch.arange(len(lengths), device=device)), share).of_layer(step % 9)
    generator = torch.Generator().manual_seed(dim)
    shape = (*layout.document_bs.shape, dim)
    x_dtype, residual_dtype = KINDS[kind]
    x_bsd, residual_bsd, grad_bsd = (torch.randn(shape, generator=generator).to(device) for _ in range(3))
    x_bsd, residual_bsd = x_bsd.to(x_dtype).requires_grad_(), residual_bsd.to(residual_dtype).requires_grad_()
    inputs = (x_bsd, residual_bsd) if with_residual else (x_bsd,)
    out = dropout.add(residual_bsd if with_residual else None, x_bsd, layout, step % 2)
    gradients = torch.autograd.grad(out, inputs, grad_bsd.to(out.dtype))
    return [x.detach().cpu() for x in (out, *gradients)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.lists(st.integers(0, 150), max_size=4), min_size=1, max_size=4),
    st.floats(0, 1, exclude_max=True),
    st.integers(1, 800),
    st.integers(0, len(KINDS) - 1),
    st.integers(0, 2**31),
    st.booleans(),
)
def test_is_that_of_a_cpu(lengths, share, dim, kind, step, with_residual):
    arguments = lengths, share, dim, kind, step, with_residual
    for ours, expected in zip(outcome("cuda", *arguments), outcome("cpu", *arguments), strict=True):
        assert ours.dtype == expected.dtype
        torch.testing.assert_close(ours, expected)


def test_compiles_once_for_all_steps_places_and_batches_and_does_not_wait(monkeypatch):
    compiled: list[object] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda **compilation: compiled.append(compilation))
    for step, rows in ((1, 1), (2, 3), (16, 16)):
        layout = pack([[100, 50]] * rows, 160, device="cuda").layout(1)
        key = NoiseKey(0, step, torch.arange(rows, device="cuda"))
        x_bsd = torch.randn(*layout.document_bs.shape, 96, device="cuda", requires_grad=True)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for layer in range(3):
                Dropout(key, 0.1).of_layer(layer).add(x_bsd, x_bsd, layout).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(compiled) <= 2  # with what it is added to, and, backward, without

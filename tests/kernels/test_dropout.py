"""The kernel of dropout, where triton can interpret it on a CPU; that on a GPU is in test_dropout_cuda.py.

With triton installed: `TRITON_INTERPRET=1 pytest tests/kernels/test_dropout.py`.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

from mdseq.model.dropout import ATTENTION, FEEDFORWARD, Dropout
from mdseq.noise import NoiseKey, Purpose
from tests.sparse.layouts import pack

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs triton, and TRITON_INTERPRET=1 in the environment",
)


@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize(("dim", "share"), [(1, 0.5), (7, 0.1), (8, 0.1), (20, 0.9), (300, 0.1)])
@pytest.mark.parametrize(
    ("dtype", "residual_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
)
def test_the_kernel_equals_the_definition(dim, share, dtype, residual_dtype, with_residual):
    from mdseq.kernels.dropout import add_dropped

    layout = pack([[20, 0, 3], [30]], 31, 0.2).layout(2)
    dropout = Dropout(NoiseKey(2**32 - 5, 9, torch.tensor([4, 2**40 + 1])), share).of_layer(3)
    generator = torch.Generator().manual_seed(0)
    shape = (*layout.document_bs.shape, dim)
    x_bsd = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    residual_bsd = torch.randn(shape, generator=generator).to(residual_dtype).requires_grad_()
    grad_bsd = torch.randn(shape, generator=generator).to(residual_dtype if with_residual else dtype)
    inputs = (x_bsd, residual_bsd) if with_residual else (x_bsd,)

    expected = dropout.add(residual_bsd if with_residual else None, x_bsd, layout, FEEDFORWARD)
    ours = add_dropped(
        x_bsd, residual_bsd if with_residual else None, dropout.threshold, dropout.key.numbers(Purpose.DROPOUT),
        dropout.key.row_b, layout.identity_bs, 9,
    )  # fmt: skip
    assert (ours.dtype, ours.shape) == (expected.dtype, expected.shape)
    torch.testing.assert_close(ours, expected)
    for one, other in zip(
        torch.autograd.grad(ours, inputs, grad_bsd), torch.autograd.grad(expected, inputs, grad_bsd), strict=True
    ):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other)


def test_no_slots_are_no_work():
    from mdseq.kernels.dropout import add_dropped

    nothing = (
        torch.zeros(0, 5, 8),
        None,
        100,
        (0, int(Purpose.DROPOUT), 0),
        torch.zeros(0),
        torch.zeros(0, 5),
        ATTENTION,
    )
    assert add_dropped(*nothing).shape == (0, 5, 8)

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mdseq.kernels import launch, rotate
from mdseq.kernels.rotate import FusedRotate, plain_rotate
from tests.kernels.outcomes import assert_near, interpreted, normal, outcome


def angles_of(batch, slots, pairs, seed=9):
    angle = normal(batch, slots, 1, pairs, seed=seed).mul(10).float()
    return angle.cos(), angle.sin()


@given(st.integers(1, 2), st.integers(0, 5), st.integers(1, 3), st.integers(1, 4), st.integers(0, 99))
def test_equals_the_product_of_complex_numbers(batch, slots, heads, pairs, seed):
    x, grad = (normal(batch, slots, heads, 2 * pairs, seed=seed + i) for i in range(2))
    angles = angles_of(batch, slots, pairs, seed)
    turn = torch.complex(*(angle.double() for angle in angles))

    def turned(x, turn):
        product = torch.complex(*x.chunk(2, dim=-1)) * turn
        return torch.cat([product.real, product.imag], dim=-1)

    out, of_x = outcome(lambda x: rotate(x, angles), [x], grad)
    torch.testing.assert_close(out, turned(x, turn))
    torch.testing.assert_close(of_x, turned(grad, turn.conj()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_once(dtype):
    x, angles = normal(2, 5, 3, 8).to(dtype), angles_of(2, 5, 4)
    assert torch.equal(rotate(x, angles), rotate(x.double(), angles).float().to(dtype))


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 0, 3, 8), (1, 1, 1, 2), (2, 37, 3, 8), (2, 5, 2, 66), (1, 70, 16, 16)])
def test_kernel_equals_the_definition(shape, dtype, monkeypatch):
    monkeypatch.setattr(launch, "MOST_COLUMNS", 16)
    x, grad = (normal(*shape, seed=i).to(dtype) for i in range(2))
    angles = angles_of(*shape[:2], shape[3] // 2)
    across = grad.transpose(1, 2).contiguous().transpose(1, 2)  # as from an engine that puts heads first
    ours = outcome(lambda x: FusedRotate.apply(x, *angles), [x], across)
    assert_near(ours, outcome(lambda x: plain_rotate(x, angles), [x.double()], grad.double()))

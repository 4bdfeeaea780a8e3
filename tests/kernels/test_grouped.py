from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from mdseq.kernels import grouped, grouped_linear
from mdseq.kernels.grouped import loop_linear
from tests.kernels.outcomes import assert_near, normal, outcome


def ends(counts):
    return torch.tensor(counts).cumsum(0, dtype=torch.int32)


@settings(max_examples=50)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=5),
    st.sampled_from([(8, 16), (6, 5), (1, 1), (16, 8), (8, 3)]),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_equals_a_product_for_each_row(counts, sizes, dtype):
    inner, outer = sizes
    x, grad = normal(sum(counts), inner).to(dtype), normal(sum(counts), outer, seed=1).to(dtype)
    weight = normal(len(counts), outer, inner, seed=2).to(dtype)
    of_row = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))

    def definition(x, weight):
        return torch.einsum("ak,ank->an", x, weight[of_row])

    ours = outcome(lambda x, weight: grouped_linear(x, weight, ends(counts)), [x, weight], grad)
    assert_near(ours, outcome(definition, [x.double(), weight.double()], grad.double()), roundings=8)


def test_the_loop_has_the_right_gradients():
    inputs = [normal(5, 3).requires_grad_(), normal(3, 2, 3, seed=1).requires_grad_()]
    assert gradcheck(lambda x, weight: loop_linear(x, weight, ends([2, 0, 3])), inputs)


def test_takes_a_gradient_that_is_one_number_expanded():
    inputs = [normal(5, 8).float().requires_grad_(), normal(2, 8, 8).float().requires_grad_()]
    gradients = torch.autograd.grad(grouped_linear(*inputs, ends([2, 3])).sum(), inputs)
    torch.testing.assert_close(gradients[1][0], inputs[0][:2].sum(0).expand(8, 8))


@pytest.mark.parametrize(
    ("rows", "inner", "dtype"), [(0, 8, torch.float32), (5, 8, torch.float64), (5, 6, torch.bfloat16)]
)
def test_what_torch_would_refuse_takes_the_loop(rows, inner, dtype, monkeypatch):
    monkeypatch.setattr(grouped._GroupedLinear, "apply", None)
    out = grouped_linear(normal(rows, inner).to(dtype), normal(2, 8, inner).to(dtype), ends([0, rows]))
    assert out.shape == (rows, 8)

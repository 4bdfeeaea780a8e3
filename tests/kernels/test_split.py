from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from mdseq.kernels import split_linear
from tests.kernels.outcomes import normal, outcome


@given(st.integers(0, 5), st.integers(1, 6), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_equals_one_product_that_is_cut_with_its_gradients(rows, inner, outer, parts, seed):
    inputs = [normal(2, rows, inner, seed=seed), normal(parts * outer, inner, seed=seed + 1)]
    grad = normal(2, rows, parts * outer, seed=seed + 2)
    ours = outcome(lambda x, weight: torch.cat(split_linear(x, weight, parts), dim=-1), inputs, grad)
    torch.testing.assert_close(ours, outcome(F.linear, inputs, grad))


@pytest.mark.parametrize("unused", [0, 1, 2])
def test_a_part_that_nobody_uses_has_a_gradient_of_zeros(unused):
    x, weight = normal(4, 5).requires_grad_(), normal(6, 5, seed=1).requires_grad_()
    sum(out.square().sum() for i, out in enumerate(split_linear(x, weight, 3)) if i != unused).backward()
    assert (weight.grad[2 * unused : 2 * unused + 2] == 0).all()
    assert (weight.grad != 0).sum() == 20

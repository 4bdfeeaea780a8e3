from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mdseq.kernels import combine, dispatch, launch
from mdseq.kernels.rows import fused_sum_rows, plain_sum_rows
from tests.kernels.outcomes import assert_near, interpreted, normal, outcome


def shuffled(tokens, per_token, seed):
    """source_a and position_nk of an order of assignments."""
    order_a = torch.randperm(tokens * per_token, generator=torch.Generator().manual_seed(seed))
    return order_a // per_token, order_a.argsort().view(tokens, per_token)


@given(st.integers(0, 6), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_there_and_back_equal_a_matrix_of_zeros_and_ones(tokens, per_token, width, seed):
    source_a, position_nk = shuffled(tokens, per_token, seed)
    copies_an = torch.nn.functional.one_hot(source_a, max(tokens, 1))[:, :tokens].double()
    x, y = normal(tokens, width, seed=seed), normal(tokens * per_token, width, seed=seed + 1)

    there = outcome(lambda x: dispatch(x, source_a, position_nk), [x], y)
    torch.testing.assert_close(there, [copies_an @ x, copies_an.T @ y])
    back = outcome(lambda y: combine(y, source_a, position_nk), [y], x)
    torch.testing.assert_close(back, [copies_an.T @ y, copies_an @ x])
    assert torch.autograd.gradgradcheck(lambda x: dispatch(x, source_a, position_nk) ** 2, x.requires_grad_())


def test_low_precision_is_rounded_once():
    source_a, position_nk = shuffled(50, 6, 0)
    y = normal(300, 3).bfloat16()
    exact = combine(y.double(), source_a, position_nk)
    assert_near([combine(y, source_a, position_nk)], [exact], roundings=0.5)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("rows", "count", "width"), [(0, 2, 8), (1, 1, 1), (70, 3, 33), (150, 1, 16), (9, 8, 40)])
def test_kernel_equals_the_definition(rows, count, width, index_dtype, dtype, monkeypatch):
    monkeypatch.setattr(launch, "MOST_COLUMNS", 16)
    x = normal(20, width).to(dtype)
    index = torch.randint(20, (rows, count), generator=torch.Generator().manual_seed(0)).to(index_dtype)
    assert_near([fused_sum_rows(x, index)], [plain_sum_rows(x.double(), index)])

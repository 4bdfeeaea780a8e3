from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mdseq.kernels import launch, swiglu
from mdseq.kernels.swiglu import FusedSwiglu, plain_swiglu
from tests.kernels.outcomes import assert_near, interpreted, normal, outcome


@given(st.integers(0, 5), st.integers(1, 7), st.booleans(), st.integers(0, 99))
def test_equals_the_definition_with_its_gradients(rows, inner, weighted, seed):
    gate, up, grad = (normal(rows, inner, seed=seed + i) for i in range(3))
    weight = normal(rows, seed=seed + 3) if weighted else torch.ones(rows, dtype=torch.float64)
    sigmoid = 1 / (1 + torch.exp(-gate))
    of_weight = (grad * gate * sigmoid * up).sum(1)
    of_gate = grad * weight[:, None] * up * sigmoid * (1 + gate * (1 - sigmoid))
    of_up = grad * weight[:, None] * gate * sigmoid
    expected = [gate * sigmoid * up * weight[:, None], torch.cat([of_gate, of_up], dim=1)]
    gate_up = torch.cat([gate, up], dim=1)
    if weighted:
        torch.testing.assert_close(outcome(swiglu, [gate_up, weight], grad), [*expected, of_weight])
    else:
        torch.testing.assert_close(outcome(swiglu, [gate_up], grad), expected)


def test_takes_any_leading_dimensions():
    gate_up = normal(2, 3, 8)
    torch.testing.assert_close(swiglu(gate_up), swiglu(gate_up.flatten(0, 1)).view(2, 3, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_float32_weight_does_not_widen_the_result(dtype):
    weight = torch.rand(5)
    out, grad, grad_weight = outcome(swiglu, [normal(5, 8).to(dtype), weight], normal(5, 4))
    assert (out.dtype, grad.dtype, grad_weight.dtype) == (dtype, dtype, torch.float32)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("rows", "inner"), [(0, 8), (1, 1), (70, 33), (5, 16), (3, 40)])
def test_kernels_equal_the_definition(rows, inner, weighted, dtype, monkeypatch):
    monkeypatch.setattr(launch, "MOST_COLUMNS", 16)  # wider rows are cut
    gate_up, grad = normal(rows, 2 * inner).to(dtype), normal(rows, inner, seed=1).to(dtype)
    weights = [normal(rows, seed=2).float()] if weighted else []

    def fused(gate_up, weight=None):
        return FusedSwiglu.apply(gate_up, weight)

    ours = outcome(fused, [gate_up, *weights], grad)
    exact = outcome(plain_swiglu, [gate_up.double(), *(weight.double() for weight in weights)], grad)
    assert_near(ours, exact, roundings=4)

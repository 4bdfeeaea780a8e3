from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mdseq.kernels import add_norm
from mdseq.kernels import norm as norm_module
from mdseq.kernels.norm import FusedAddNorm, plain_add_norm
from tests.kernels.outcomes import assert_near, interpreted, normal, outcome


def both(function, *inputs):
    """Sum and norm side by side, so that a gradient reaches both."""
    x, *added, weight = inputs
    return torch.cat(function(x, added[0] if added else None, weight, 1e-5), dim=-1)


@given(st.integers(0, 5), st.integers(1, 7), st.booleans(), st.integers(0, 99))
def test_equals_the_definition_with_its_gradients(rows, width, adds, seed):
    inputs = [normal(rows, width, seed=seed + i) for i in range(1 + adds)]
    weight, grad = normal(width, seed=seed + 2), normal(rows, 2 * width, seed=seed + 3)
    total = sum(inputs)
    root = (total.square().mean(1, keepdim=True) + 1e-5).sqrt()
    of_total, of_normed = grad.chunk(2, dim=1)
    of_unit = of_normed * weight
    of_x = of_total + of_unit / root - total * (of_unit * total).mean(1, keepdim=True) / root**3
    expected = [
        torch.cat([total, total / root * weight], dim=1),
        *[of_x] * len(inputs),
        (of_normed * total / root).sum(0),
    ]
    torch.testing.assert_close(outcome(partial(both, add_norm), [*inputs, weight], grad), expected)


def test_takes_any_leading_dimensions():
    x, added, weight = normal(2, 3, 8), normal(2, 3, 8, seed=1), normal(8, seed=2)
    flat = add_norm(x.flatten(0, 1), added.flatten(0, 1), weight, 1e-5)
    for one, other in zip(add_norm(x, added, weight, 1e-5), flat, strict=True):
        torch.testing.assert_close(one, other.view(2, 3, 8))


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 1), (70, 33), (9, 16), (3, 40)])
def test_kernels_equal_the_definition(rows, width, adds, dtype, monkeypatch):
    monkeypatch.setattr(norm_module, "FORWARD_ELEMENTS", 64)
    monkeypatch.setattr(norm_module, "BACKWARD_BYTES", 128)
    monkeypatch.setattr(norm_module, "MOST_PROGRAMS", 3)  # each takes several tiles
    inputs = [normal(rows, width, seed=i).to(dtype) for i in range(1 + adds)] + [normal(width, seed=2).to(dtype)]
    grad = normal(rows, 2 * width, seed=3).to(dtype)
    ours = outcome(partial(both, FusedAddNorm.apply), inputs, grad)
    exact = outcome(partial(both, plain_add_norm), [x.double() for x in inputs], grad)
    assert_near(ours, exact, roundings=4)


@interpreted
def test_gradients_through_the_norm_alone():
    inputs = [normal(5, 6, seed=i).float() for i in range(2)] + [normal(6, seed=2).float()]
    ours, exact = (
        outcome(lambda *inputs, function=function: function(*inputs, 1e-5)[1], inputs, inputs[0])
        for function in (FusedAddNorm.apply, plain_add_norm)
    )
    assert_near(ours, exact, roundings=8)

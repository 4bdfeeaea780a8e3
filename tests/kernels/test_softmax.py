from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mdseq.kernels import softmax_numerators, softmax_slope
from mdseq.kernels.softmax import fused_numerators, fused_slope, plain_numerators, plain_slope
from tests.kernels.outcomes import assert_near, interpreted, normal

INF, NAN, HUGE, LOWEST = torch.inf, torch.nan, 3e38, torch.finfo(torch.float32).min


def tokens(rows, width):
    return torch.arange(rows) * 31 % width


def slope_of(function, logits, token, differentiate=True):
    """What it makes of the logits, and what it returns."""
    logits = logits.clone()
    return [logits, *function(logits, token, differentiate)]


def numerators_of(function, logits):
    logits = logits.clone()
    return [logits, function(logits)]


@given(st.integers(0, 5), st.integers(1, 40), st.sampled_from([0.0, 1.0, 100.0]), st.integers(0, 99))
def test_equals_the_definition(rows, width, scale, seed):
    logits, token = normal(rows, width, seed=seed) * scale, tokens(rows, width)
    exp = torch.exp(logits - logits.max(dim=1, keepdim=True).values)
    total = exp.sum(dim=1)
    onehot = torch.nn.functional.one_hot(token, width)
    loss = torch.nn.functional.cross_entropy(logits, token, reduction="none")
    slope = exp - total[:, None] * onehot
    torch.testing.assert_close(slope_of(softmax_slope, logits, token), [slope, total, loss])
    torch.testing.assert_close(slope_of(softmax_slope, logits, token, differentiate=False)[1:], [total, loss])
    torch.testing.assert_close(numerators_of(softmax_numerators, logits), [exp, total])


def test_the_slope_is_the_gradient_times_the_total():
    logits, token = normal(3, 9).requires_grad_(), tokens(3, 9)
    slope, total, loss = slope_of(softmax_slope, logits.detach(), token)
    expected = torch.nn.functional.cross_entropy(logits, token, reduction="none")
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(slope / total[:, None], torch.autograd.grad(expected.sum(), logits)[0])


def test_float32_is_as_exact_as_it_can_be():
    logits, token = normal(20, 500).float() * 3, tokens(20, 500)
    assert_near(slope_of(softmax_slope, logits, token), slope_of(plain_slope, logits.double(), token), 4)


@interpreted
@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 1), (5, 7), (2, 4096), (3, 4097), (2, 9001)])
def test_kernel_equals_the_definition(rows, width, scale):
    """Equal logits too; 9001 of them are three blocks."""
    logits, token = (normal(rows, width) * scale).float(), tokens(rows, width)
    assert_near(slope_of(fused_slope, logits, token), slope_of(plain_slope, logits.double(), token), 4)
    assert_near(numerators_of(fused_numerators, logits), numerators_of(plain_numerators, logits.double()), 4)
    left, *results = slope_of(fused_slope, logits, token, differentiate=False)
    assert torch.equal(left, logits)
    assert_near(results, slope_of(plain_slope, logits.double(), token)[1:], 4)


@interpreted
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # numpy's, of -3e38 - 3e38
@pytest.mark.parametrize("where", [0, 1, 4096, 8999])
@pytest.mark.parametrize("token", [0, 4096])
@pytest.mark.parametrize(
    ("rest", "one"),
    [(-HUGE, HUGE), (HUGE, -HUGE), (HUGE, HUGE), (-HUGE, 0.0), (LOWEST, LOWEST), (-INF, 1.0), (-INF, LOWEST)],
)
def test_kernel_bears_extreme_logits(rest, one, where, token):
    """Whether the one that differs comes before the others or after them."""
    logits, token = torch.full((2, 9000), rest), torch.full((2,), token)
    logits[:, where] = one
    torch.testing.assert_close(slope_of(fused_slope, logits, token), slope_of(plain_slope, logits, token))
    torch.testing.assert_close(numerators_of(fused_numerators, logits), numerators_of(plain_numerators, logits))


@interpreted
@pytest.mark.filterwarnings("ignore:invalid:RuntimeWarning")  # numpy's, of inf - inf
@pytest.mark.parametrize("where", [0, 1, 4096, 8999])
@pytest.mark.parametrize("value", [NAN, INF])
def test_kernel_hides_no_nan_or_infinity(value, where):
    """The total is NaN, and with it whatever is divided by it; the row beside it is as it was."""
    logits, token = normal(2, 9000).float(), tokens(2, 9000)
    _, sane_total, sane_loss = slope_of(fused_slope, logits, token)
    logits[1, where] = value
    _, total, loss = slope_of(fused_slope, logits, token)
    assert torch.equal(total[:1], sane_total[:1])
    assert torch.equal(loss[:1], sane_loss[:1])
    assert total[1].isnan()
    assert loss[1].isnan()
    assert numerators_of(fused_numerators, logits)[1][1].isnan()

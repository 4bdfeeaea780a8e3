"""The kernels of keyed draws, where triton can interpret them on a CPU; those on a GPU are in test_random_cuda.py.

With triton installed: `TRITON_INTERPRET=1 pytest tests/kernels/test_random.py`.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

from mdseq.noise import NoiseKey, Purpose

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs triton, and TRITON_INTERPRET=1 in the environment",
)

ROWS = torch.tensor([0, 7, 2**31 + 5, 2**40 + 3])[::2]


@pytest.mark.parametrize(("seed", "step"), [(0, 0), (1, 16), (2**31, 3), (2**32 - 1, 2**31)])
@pytest.mark.parametrize("length", [0, 1, 37, 300])
def test_uniform_equals_the_definition(seed, step, length):
    from mdseq.kernels import random

    expected = NoiseKey(seed, step, ROWS).uniform(Purpose.ABSORBING, length)
    assert torch.equal(random.uniform(seed, int(Purpose.ABSORBING), step, ROWS, length), expected)


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5, 6, 8, 11, 128, 130])
@pytest.mark.parametrize("length", [1, 19])
def test_normal_equals_the_definition(dim, length):
    from mdseq.kernels import random

    expected = NoiseKey(2**32 - 3, 5, ROWS).normal(Purpose.DIFFUSION, length, dim)
    ours = random.normal(2**32 - 3, int(Purpose.DIFFUSION), 5, ROWS, length, dim)
    torch.testing.assert_close(ours, expected, rtol=2e-6, atol=1e-9)

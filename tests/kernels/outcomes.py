"""What tests of kernels share: a function's outcome forward and backward, and which tests need Triton's interpreter.

With triton installed, kernels run on a CPU: `TRITON_INTERPRET=1 pytest tests/kernels`. On a GPU: test_cuda.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

interpreted = pytest.mark.skipif(
    find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs triton, and TRITON_INTERPRET=1 in the environment",
)


def outcome(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """The output, and the gradients of all inputs."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))]


def assert_near(ours: Sequence[Tensor], exact: Sequence[Tensor], roundings: float = 2.0) -> None:
    """No further from the exact result than some roundings of its largest number."""
    for one, best in zip(ours, exact, strict=True):
        assert one.shape == best.shape
        if best.numel():
            allowed = roundings * torch.finfo(one.dtype).eps * best.abs().max()
            error = (one - best).abs().max()  # NaN is not below it
            assert error <= allowed, f"{error:.2e} > {allowed:.2e}"


def normal(*shape: int, seed: int = 0, device: str = "cpu") -> Tensor:
    """float64; round it to another type before anything else, and results in that type have the same inputs."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device, dtype=torch.float64)

"""Keyed draws on a GPU: those of a CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mdseq.noise import NoiseKey, Purpose

triton = pytest.importorskip("triton", reason="comes with torch for GPUs")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

WORD = st.integers(0, 2**32 - 1)


def on_both(seed: int, step: int, rows: list[int], draw: Callable[[NoiseKey], Tensor]) -> tuple[Tensor, Tensor]:
    """A draw on the GPU, brought back, and on the CPU."""
    row_b = torch.tensor(rows)
    return draw(NoiseKey(seed, step, row_b.cuda())).cpu(), draw(NoiseKey(seed, step, row_b))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(WORD, WORD, st.lists(st.integers(0, 2**62), min_size=1, max_size=9), st.integers(0, 700))
def test_uniform_is_that_of_a_cpu_to_the_bit(seed, step, rows, length):
    ours, expected = on_both(seed, step, rows, lambda key: key.uniform(Purpose.ABSORBING, length))
    assert torch.equal(ours, expected)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(WORD, WORD, st.lists(st.integers(0, 2**62), min_size=1, max_size=9), st.integers(0, 100), st.integers(1, 140))
def test_normal_is_that_of_a_cpu_to_rounding(seed, step, rows, length, dim):
    ours, expected = on_both(seed, step, rows, lambda key: key.normal(Purpose.DIFFUSION, length, dim))
    torch.testing.assert_close(ours, expected, rtol=2e-6, atol=1e-9)


def test_more_values_than_an_int32_can_count():
    dim, length = 1024, 1024
    rows = torch.arange(2**11 + 8, device="cuda")
    last = NoiseKey(3, 4, rows).normal(Purpose.DIFFUSION, length, dim)[-1]
    assert torch.equal(last, NoiseKey(3, 4, rows[-1:]).normal(Purpose.DIFFUSION, length, dim)[0])


def test_a_draw_is_one_launch_and_compiles_once(monkeypatch):
    compiled: list[object] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda **compilation: compiled.append(compilation))
    for step, length in ((0, 1), (1, 16), (16, 48), (2**31, 100)):
        key = NoiseKey(1, step, torch.arange(length % 7 + 1, device="cuda"))
        for purpose in (Purpose.TIMESTEP, Purpose.STARTING, Purpose.CONDITION):
            key.normal(purpose, length, 96)
            key.uniform(purpose, length)
    # Once more for a step that no int32 holds.
    assert len(compiled) <= 4
    key = NoiseKey(1, 2, torch.arange(4, device="cuda"))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        key.normal(Purpose.DIFFUSION, 50, 96)
        key.uniform(Purpose.ABSORBING, 50)
        torch.cuda.synchronize()
    on_gpu = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len([name for name in on_gpu if "kernel" in name]) == 2


def test_nothing_waits_for_the_gpu():
    key = NoiseKey(1, 2, torch.arange(4, device="cuda"))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        key.normal(Purpose.DIFFUSION, 50, 96)
        key.uniform(Purpose.ABSORBING, 50)
    finally:
        torch.cuda.set_sync_debug_mode("default")

"""What is done to DeepSpeed's engine once it is built."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mdseq.engine.build import _multiply_unaligned_experts_one_by_one


@pytest.mark.parametrize(("start", "aligned"), [(0, True), (1, False), (8, True), (300, False)])
def test_experts_that_torch_cannot_group_are_multiplied_one_by_one(start: int, aligned: bool) -> None:
    """Two bytes a weight: only every eighth starts at a multiple of 16."""
    experts = nn.Module()
    experts.w1 = nn.Parameter(torch.zeros(512, dtype=torch.bfloat16)[start : start + 64].view(2, 4, 8))
    experts.use_grouped_mm = not aligned
    experts.register_forward_pre_hook(_multiply_unaligned_experts_one_by_one)
    experts.forward = lambda: experts.use_grouped_mm
    assert experts() == aligned

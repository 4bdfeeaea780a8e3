from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from mdseq.model.assignment import Assignment


@given(st.integers(0, 9), st.integers(1, 4), st.sampled_from([4, 256, 257, 1000]), st.integers(0, 99))
def test_rows_are_sorted_by_expert_then_token(tokens, per_token, num_experts, seed):
    generator = torch.Generator().manual_seed(seed)
    expert_nk = torch.rand(tokens, num_experts, generator=generator).topk(per_token).indices
    assignment = Assignment.of(expert_nk, num_experts)

    by_expert = sorted((e, n, j) for n, row in enumerate(expert_nk.tolist()) for j, e in enumerate(row))
    assert assignment.order_a.tolist() == [n * per_token + j for _, n, j in by_expert]
    assert assignment.position_nk.flatten()[assignment.order_a].tolist() == list(range(tokens * per_token))
    counts = expert_nk.flatten().bincount(minlength=num_experts)
    assert torch.equal(assignment.end_e, counts.cumsum(0).int())
    assert assignment.end_e.dtype == torch.int32


def test_rows_carry_tokens_and_weights_and_bring_back_their_sum():
    expert_nk = torch.tensor([[1, 0], [2, 1], [0, 2]])
    assignment = Assignment.of(expert_nk, 3)
    x_nd, weight_nk = torch.randn(3, 4), torch.rand(3, 2)
    rows = [(0, 1), (2, 0), (0, 0), (1, 1), (1, 0), (2, 1)]  # token, and which of its two: expert after expert
    assert torch.equal(assignment.rows_of_tokens(x_nd), torch.stack([x_nd[n] for n, _ in rows]))
    assert assignment.rows_of_assignments(weight_nk).tolist() == [weight_nk[n, j].item() for n, j in rows]
    y_ad = torch.randn(6, 4)
    torch.testing.assert_close(assignment.sum_of_rows(y_ad)[1], y_ad[3] + y_ad[4])

"""Which expert gets which token: the order of rows in which experts work, and the way there and back.

Shapes: n tokens, k experts per token, a = n * k assignments, e experts, d hidden dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mdseq.kernels import combine, dispatch


@dataclass(frozen=True)
class Assignment:
    """Assignments sorted by expert, those of one expert in the order of tokens. Making one does not wait for a GPU.

    Attributes:
        order_a: Of each row, its place in the order of tokens, [n, k] flattened.
        position_nk: The inverse: of each assignment, its row.
        end_e: int32, the row behind the last of each expert.
    """

    order_a: Tensor
    position_nk: Tensor
    end_e: Tensor

    @classmethod
    def of(cls, expert_nk: Tensor, num_experts: int) -> Assignment:
        # The fewer bits in a key, the fewer passes to sort it. Sorted, the ends are found without counting, which
        # on a GPU takes atomic additions to a few places, or waits to know how many.
        dtype = torch.uint8 if num_experts <= 256 else torch.int32
        expert_a, order_a = expert_nk.flatten().to(dtype).sort(stable=True)
        every_e = torch.arange(num_experts, dtype=dtype, device=expert_nk.device)
        end_e = torch.searchsorted(expert_a, every_e, right=True, out_int32=True)
        row_a = torch.arange(len(order_a), device=order_a.device)
        position_a = torch.empty_like(order_a).scatter_(0, order_a, row_a)
        return cls(order_a, position_a.view(expert_nk.shape), end_e)

    def rows_of_tokens(self, x_nd: Tensor) -> Tensor:
        """[n, d] to [a, d]: a copy of each token for each of its experts."""
        return dispatch(x_nd, self._token_a, self.position_nk)

    def rows_of_assignments(self, weight_nk: Tensor) -> Tensor:
        """[n, k] to [a]."""
        return dispatch(weight_nk.reshape(-1, 1), self.order_a, self.position_nk.view(-1, 1))[:, 0]

    def sum_of_rows(self, y_ad: Tensor) -> Tensor:
        """[a, d] to [n, d]: what a token's experts made of it, added up."""
        return combine(y_ad, self._token_a, self.position_nk)

    @property
    def _token_a(self) -> Tensor:
        return self.order_a // self.position_nk.shape[1]

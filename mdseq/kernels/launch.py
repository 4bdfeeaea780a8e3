"""Where Triton kernels run, and how they cut a matrix of rows into tiles."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

MOST_COLUMNS = 1024


def has_kernels(x: Tensor) -> bool:
    """Kernels compute in float32: exact enough for all types but float64."""
    return x.is_cuda and x.dtype in (torch.float32, torch.bfloat16, torch.float16) and has_triton()


@cache
def has_triton() -> bool:
    """Whether there is a compiler for kernels of our own: it comes with torch for GPUs only."""
    return find_spec("triton") is not None


@dataclass(frozen=True)
class RowTile:
    """A tile of whole rows where they are short, and of a stretch of a few rows where they are wide."""

    rows: int
    columns: int

    @classmethod
    def of(cls, width: int, elements: int) -> RowTile:
        """Of about that many elements; its sides are powers of 2, as Triton wants them."""
        columns = min(1 << (width - 1).bit_length(), MOST_COLUMNS)
        return cls(max(1, elements // columns), columns)

    @classmethod
    def whole(cls, width: int, elements: int) -> RowTile:
        """Of whole rows, one at least."""
        columns = 1 << (width - 1).bit_length()
        return cls(max(1, elements // columns), columns)

    def down(self, num_rows: int) -> int:
        return -(-num_rows // self.rows)

    def across(self, width: int) -> int:
        return -(-width // self.columns)

    @property
    def constants(self) -> dict[str, int]:
        return {"ROWS": self.rows, "COLUMNS": self.columns}

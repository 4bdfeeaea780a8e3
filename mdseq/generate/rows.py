"""Rows of tokens, some given and some to be written.

Shapes: b batch, l length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from mdseq.data.tokenizer import SpecialToken
from mdseq.diffusion.denoising import DiffusionModel
from mdseq.generate.sampler import Estimate, SamplerOptions, sample
from mdseq.sparse import Documents

Observe = Callable[[Estimate], None]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        tokens_l: int64; padding where something is to be written.
        target_l: bool, what is to be written.
        sample_id: Key of the row's noise.
        source_length: Tokens of the source of a pair; 0 for texts.
    """

    tokens_l: np.ndarray
    target_l: np.ndarray
    sample_id: int
    source_length: int

    @classmethod
    def of(cls, parts: Sequence[np.ndarray | int], sample_id: int, source_length: int) -> Row:
        """A row of parts: tokens that are given, and numbers of tokens to write."""
        gaps = [isinstance(part, int) for part in parts]
        tokens = [np.full(part, SpecialToken.PAD) if isinstance(part, int) else part for part in parts]
        target = [np.full(len(part), gap) for part, gap in zip(tokens, gaps, strict=True)]
        return cls(np.concatenate(tokens).astype(np.int64), np.concatenate(target), sample_id, source_length)

    def __len__(self) -> int:
        return len(self.tokens_l)


def fill(
    model: DiffusionModel, rows: Sequence[Row], options: SamplerOptions, observe: Observe | None = None
) -> list[np.ndarray]:
    """Write what is to be written in each row: its tokens, int64 [l], the given ones unchanged. One batch."""
    shape = len(rows), max(map(len, rows))
    tokens_bl = torch.full(shape, int(SpecialToken.PAD))
    target_bl = torch.zeros(shape, dtype=torch.bool)
    for b, row in enumerate(rows):
        tokens_bl[b, : len(row)] = torch.from_numpy(row.tokens_l)
        target_bl[b, : len(row)] = torch.from_numpy(row.target_l)
    device = model.m_z.device
    length_b, source_length_b, sample_b = (
        torch.tensor(values, device=device)
        for values in ([len(row) for row in rows], [row.source_length for row in rows], [row.sample_id for row in rows])
    )
    samples = sample(
        model,
        tokens_bl.to(device),
        target_bl.to(device),
        Documents.whole(length_b, shape[1], source_length_b),
        sample_b,
        options,
        observe,
    )
    filled_bl = samples.tokens_bl.cpu().numpy()
    return [filled_bl[b, : len(row)] for b, row in enumerate(rows)]


def by_length(items: Sequence[Item], length_of: Callable[[Item], int], batch_size: int) -> Iterator[list[Item]]:
    """Batches of items of about the same length, so that little of a batch is padding; the longest come first.

    What does not fit into memory then fails at the start.
    """
    ordered = sorted(items, key=length_of, reverse=True)
    for start in range(0, len(ordered), batch_size):
        yield ordered[start : start + batch_size]

"""Dropout (Srivastava et al., JMLR 2014) as a function of what is dropped, not of a generator's state.

Whether a feature is dropped depends on the run's seed, the step, the row, the slot's identity in the row and the place
in the model: not on how rows are spread over ranks and micro-batches, and so also not on whether a block is computed
once or, for lack of memory, again.

Shapes: b batch, s slots of a row, d features.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mdseq.kernels.launch import has_kernels
from mdseq.noise import NoiseKey, Purpose, philox
from mdseq.sparse import Layout

ATTENTION, FEEDFORWARD = range(2)
# A decision takes 16 random bits.
_LEVELS = 2**16


@dataclass(frozen=True)
class Dropout:
    """Drops features of what is added to the residual stream.

    Attributes:
        key: Seed, step and rows.
        share: Of the features that are dropped, in [0, 1); rounded to a multiple of 2**-16.
        layer: Whose sublayers it is for, counted from 1; 0 for what goes into the first layer.
    """

    key: NoiseKey
    share: float
    layer: int = 0

    def of_layer(self, index: int) -> Dropout:
        """For the sublayers of the block with this index."""
        return replace(self, layer=index + 1)

    def add(self, residual_bsd: Tensor | None, x_bsd: Tensor, layout: Layout, sublayer: int = 0) -> Tensor:
        """residual + x * kept / (1 - share), with no residual for None; in fp32 at least, then rounded: [b, s, d]."""
        place = 2 * self.layer + sublayer
        wide = torch.promote_types(x_bsd.dtype, torch.float32)
        if has_kernels(x_bsd):
            from mdseq.kernels.dropout import add_dropped

            numbers = self.key.numbers(Purpose.DROPOUT)
            return add_dropped(x_bsd, residual_bsd, self.threshold, numbers, self.key.row_b, layout.identity_bs, place)
        kept_bsd = self.kept(layout, place, x_bsd.shape[2])
        dropped_bsd = torch.where(kept_bsd, x_bsd.to(wide) * (_LEVELS / (_LEVELS - self.threshold)), 0.0)
        if residual_bsd is None:
            return dropped_bsd.to(x_bsd.dtype)
        return (residual_bsd + dropped_bsd).to(torch.promote_types(residual_bsd.dtype, x_bsd.dtype))

    @property
    def threshold(self) -> int:
        """Numbers of 16 bits below it drop."""
        return min(round(self.share * _LEVELS), _LEVELS - 1)

    def kept(self, layout: Layout, place: int, dim: int) -> Tensor:
        """The mask itself, bool [b, s, dim]: counter i of a place, of c in all, decides on features i, i + c, ..."""
        counters = -(-dim // 8)
        seed, purpose, step = self.key.numbers(Purpose.DROPOUT)
        device = layout.identity_bs.device
        counter = (
            (place * counters + torch.arange(counters, device=device))[None, None, :],
            layout.identity_bs[..., None],
            (self.key.row_b & 0xFFFFFFFF)[:, None, None],
            torch.full((1, 1, 1), step, device=device),
        )
        words = philox(torch.broadcast_tensors(*counter), (seed, purpose))
        bits = [bits for word in words for bits in (word % _LEVELS, word // _LEVELS)]
        return torch.cat(bits, dim=-1)[..., :dim] >= self.threshold

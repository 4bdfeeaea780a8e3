"""Random draws as a function, not a state.

Every draw is Philox-4x32-10 (Salmon et al., SC 2011) of a key and a counter that say what the draw is for: the run's
seed and the purpose; the step, the row, the position in the row and the index within the position. So a draw does not
depend on the device, on how rows are spread over ranks and micro-batches, or on what was drawn before. On a GPU it is
one kernel; on any device, the same words.

Shapes: b batch, l length, w 32-bit words.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from mdseq.kernels.launch import has_triton

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


class Purpose(IntEnum):
    """What a draw is for; draws for different purposes are independent."""

    TIMESTEP = 1
    EMBEDDING = 2
    DIFFUSION = 3
    ABSORBING = 4
    STARTING = 5
    SAMPLING = 6
    PREFIX = 7
    SUFFIX = 8
    STRATA = 9
    SELF_CONDITIONING = 10
    LAG = 11
    CONDITION = 12
    LENGTH = 13
    RESAMPLING = 14
    DROPOUT = 15
    SOURCE = 16
    SHARE = 17
    LIKELIHOOD = 20
    ORDER = 21


@dataclass(frozen=True)
class NoiseKey:
    """The part of a draw's key that a whole batch shares.

    Attributes:
        seed: The run's seed, below 2**32.
        step: Optimiser step in training, solver step in sampling.
        row_b: int64 [b], the id of each row in the dataset, or of each sample.
    """

    seed: int
    step: int
    row_b: Tensor

    def normal(self, purpose: Purpose, length: int, dim: int) -> Tensor:
        """Standard normal fp32 [b, length, dim] (Box-Muller, two words for two values)."""
        if self.row_b.is_cuda and has_triton():
            from mdseq.kernels import random

            return random.normal(*self.numbers(purpose), self.row_b, length, dim)
        words = self._words(purpose, length, dim + dim % 2)
        radius_word, angle_word = words.chunk(2, dim=-1)
        radius = (-2.0 * torch.log(_unit(radius_word))).sqrt()
        angle = 2.0 * math.pi * _unit(angle_word)
        return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=-1)[..., :dim]

    def uniform(self, purpose: Purpose, length: int) -> Tensor:
        """Uniform fp32 [b, length] in (0, 1]."""
        if self.row_b.is_cuda and has_triton():
            from mdseq.kernels import random

            return random.uniform(*self.numbers(purpose), self.row_b, length)
        return _unit(self._words(purpose, length, 1)[..., 0])

    def numbers(self, purpose: Purpose) -> tuple[int, int, int]:
        """Seed, purpose and step, each a 32-bit word: what is the same for all rows and positions."""
        return self.seed & _WORD, int(purpose), self.step & _WORD

    def _words(self, purpose: Purpose, length: int, count: int) -> Tensor:
        """`count` independent 32-bit words per position, int64 [b, length, count]."""
        device = self.row_b.device
        counter = (
            torch.arange(-(-count // 4), device=device)[None, None, :],
            torch.arange(length, device=device)[None, :, None],
            (self.row_b & _WORD)[:, None, None],
            torch.full((1, 1, 1), self.step & _WORD, device=device),
        )
        words = philox(torch.broadcast_tensors(*counter), (self.seed & _WORD, int(purpose)))
        return torch.cat(words, dim=-1)[..., :count]


def philox(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox-4x32-10: four int64 tensors of 32-bit words to four of random words, the same shape."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The 64-bit product wraps around as a signed number, but keeps its bits.
        product0, product1 = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]
        x0, x1, x2, x3 = (
            ((product1 >> 32) & _WORD) ^ x1 ^ k0,
            product1 & _WORD,
            ((product0 >> 32) & _WORD) ^ x3 ^ k1,
            product0 & _WORD,
        )
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return x0, x1, x2, x3


def _unit(word: Tensor) -> Tensor:
    """A 32-bit word to (0, 1] in fp32: its upper 24 bits, so that no value rounds to zero."""
    return ((word >> 8) + 1).to(torch.float32) * 2.0**-24

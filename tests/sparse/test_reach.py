"""Globals and dilation earn their place: only with one of them does a small model see past its windows.

One token of a long random row is marked. At the last position of the row, the model is to say which value it has.

Shapes: b rows, l tokens, s slots, d hidden dimension, g global slots.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdseq.model.attention import SelfAttention
from mdseq.model.block import Block
from mdseq.model.embedding import rotary_angles
from mdseq.model.experts import DenseFeedForward
from mdseq.sparse import Documents, Pattern

ROW, VALUES = 1024, 8
CHANCE = 1 / VALUES
HIDDEN, HEADS = 64, 2
WINDOW = 32
REACH = 2 * WINDOW  # of two layers, without dilation
DILATION = 32  # then two layers reach 32 + 32 * 32 tokens, which is the row, and leave no gaps
STEPS, ROWS, PEAK_RATE = 500, 8, 3e-3
HELD_OUT_ROWS = 512

pytestmark = pytest.mark.slow


class Reporter(nn.Module):
    """The denoiser's blocks, one a dilation, and a classifier of the row's last token."""

    def __init__(self, dilations: tuple[int, ...], num_global: int) -> None:
        super().__init__()
        self.token = nn.Embedding(2 * VALUES, HIDDEN)  # the values, then the same marked
        self.global_gd = nn.Parameter(torch.randn(num_global, HIDDEN))
        self.blocks = nn.ModuleList(
            Block(
                HIDDEN,
                SelfAttention(HIDDEN, HEADS, Pattern(WINDOW, (dilation,))),
                DenseFeedForward(HIDDEN, 2 * HIDDEN),
                post_norm=False,
            )
            for dilation in dilations
        )
        for block in self.blocks:  # from the start, heads prefer some tokens to others
            query, key, _ = block.attention.query_key_value.weight.detach().chunk(3)
            nn.init.orthogonal_(query)
            nn.init.orthogonal_(key)
        self.norm = nn.RMSNorm(HIDDEN, eps=1e-5)
        self.answer = nn.Linear(HIDDEN, VALUES)

    def forward(self, token_bl: Tensor) -> Tensor:
        documents = Documents.whole(torch.full((len(token_bl),), ROW), ROW)
        layout = documents.layout(num_global=len(self.global_gd))
        x_bsd = layout.to_slots(self.token(token_bl), self.global_gd)
        angles = rotary_angles(layout.position_bs, HIDDEN // HEADS)
        for block in self.blocks:
            x_bsd = block(x_bsd, angles, layout)
        return self.answer(self.norm(layout.to_tokens(x_bsd)[:, -1]))


def marked_rows(distance_b: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random tokens [b, l], one marked at each distance from the last; and its value [b]."""
    value_bl = torch.randint(VALUES, (len(distance_b), ROW), generator=generator)
    marked_b1 = (ROW - 1 - distance_b)[:, None]
    return value_bl.scatter_add(1, marked_b1, torch.full_like(marked_b1, VALUES)), value_bl.gather(1, marked_b1)[:, 0]


def train(dilations: tuple[int, ...], num_global: int, seed: int = 0) -> Reporter:
    """Distances are uniform in their logarithm, so that even a model that sees little has something to learn from."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    reporter = Reporter(dilations, num_global)
    optimiser = torch.optim.AdamW(reporter.parameters(), lr=PEAK_RATE, weight_decay=0.0)
    for step in range(STEPS):
        for group in optimiser.param_groups:
            group["lr"] = PEAK_RATE * min(1.0, (step + 1) / 50, (STEPS - step) / (0.3 * STEPS))
        distance_b = (ROW ** torch.rand(ROWS, generator=generator)).long() - 1
        token_bl, value_b = marked_rows(distance_b, generator)
        loss = F.cross_entropy(reporter(token_bl), value_b)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(reporter.parameters(), 1.0)
        optimiser.step()
    return reporter.eval()


@torch.no_grad()
def accuracy(reporter: Reporter, nearest: int, beyond: int, count: int = HELD_OUT_ROWS) -> float:
    """Share of held-out rows answered rightly; the marked token anywhere at distances from `nearest` to `beyond`."""
    generator = torch.Generator().manual_seed(10**6)
    distance_b = torch.randint(nearest, beyond, (count,), generator=generator)
    right = []
    for distance_c in distance_b.split(64):
        token_bl, value_b = marked_rows(distance_c, generator)
        right.append(reporter(token_bl).argmax(dim=-1) == value_b)
    return torch.cat(right).float().mean().item()


def test_windows_alone_learn_what_is_near_and_see_nothing_beyond_their_reach():
    reporter = train(dilations=(1, 1), num_global=0)
    assert accuracy(reporter, 0, WINDOW + 1) > 0.9
    assert accuracy(reporter, REACH + 1, ROW) < 2 * CHANCE


def test_with_globals_the_same_windows_see_the_whole_row():
    reporter = train(dilations=(1, 1), num_global=4)
    assert accuracy(reporter, 0, ROW) >= 0.99


def test_with_dilation_the_same_windows_see_the_whole_row():
    reporter = train(dilations=(1, DILATION), num_global=0)
    assert accuracy(reporter, 0, ROW) >= 0.99

"""Texts longer than a row: written block after block, each with the end of what was written before as clean source.

A row is at most `context + block` tokens, however long the text gets, and so are memory and the time of a block. What
the text began from stays in front of the row as long as it takes no more than half of the context, so that the text
keeps sight of it; otherwise the window slides over it too. The source of a pair always stays, whole.

Block k of a text draws its noise with the seed (seed + k * 0x9E3779B9) mod 2**32. The factor is odd, so that the seeds
of a text's blocks are all different, and so are the keys (seed, sample id) of any two blocks of any two texts; and it
is that of the golden ratio, so that they are far from the small numbers that people choose as seeds.

Shapes: l length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mdseq.data.tokenizer import SpecialToken
from mdseq.diffusion.denoising import DiffusionModel
from mdseq.generate.rows import Observe, Row, fill
from mdseq.generate.sampler import SamplerOptions

FRONT_SHARE = 0.5
_GOLDEN_WORD = 0x9E3779B9


@dataclass(frozen=True)
class Blocks:
    """How long texts are cut.

    Attributes:
        block: Tokens written at a time.
        context: Tokens before them that the model sees.
        whole: Rows of up to this many tokens are not cut.
    """

    block: int
    context: int
    whole: int

    @classmethod
    def of(cls, row_length: int, block: int | None = None, context: int | None = None) -> Blocks:
        """By default, texts that fit into a row of `row_length` are not cut, and others by half of it.

        With a block or a context of one's own, every text longer than a block is cut.
        """
        half = max(1, row_length // 2)
        chosen = block is not None or context is not None
        return cls(block or half, context or half, whole=0 if chosen else row_length)

    def cut(self, num_front: int, length: int) -> bool:
        """Whether a text of `length` tokens, after `num_front` given ones, is cut."""
        return length > self.block and num_front + length > self.whole


@dataclass(frozen=True)
class Draft:
    """A text to be written.

    Attributes:
        front_l: int64, the given tokens that it begins from: BOS and the text to continue, or BOS, source, SEP.
        length: Tokens to write.
        sample_id: Key of its noise.
        is_pair: Whether `front_l` is the source of a pair, which stays in view, however long it is.
        blocks: How it is cut.
    """

    front_l: np.ndarray
    length: int
    sample_id: int
    is_pair: bool
    blocks: Blocks

    def row(self, written_l: np.ndarray, num_drawn: int) -> Row:
        """The next block.

        Args:
            written_l: The tokens of the text so far.
            num_drawn: How many of `length` are drawn: those, and the ends of text that were passed over.
        """
        context = self.blocks.context
        if self.is_pair or len(self.front_l) <= FRONT_SHARE * context:
            # A long source of a pair leaves the target so far no less than half of the context.
            room = max(context - len(self.front_l), int((1 - FRONT_SHARE) * context))
            given = [self.front_l, _last(written_l, room)]
        else:
            given = [_last(np.concatenate([self.front_l, written_l]), context)]
        source_length = len(self.front_l) if self.is_pair else 0
        return Row.of([*given, min(self.blocks.block, self.length - num_drawn)], self.sample_id, source_length)


def write_blocks(
    model: DiffusionModel,
    drafts: Sequence[Draft],
    options: SamplerOptions,
    min_length: int = 0,
    observe: Observe | None = None,
) -> Iterator[list[np.ndarray]]:
    """Write texts side by side, block after block, until all have ended.

    Args:
        model: Trained weights and their process.
        drafts: The texts; the result for each does not depend on the others.
        options: Solver, calls, seed.
        min_length: Ends of text among this many first tokens of a text are passed over.
        observe: Called with the state of each call for the first block.

    Yields:
        After each block, the new tokens of each text, int64, without ends of text; nothing once it has ended.
    """
    written = [np.empty(0, np.int64) for _ in drafts]
    drawn = [0] * len(drafts)
    going = list(range(len(drafts)))
    number = 0
    while going:
        rows = [drafts[i].row(written[i], drawn[i]) for i in going]
        filled = fill(model, rows, replace(options, seed=block_seed(options.seed, number)), observe)
        new = [np.empty(0, np.int64) for _ in drafts]
        ended = set()
        for i, row, tokens_l in zip(going, rows, filled, strict=True):
            block_l = tokens_l[row.target_l]
            new[i], has_ended = until_end(block_l, min_length - drawn[i])
            written[i] = np.concatenate([written[i], new[i]])
            drawn[i] += len(block_l)
            if has_ended or drawn[i] == drafts[i].length:
                ended.add(i)
        yield new
        going = [i for i in going if i not in ended]
        observe, number = None, number + 1


def until_end(tokens_l: np.ndarray, min_length: int = 0) -> tuple[np.ndarray, bool]:
    """The tokens up to the end of the text, and whether it has ended; ends before `min_length` are passed over."""
    is_end_l = tokens_l == SpecialToken.EOS
    (ends,) = np.nonzero(is_end_l[max(min_length, 0) :])
    stop = max(min_length, 0) + int(ends[0]) if len(ends) else len(tokens_l)
    return tokens_l[:stop][~is_end_l[:stop]], len(ends) > 0


def block_seed(seed: int, block: int) -> int:
    """Key of the noise of a text's block, counted from 0; that of the first is the seed itself."""
    return (seed + block * _GOLDEN_WORD) % 2**32


def _last(tokens_l: np.ndarray, count: int) -> np.ndarray:
    return tokens_l[max(0, len(tokens_l) - count) :]

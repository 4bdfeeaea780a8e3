"""What may be asked for, and the rows of tokens that it becomes.

A row is what the model was trained on: `BOS` text for texts, `BOS` source `SEP` target for pairs, with gaps where
something is to be written.

Shapes: l length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import numpy as np
import torch

from mdseq.data.format import Kind
from mdseq.data.lengths import LengthTable
from mdseq.data.tokenizer import SpecialToken, Tokenizer
from mdseq.errors import UserError
from mdseq.generate.documents import Blocks, Draft, until_end
from mdseq.generate.rows import Row
from mdseq.generate.template import Template
from mdseq.noise import NoiseKey, Purpose


@dataclass(frozen=True)
class Quantile:
    """Of the lengths of the training data's targets of such a source; a share in [0, 1], 0.5 the median."""

    share: float


Length = int | Quantile | Literal["sampled"]
PREDICTED = Quantile(0.5)


@dataclass(frozen=True)
class Prompt:
    """A text to write.

    Attributes:
        source: The text to continue, or the source of a pair; may be empty.
        length: Tokens to write, the end of the text included: a number, or by the training data's targets of such a
            source, a quantile of their lengths, or a draw from their distribution ("sampled").
        sample_id: Key of the noise; prompts with the same source and another id give another text.
    """

    source: str
    length: Length
    sample_id: int


@dataclass(frozen=True)
class Infill:
    """A text with gaps to fill.

    Attributes:
        template: The kept parts and the gaps.
        sample_id: Key of the noise.
        source: The source of a pair, whose target the template is; nothing for texts.
    """

    template: Template
    sample_id: int
    source: str = ""


@dataclass(frozen=True)
class Job:
    """A prompt as tokens.

    Attributes:
        row: The whole row, or that of the first block.
        text_of: What to make of the tokens of the row when it is filled, or of all that is written in blocks.
        draft: A text that is written in blocks; None for one in one piece.
    """

    row: Row
    text_of: Callable[[np.ndarray], str]
    draft: Draft | None = None

    @property
    def num_tokens(self) -> int:
        """Of the row, or to be written in blocks."""
        return len(self.row) if self.draft is None else self.draft.length


@dataclass(frozen=True)
class PromptEncoder:
    """Makes jobs of prompts.

    Attributes:
        tokenizer: The model's vocabulary.
        kind: What a source is: the text to continue, or one side of a pair.
        lengths: How long the targets of the training data are; None if not known.
    """

    tokenizer: Tokenizer
    kind: Kind
    lengths: LengthTable | None

    def job(self, prompt: Prompt | Infill, seed: int, min_length: int, blocks: Blocks | None) -> Job:
        """The job of a prompt.

        Args:
            prompt: What to write.
            seed: Key of lengths that are drawn.
            min_length: Ends of text among this many first tokens are passed over; not in a gap, which ends where it
                ends.
            blocks: How long texts are cut; None to write every text in one piece.

        Raises:
            UserError: The text is no Unicode, or its length is not known.
        """
        if isinstance(prompt, Infill):
            return self._infill(prompt)
        front_l = self._front(prompt.source)
        length = self._length(prompt, front_l, seed)
        if blocks is not None and blocks.cut(len(front_l), length):
            draft = Draft(front_l, length, prompt.sample_id, self.kind == "pair", blocks)
            return Job(draft.row(np.empty(0, np.int64), 0), self.tokenizer.decode, draft)

        def text_of(tokens_l: np.ndarray) -> str:
            return self.tokenizer.decode(until_end(tokens_l[len(front_l) :], min_length)[0])

        return Job(Row.of([front_l, length], prompt.sample_id, self._source_length(front_l)), text_of)

    def _infill(self, prompt: Infill) -> Job:
        assert self.kind == "pair" or not prompt.source, "texts have no source beside them"
        kept = [part if isinstance(part, int) else self._encode(part) for part in prompt.template.given]
        front_l = self._front(prompt.source)
        parts = [front_l, *kept]
        if self.kind == "pair" and not isinstance(kept[-1], int):  # the target of a pair is whole
            parts.append(np.array([SpecialToken.EOS]))
        starts = accumulate((part if isinstance(part, int) else len(part) for part in parts), initial=0)
        gaps = [slice(start, start + part) for start, part in zip(starts, parts, strict=False) if isinstance(part, int)]

        def text_of(tokens_l: np.ndarray) -> str:
            return prompt.template.filled([self.tokenizer.decode(until_end(tokens_l[gap])[0]) for gap in gaps])

        return Job(Row.of(parts, prompt.sample_id, self._source_length(front_l)), text_of)

    def _length(self, prompt: Prompt, front_l: np.ndarray, seed: int) -> int:
        if isinstance(prompt.length, int):
            return prompt.length
        if self.lengths is None:
            raise UserError("the model does not know how long the texts of its training data are; give a length")
        if isinstance(prompt.length, Quantile):
            return self.lengths.at(front_l, prompt.length.share)
        assert prompt.length == "sampled"
        key = NoiseKey(seed, 0, torch.tensor([prompt.sample_id]))
        return self.lengths.at(front_l, key.uniform(Purpose.LENGTH, 1).item())

    def _front(self, source: str) -> np.ndarray:
        end = [SpecialToken.SEP] if self.kind == "pair" else []
        return np.concatenate([[SpecialToken.BOS], self._encode(source), end]).astype(np.int64)

    def _source_length(self, front_l: np.ndarray) -> int:
        return len(front_l) if self.kind == "pair" else 0

    def _encode(self, text: str) -> np.ndarray:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"{text[:60]!r} holds half a character (a lone surrogate); give valid Unicode") from None
        return self.tokenizer.encode(text)

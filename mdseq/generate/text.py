"""Text in, text out: prompts become rows, rows become text.

Shapes: b batch, l length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mdseq.data.format import Kind
from mdseq.data.tokenizer import SpecialToken, Tokenizer
from mdseq.diffusion.denoising import DiffusionModel
from mdseq.generate.sampler import SamplerOptions, sample
from mdseq.sparse import Documents


@dataclass(frozen=True)
class Prompt:
    """What to write.

    Attributes:
        source: The text to continue, or the source of a pair; may be empty.
        length: Tokens to generate, the end of the text included.
        sample_id: Key of the noise; prompts with the same source and another id give another text.
    """

    source: str
    length: int
    sample_id: int


@dataclass(frozen=True)
class TextGenerator:
    """A denoiser with what stands between it and text."""

    model: DiffusionModel
    tokenizer: Tokenizer
    kind: Kind

    def generate(self, prompts: Sequence[Prompt], options: SamplerOptions) -> list[str]:
        """The text written for each prompt, up to its end-of-text token; one batch."""
        sources = [self._source_tokens(prompt.source) for prompt in prompts]
        lengths = [len(source) + prompt.length for source, prompt in zip(sources, prompts, strict=True)]
        shape = (len(prompts), max(lengths))
        tokens_bl = torch.full(shape, int(SpecialToken.PAD))
        target_bl = torch.zeros(shape, dtype=torch.bool)
        for b, (source, length) in enumerate(zip(sources, lengths, strict=True)):
            tokens_bl[b, : len(source)] = torch.from_numpy(source)
            target_bl[b, len(source) : length] = True

        device = self.model.m_z.device
        samples = sample(
            self.model,
            tokens_bl.to(device),
            target_bl.to(device),
            Documents.whole(torch.tensor(lengths, device=device), shape[1]),
            torch.tensor([prompt.sample_id for prompt in prompts], device=device),
            options,
        )
        return [
            self._decode(row[len(source) : length])
            for row, source, length in zip(samples.tokens_bl.cpu(), sources, lengths, strict=True)
        ]

    def _source_tokens(self, source: str) -> np.ndarray:
        end = [SpecialToken.SEP] if self.kind == "pair" else []
        return np.concatenate([[SpecialToken.BOS], self.tokenizer.encode(source), end]).astype(np.int64)

    def _decode(self, tokens: Tensor) -> str:
        ids = tokens.tolist()
        if SpecialToken.EOS in ids:
            ids = ids[: ids.index(SpecialToken.EOS)]
        return self.tokenizer.decode(ids)

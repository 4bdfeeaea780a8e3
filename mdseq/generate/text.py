"""Text in, text out: prompts to texts, with the weights of a run.

generator = TextGenerator.load(Path("runs/mine"))
generator.generate([Prompt("It was a dark", length=128, sample_id=0)], SamplerOptions())
"""

from __future__ import annotations

import codecs
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from mdseq.data.format import Kind
from mdseq.data.lengths import LengthTable
from mdseq.data.tokenizer import Tokenizer
from mdseq.diffusion.denoising import DiffusionModel
from mdseq.engine.checkpoint import find_model
from mdseq.generate.documents import Blocks, write_blocks
from mdseq.generate.prompts import Infill, Job, Prompt, PromptEncoder
from mdseq.generate.rerank import EmbeddingCosine, Utility, bleu, rouge
from mdseq.generate.rows import Observe, Row, by_length, fill
from mdseq.generate.sampler import SamplerOptions
from mdseq.model.saved import SavedModel, load_model

# Prompts that are sorted by length together, in batches.
WINDOW_BATCHES = 16


class LongRowWarning(UserWarning):
    """A row is longer than those that the model was trained on."""


@dataclass(frozen=True)
class TextGenerator:
    """A denoiser with what stands between it and text.

    Attributes:
        model: Trained weights and their process.
        tokenizer: Their vocabulary.
        kind: What a source is: the text to continue, or one side of a pair.
        row_length: Tokens of a training row; None if not known: every text is written in one piece.
        lengths: How long the targets of the training data are; None if not known.
    """

    model: DiffusionModel
    tokenizer: Tokenizer
    kind: Kind
    row_length: int | None = None
    lengths: LengthTable | None = None

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> TextGenerator:
        """The averaged weights of a run's newest whole checkpoint, or of a model folder.

        Raises:
            UserError: There are none.
        """
        return cls.of(load_model(find_model(folder), device))

    @classmethod
    def of(cls, saved: SavedModel) -> TextGenerator:
        config = saved.config
        lengths = LengthTable.from_dict(config.lengths)
        tokenizer = Tokenizer.load(saved.tokenizer_path)
        return cls(DiffusionModel.of(saved), tokenizer, config.document_kind, config.row_length, lengths)

    def generate(
        self,
        prompts: Sequence[Prompt | Infill],
        options: SamplerOptions,
        batch_size: int = 8,
        min_length: int = 0,
        blocks: Blocks | None = None,
    ) -> list[str]:
        """The texts of all prompts, in their order; see `stream`."""
        texts = dict(self.stream(prompts, options, batch_size, min_length, blocks))
        return [texts[index] for index in range(len(prompts))]

    def stream(
        self,
        prompts: Iterable[Prompt | Infill],
        options: SamplerOptions,
        batch_size: int = 8,
        min_length: int = 0,
        blocks: Blocks | None = None,
    ) -> Iterator[tuple[int, str]]:
        """Write texts, batch by batch.

        Args:
            prompts: What to write; read as far as the next few batches need.
            options: Solver, calls, seed.
            batch_size: Texts at a time; it does not change them.
            min_length: Ends of text among this many first tokens are passed over.
            blocks: How long texts are cut; by default, as the row length asks for.

        Yields:
            The index of a prompt, and what was written up to the end of the text: for an infill, the whole text with
            its gaps filled, for others what comes after the source. Of a few batches, the longest rows come first.

        Raises:
            UserError: A prompt makes no sense.

        Warns:
            LongRowWarning: For every row that is longer than those of the training.
        """
        numbered = enumerate(prompts)
        while window := list(islice(numbered, batch_size * WINDOW_BATCHES)):
            jobs = [(index, self._job(prompt, options, min_length, blocks)) for index, prompt in window]
            for write, some in (
                (self._write_whole, [item for item in jobs if item[1].draft is None]),
                (self._write_blocks, [item for item in jobs if item[1].draft is not None]),
            ):
                for batch in by_length(some, lambda item: item[1].num_tokens, batch_size):
                    numbers, batched = zip(*batch, strict=True)
                    yield from zip(numbers, write(batched, options, min_length), strict=True)

    def write(
        self,
        prompt: Prompt | Infill,
        options: SamplerOptions,
        min_length: int = 0,
        blocks: Blocks | None = None,
        observe: Callable[[Row], Observe] | None = None,
    ) -> Iterator[str]:
        """One text, as `stream` writes it, in pieces: a long one comes block after block.

        Args:
            observe: Told the first row, gives what is called with the state of each of its calls.
        """
        job = self._job(prompt, options, min_length, blocks)
        observer = observe(job.row) if observe else None
        if job.draft is None:
            (tokens_l,) = fill(self.model, [job.row], options, observer)
            yield job.text_of(tokens_l)
            return
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a block may end within a character
        for (new_l,) in write_blocks(self.model, [job.draft], options, min_length, observer):
            yield decoder.decode(self.tokenizer.decode_bytes(new_l))
        yield decoder.decode(b"", final=True)

    def utility(self, name: Literal["bleu", "rouge", "embedding"]) -> Utility:
        """What candidates are compared by (`mdseq/generate/rerank.py`)."""
        if name == "embedding":
            return EmbeddingCosine(self.tokenizer, self.model.denoiser)
        return {"bleu": bleu, "rouge": rouge}[name]

    def _job(self, prompt: Prompt | Infill, options: SamplerOptions, min_length: int, blocks: Blocks | None) -> Job:
        if blocks is None and self.row_length is not None:
            blocks = Blocks.of(self.row_length)
        encoder = PromptEncoder(self.tokenizer, self.kind, self.lengths)
        job = encoder.job(prompt, options.seed, min_length, blocks)
        if self.row_length is not None and len(job.row) > self.row_length:
            warnings.warn(
                f"a row of {len(job.row):,} tokens is longer than the {self.row_length:,} of the training",
                LongRowWarning,
                stacklevel=2,
            )
        return job

    def _write_whole(self, jobs: Sequence[Job], options: SamplerOptions, min_length: int) -> list[str]:
        filled = fill(self.model, [job.row for job in jobs], options)
        return [job.text_of(tokens_l) for job, tokens_l in zip(jobs, filled, strict=True)]

    def _write_blocks(self, jobs: Sequence[Job], options: SamplerOptions, min_length: int) -> list[str]:
        drafts = [job.draft for job in jobs if job.draft is not None]
        blocks = zip(*write_blocks(self.model, drafts, options, min_length), strict=True)
        return [job.text_of(np.concatenate(of_text)) for job, of_text in zip(jobs, blocks, strict=True)]

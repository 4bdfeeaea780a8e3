"""How `mdseq generate` carries out what it is asked for."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from mdseq.cli.generate import DEFAULT_LENGTH, fills, infill_key
from mdseq.cli.progress import progress
from mdseq.cli.requests import Requests
from mdseq.cli.results import Results
from mdseq.generate.documents import Blocks
from mdseq.generate.prompts import PREDICTED, Infill, Length, Prompt, Quantile
from mdseq.generate.rerank import best_of
from mdseq.generate.rows import Row
from mdseq.generate.sampler import SamplerOptions
from mdseq.generate.template import Template
from mdseq.generate.text import LongRowWarning, TextGenerator
from mdseq.generate.tracing import TraceRecorder
from mdseq.model.saved import SavedModel
from mdseq.report.trace import write_trace


class Writing:
    """Requests become prompts, and texts become lines.

    Text number n is the (n mod --num)-th of record n // --num; its candidate c has the sample id n * --candidates + c.
    """

    def __init__(self, options: argparse.Namespace, requests: Requests, saved: SavedModel) -> None:
        config = saved.config
        self.options = options
        self.records = requests.records
        self.num_texts = len(self.records) * options.num
        generator = TextGenerator.of(saved)
        model = generator.model
        self.generator = replace(generator, model=replace(model, reading=options.estimate or model.reading))
        self.sampler = SamplerOptions(
            num_calls=options.steps,
            solver=options.solver,
            time_grid=options.time_grid,
            seed=options.seed,
            temperature=options.temperature,
            guidance=options.guidance,
            clamp=options.clamp,
            threshold=options.threshold,
            absorb=options.absorb,
            patience=options.patience,
            confidence=options.confidence,
        )
        self.blocks = Blocks.of(config.row_length, options.block, options.context)
        length: Any = options.length or ("predicted" if config.document_kind == "pair" else DEFAULT_LENGTH)
        predicted = PREDICTED if options.length_quantile is None else Quantile(options.length_quantile)
        self.length: Length = predicted if length == "predicted" else length
        self.has_source = config.document_kind == "pair" or not fills(options)
        self.templates = (
            [Template.parse(record[infill_key(options)], options.gap_marker) for record in self.records]
            if fills(options)
            else None
        )

    def print_one(self) -> None:
        """The only text, as it comes."""
        for piece in self._first():
            print(piece, end="", flush=True)
        print()
        if self.options.trace is not None:
            self._write_trace()

    def trace_first(self) -> None:
        """Write the first text once more, or its first block, and show how it came about."""
        next(self._first())
        self._write_trace()

    def write_all(self, results: Results) -> None:
        """All texts that are not there yet."""
        options = self.options
        with results:
            missing = [number for number in range(self.num_texts) if number not in results.done]
            if results.done:
                print(f"{results.state()}; going on", file=sys.stderr)
            prompts = (self._prompt(n, candidate) for n in missing for candidate in range(options.candidates))
            written = self.generator.stream(prompts, self.sampler, options.batch_size, options.min_length, self.blocks)
            if options.candidates > 1:
                written = best_of(written, options.candidates, self.generator.utility(options.select))
            with progress("texts", self.num_texts - len(missing), self.num_texts, options.output is None) as advance:
                for index, text in written:
                    results.add(missing[index], text)
                    advance()
            results.finish()

    def line(self, number: int, text: str) -> str:
        """A text with its record."""
        record = self.records[number // self.options.num] | {"generated": text}
        line = json.dumps(record, ensure_ascii=False)
        try:
            line.encode()
        except UnicodeEncodeError:  # half a character somewhere in the record
            return json.dumps(record)
        return line

    def page(self, number: int, text: str) -> str:
        """One of several texts, for people."""
        return text if self.num_texts == 1 else f"--- {number + 1} of {self.num_texts}\n{text}"

    def _prompt(self, number: int, candidate: int) -> Prompt | Infill:
        index = number // self.options.num
        sample_id = number * self.options.candidates + candidate
        source = self.records[index][self.options.source_key] if self.has_source else ""
        if self.templates is None:
            return Prompt(source, self.length, sample_id)
        return Infill(self.templates[index], sample_id, source)

    def _first(self) -> Iterator[str]:
        """The first text in pieces; its calls are recorded if they are to be shown."""
        observe = None if self.options.trace is None else self._record
        return self.generator.write(self._prompt(0, 0), self.sampler, self.options.min_length, self.blocks, observe)

    def _record(self, row: Row) -> TraceRecorder:
        self._recorder = TraceRecorder(self.generator.tokenizer, row)
        return self._recorder

    def _write_trace(self) -> None:
        options = self.options
        title = f"{options.run}, {options.steps} calls of {options.solver}, seed {options.seed}"
        write_trace(self._recorder.trace(title), options.trace)


@contextmanager
def one_warning() -> Iterator[None]:
    """Of rows that are longer than what was trained on, one is told about."""

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        print(f"warning: {message}", file=sys.stderr)
        if issubclass(category, LongRowWarning):
            warnings.simplefilter("ignore", LongRowWarning)

    with warnings.catch_warnings():
        warnings.simplefilter("always", LongRowWarning)
        warnings.showwarning = show
        yield

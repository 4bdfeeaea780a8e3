"""`mdseq evaluate likelihood RUN --data DIR`: how good a trained model is."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdseq.cli.arguments import ESTIMATES, PROCESSES, at_least, seed
from mdseq.cli.progress import progress
from mdseq.cli.results import require_writable
from mdseq.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from mdseq.evaluate.likelihood import Likelihood

DEFAULT_SAMPLES = 16


def add_command(commands: Any) -> None:
    command = commands.add_parser("evaluate", help="how good a trained model is")
    subjects = command.add_subparsers(required=True, metavar="SUBJECT")
    command = subjects.add_parser(
        "likelihood", help="bound on nats per token, bits per byte and perplexity of a dataset"
    )
    command.set_defaults(command=likelihood)
    command.add_argument("run", type=Path, metavar="RUN", help="run folder, or a model folder inside a checkpoint")
    command.add_argument("--data", type=Path, required=True, metavar="DIR", help="a dataset with the run's vocabulary")
    command.add_argument("--split", choices=("train", "valid", "test"), default="valid", help="default: valid")
    command.add_argument(
        "--documents", type=at_least(1), metavar="N", help="spread evenly over the split; default: all of it"
    )
    command.add_argument(
        "--samples",
        type=at_least(1),
        default=DEFAULT_SAMPLES,
        metavar="N",
        help=f"denoiser calls for each row; default {DEFAULT_SAMPLES}",
    )
    command.add_argument(
        "--estimate",
        choices=ESTIMATES,
        help="what the denoiser's output is taken for, see docs/likelihood.md; default: what it was trained as",
    )
    command.add_argument(
        "--process",
        choices=PROCESSES,
        help="what takes the targets away, see docs/likelihood.md; default: absorbing for a model trained with "
        "diffusion.gamma=1 and diffusion.absorbing_schedule=uniform, noise for others",
    )
    command.add_argument("--batch_size", type=at_least(1), default=8, metavar="N", help="rows at a time; default 8")
    command.add_argument("--seed", type=seed, default=0, metavar="N", help="default 0")
    command.add_argument("--output", type=Path, metavar="JSON", help="write the numbers there too")


def likelihood(options: argparse.Namespace) -> None:
    if options.output is not None:  # before the work, not after it
        require_writable(options.output)

    from rich.console import Console

    from mdseq.cli.weights import load_run
    from mdseq.evaluate.likelihood import LikelihoodOptions, Scorer

    saved = load_run(options.run)
    how = LikelihoodOptions(
        options.documents, options.estimate, options.process, options.samples, options.batch_size, options.seed
    )
    scorer = Scorer.of(saved, options.data, options.split, how)
    with progress("rows", 0, len(scorer.rows), beside_text=False) as advance:
        found = scorer.score(advance)
    if options.output is not None:
        what = {
            "run": str(options.run),
            "step": saved.config.step,
            "data": str(options.data),
            "dataset_fingerprint": scorer.corpus.manifest.fingerprint,
            "split": options.split,
            "estimate": scorer.model.reading,
            "samples": options.samples,
            "seed": options.seed,
        }
        _write(options.output, json.dumps(what | found.to_dict(), indent=2) + "\n")
    title = f"{options.run} at step {saved.config.step:,}, {options.split} of {options.data}"
    Console(width=None if Console().is_terminal else 110).print(_table(title, found))


def _table(title: str, found: Likelihood) -> Table:
    from rich.table import Table

    table = Table("at most", "", "standard error", title=title, title_justify="left")
    terms = [("  prior", found.prior), ("  reconstruction", found.reconstruction), ("  denoising", found.denoising)]
    for name, measure in (
        ("nats per token", found.nats_per_token),
        *(terms if found.process == "noise" else []),
        ("bits per byte", found.bits_per_byte),
        ("perplexity", found.perplexity),
    ):
        error = "" if measure.standard_error is None else _number(measure.standard_error)
        table.add_row(name, _number(measure.value), error)
    counts = f"{found.documents:,} documents, {found.tokens:,} target tokens, {found.text_bytes:,} bytes"
    table.caption, table.caption_justify = counts, "left"
    return table


def _number(value: float) -> str:
    return f"{value:,.4f}" if abs(value) < 1e6 else f"{value:.3e}"


def _write(path: Path, text: str) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"cannot write --output {path}: {error.strerror}") from None

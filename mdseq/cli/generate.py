"""`mdseq generate RUN`: write text with a run's newest averaged weights.

docs/generation.md shows what may be asked for.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdseq.cli.arguments import ESTIMATES, at_least, number_between, seed
from mdseq.cli.requests import Requests
from mdseq.cli.results import FileResults, PrintedResults, require_writable
from mdseq.cli.weights import load_run
from mdseq.errors import UserError

if TYPE_CHECKING:
    from mdseq.model.saved import ModelConfig, SavedModel

DEFAULT_LENGTH = 128
SOLVERS = ("ddpm", "ddim", "dpm_2s", "dpm_2m", "dpm_3m", "dpm_2m_sde", "mask_predict")
TIME_GRIDS = ("uniform", "log_snr", "quadratic")
# What does not change the texts, or is told apart by more than its name.
NO_SETTINGS = {"command", "run", "input", "output", "batch_size", "trace"}


def add_command(commands: Any) -> None:
    command = commands.add_parser("generate", help="write text with a run's newest averaged weights")
    command.set_defaults(command=generate)
    command.add_argument("run", type=Path, metavar="RUN", help="run folder, or a model folder inside a checkpoint")

    group = command.add_argument_group("what to write")
    group.add_argument("--source", metavar="TEXT", help="text to continue, or source of a pair; default: nothing")
    group.add_argument("--infill", metavar="TEXT", help="text with gaps: 'The king [[8]] home' has one of 8 tokens")
    group.add_argument("--gap_marker", default="[[N]]", metavar="MARK", help="how gaps are written; default: [[N]]")
    group.add_argument("--input", type=Path, metavar="JSONL", help="one object a line, its source under --source_key")
    group.add_argument("--source_key", default="src", metavar="KEY", help="default: src")
    group.add_argument("--infill_key", metavar="KEY", help="fill the gaps of the texts under this key of --input")
    group.add_argument("--num", type=at_least(1), default=1, metavar="N", help="texts for each source; default 1")

    group = command.add_argument_group("how long")
    group.add_argument(
        "--length",
        type=_length,
        metavar="N|predicted|sampled",
        help="tokens, the end of the text included; as the training data's for such a source, or drawn from its "
        f"distribution; default: predicted for pairs, {DEFAULT_LENGTH} for texts",
    )
    group.add_argument(
        "--length_quantile",
        type=number_between(0, 1),
        metavar="Q",
        help="which quantile of the training data's lengths is predicted; default 0.5: the median",
    )
    group.add_argument(
        "--min_length", type=at_least(0), default=0, metavar="N", help="pass over ends of text before this; default 0"
    )
    group.add_argument(
        "--block",
        type=at_least(1),
        metavar="N",
        help="tokens of a long text that are written at a time; default: half a training row",
    )
    group.add_argument(
        "--context",
        type=at_least(1),
        metavar="N",
        help="tokens before a block that the model sees; default: half a training row",
    )

    group = command.add_argument_group("how")
    group.add_argument("--steps", type=at_least(1), default=20, metavar="N", help="denoiser calls; default 20")
    group.add_argument(
        "--solver", choices=SOLVERS, help="default: mask_predict for a model that was trained for it, or dpm_2m"
    )
    group.add_argument(
        "--time_grid",
        choices=TIME_GRIDS,
        default="uniform",
        help="how the calls are spread over time; default: uniform",
    )
    group.add_argument(
        "--estimate",
        choices=ESTIMATES,
        help="what the denoiser's output is taken for, see docs/likelihood.md; default: what it was trained as",
    )
    group.add_argument(
        "--temperature",
        type=number_between(0),
        default=1.0,
        metavar="X",
        help="factor of all noise: below 1, texts are likelier and less varied; default 1",
    )
    group.add_argument(
        "--guidance",
        type=number_between(0),
        default=1.0,
        metavar="W",
        help="weight of the source, if diffusion.condition_dropout was trained; twice the work; default 1: none",
    )
    group.add_argument("--clamp", action="store_true", help="round every estimate to its nearest embedding")
    group.add_argument(
        "--threshold",
        type=number_between(0, 1, least_allowed=False),
        default=1.0,
        metavar="Q",
        help="scale down what exceeds this quantile of an estimate, such as 0.995; default 1: nothing",
    )
    group.add_argument("--absorb", action="store_true", help="replace some tokens by the absorbing state at each step")
    group.add_argument(
        "--patience",
        type=at_least(0),
        default=0,
        metavar="N",
        help="stop when no token has changed for N calls; default 0: make all calls",
    )
    group.add_argument(
        "--confidence",
        type=number_between(0, 1),
        default=0.0,
        metavar="P",
        help="and, with --patience, when each token has at least this probability; default 0",
    )
    group.add_argument("--seed", type=seed, default=0, metavar="N", help="default 0")
    group.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="of the denoiser's layers; bf16 is for GPUs, and as precise as training in it; default: fp32",
    )
    group.add_argument("--batch_size", type=at_least(1), default=8, metavar="N", help="texts at a time; default 8")

    group = command.add_argument_group("which")
    group.add_argument(
        "--candidates", type=at_least(1), default=1, metavar="N", help="write N and keep the best; default 1"
    )
    group.add_argument(
        "--select",
        choices=("bleu", "rouge", "embedding"),
        default="bleu",
        help="the best is closest to the others by sentence BLEU, ROUGE-L (slow for long texts), or the cosine of mean "
        "token embeddings; default: bleu",
    )

    group = command.add_argument_group("where to")
    group.add_argument(
        "--output", type=Path, metavar="JSONL", help="can be interrupted and continued; default: standard output"
    )
    group.add_argument(
        "--trace", type=Path, metavar="FILE", help="show how the first text came about: .html, .gif or .png"
    )


def _length(text: str) -> int | str:
    return text if text in ("predicted", "sampled") else at_least(1)(text)


def generate(options: argparse.Namespace) -> None:
    requests = _requests(options)
    if options.trace is not None:
        from mdseq.report.trace import check_trace_path

        check_trace_path(options.trace)
    for path in (options.output, options.trace):
        if path is not None:
            require_writable(path)
    saved = load_run(options.run, options.precision)
    _check_model(options, requests, saved.config)

    from mdseq.cli.writing import Writing, one_warning
    from mdseq.diffusion.denoising import DiffusionModel
    from mdseq.generate.sampler import usual_solver

    options.solver = options.solver or usual_solver(DiffusionModel.of(saved))

    writing = Writing(options, requests, saved)
    with one_warning():
        if options.output is None and options.input is None and options.num == options.candidates == 1:
            writing.print_one()
            return
        if options.output is None:
            writing.write_all(PrintedResults(writing.line if options.input else writing.page))
        else:
            settings = _settings(options, requests, saved)
            results = FileResults(options.output, settings, writing.num_texts, writing.line)
            try:
                writing.write_all(results)
            except KeyboardInterrupt:
                print(f"{results.state()}; the same command goes on from there", file=sys.stderr)
                raise
        if options.trace is not None:  # last, so that a command that goes on does not find it
            writing.trace_first()


def _requests(options: argparse.Namespace) -> Requests:
    """What the command line asks for, as far as that can be told without the model."""
    if options.input is not None:
        if options.source is not None or options.infill is not None:
            raise UserError("--input holds the sources and the texts with gaps; leave out --source and --infill")
        key, option = (
            (options.infill_key, "--infill_key") if options.infill_key else (options.source_key, "--source_key")
        )
        requests = Requests.read(options.input, key, option)
    else:
        if options.infill_key is not None:
            raise UserError("--infill_key is a key of --input; give --input, or the text itself as --infill")
        record = {options.source_key: options.source or ""}
        requests = Requests.one(record if options.infill is None else record | {infill_key(options): options.infill})
    if fills(options):
        given = [f"--{name}" for name in ("length", "min_length", "block", "context") if getattr(options, name)]
        given += ["--length_quantile"] if options.length_quantile is not None else []
        if given:
            raise UserError(f"gaps have the lengths that they are marked with; leave out {', '.join(given)}")
    elif options.length_quantile is not None and options.length not in (None, "predicted"):
        raise UserError(f"--length_quantile is of predicted lengths; leave out --length {options.length}")
    if options.trace is not None and options.candidates > 1:
        raise UserError("--trace shows one text, and --candidates writes several; leave out one of them")
    return requests


def fills(options: argparse.Namespace) -> bool:
    """Whether gaps are to be filled."""
    return options.infill is not None or options.infill_key is not None


def infill_key(options: argparse.Namespace) -> str:
    """Key of the text with gaps in every record."""
    return options.infill_key or "infill"


def _check_model(options: argparse.Namespace, requests: Requests, config: ModelConfig) -> None:
    """What only the model can tell."""
    if options.guidance != 1 and not config.condition_dropout:
        raise UserError(
            f"--guidance {options.guidance:g} needs a model that was trained to do without its source, and this one "
            "was not: train with diffusion.condition_dropout=0.1, or leave --guidance out"
        )
    if options.absorb and not config.gamma:
        raise UserError("--absorb needs a model with an absorbing state, and this one has none; leave it out")
    if options.length_quantile is not None and options.length is None and config.document_kind == "text":
        raise UserError("--length_quantile is of predicted lengths; give --length predicted as well")
    if not fills(options):
        return
    if config.document_kind == "pair":
        requests.require(options.source_key, "--source_key")
    elif options.source:
        raise UserError("the model is one of texts, which have no source beside them; put it into --infill")


def _settings(options: argparse.Namespace, requests: Requests, saved: SavedModel) -> dict[str, str]:
    """All that decides the texts."""
    asked = {name: value for name, value in vars(options).items() if name not in NO_SETTINGS and value is not None}
    return {
        "the model": f"that of step {saved.config.step} with weights of SHA-256 {saved.digest()[:16]}",
        "the input": requests.fingerprint,
        **{f"--{name}": str(value) for name, value in asked.items()},
    }

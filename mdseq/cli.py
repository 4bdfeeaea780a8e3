"""`mdseq generate RUN`, `mdseq report RUN`, `mdseq inspect attention SPEC`: what one does besides training.

Exit status: 0 done, 2 a mistake of the user (one message, no traceback), 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdseq.errors import UserError, exit_status

if TYPE_CHECKING:
    from mdseq.model.saved import SavedModel

DEFAULT_LENGTH = 128


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    return exit_status(lambda: options.command(options), "interrupted")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mdseq", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("generate", help="write text with a run's newest averaged weights")
    command.set_defaults(command=_generate)
    command.add_argument("run", type=Path, metavar="RUN", help="run folder, or a model folder inside a checkpoint")
    given = command.add_mutually_exclusive_group()
    given.add_argument("--source", default="", metavar="TEXT", help="text to continue, or source of a pair")
    given.add_argument("--input", type=Path, metavar="JSONL", help="one object a line, its source under --source_key")
    command.add_argument("--source_key", default="src", metavar="KEY", help="default: src")
    command.add_argument("--output", type=Path, metavar="JSONL", help="default: standard output")
    command.add_argument("--num", type=_at_least(1), default=1, metavar="N", help="texts per source; default 1")
    command.add_argument(
        "--length", type=_at_least(1), default=DEFAULT_LENGTH, metavar="N", help=f"tokens; default {DEFAULT_LENGTH}"
    )
    command.add_argument("--steps", type=_at_least(1), default=20, metavar="N", help="denoiser calls; default 20")
    command.add_argument(
        "--solver", choices=("dpm_2m", "ddpm"), default="dpm_2m", help="default: dpm_2m (DPM-Solver++)"
    )
    command.add_argument("--clamp", action="store_true", help="round every estimate to its nearest embedding")
    command.add_argument("--seed", type=_at_least(0), default=0, metavar="N", help="default 0")
    command.add_argument("--batch_size", type=_at_least(1), default=8, metavar="N", help="texts at a time; default 8")

    command = commands.add_parser("report", help="summary of a run and a PNG of its curves")
    command.set_defaults(command=_report)
    command.add_argument("run", type=Path, metavar="RUN")

    command = commands.add_parser("inspect", help="what a spec means, before it is run")
    subjects = command.add_subparsers(required=True, metavar="SUBJECT")
    command = subjects.add_parser("attention", help="masks, receptive field and cost of each layer; a table and a PNG")
    command.set_defaults(command=_inspect_attention)
    command.add_argument("spec", type=Path, metavar="SPEC", help="a TOML file, the name of a preset, or a run folder")
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the spec")
    row = command.add_mutually_exclusive_group()
    row.add_argument("--length", type=_at_least(1), metavar="N", help="tokens of the row; default data.row_length")
    row.add_argument("--documents", type=_lengths, metavar="N,N,...", help="tokens of each of several documents in it")
    command.add_argument(
        "--output",
        type=Path,
        metavar="PNG",
        help="default: attention.png in the run folder, or SPEC-attention.png here",
    )
    return parser


def _at_least(least: int) -> Any:
    def integer(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is not allowed; give {least} or more")
        return value

    return integer


def _lengths(text: str) -> list[int]:
    return [_at_least(1)(part) for part in text.split(",")]


def _generate(options: argparse.Namespace) -> None:
    import torch

    from mdseq.data.tokenizer import Tokenizer
    from mdseq.diffusion.denoising import DiffusionModel
    from mdseq.generate.sampler import SamplerOptions
    from mdseq.generate.text import Prompt, TextGenerator

    records = (
        _read_records(options.input, options.source_key) if options.input else [{options.source_key: options.source}]
    )
    prompts = [
        (record, Prompt(record[options.source_key], options.length, sample_id=i * options.num + k))
        for i, record in enumerate(records)
        for k in range(options.num)
    ]
    saved = _load(options.run, "cuda" if torch.cuda.is_available() else "cpu")
    if options.steps > saved.config.num_timesteps:
        raise UserError(
            f"--steps {options.steps} is not allowed: the model has {saved.config.num_timesteps} timesteps; "
            f"give 1 to {saved.config.num_timesteps}"
        )
    generator = TextGenerator(
        DiffusionModel.of(saved), Tokenizer.load(saved.tokenizer_path), saved.config.document_kind
    )
    sampler = SamplerOptions(options.steps, options.solver, seed=options.seed, clamp=options.clamp)
    as_text = options.input is None and options.output is None
    with _opened_output(options.output) as output:
        for start in range(0, len(prompts), options.batch_size):
            batch = prompts[start : start + options.batch_size]
            texts = generator.generate([prompt for _, prompt in batch], sampler)
            for (record, prompt), text in zip(batch, texts, strict=True):
                line = json.dumps(record | {"generated": text}, ensure_ascii=False)
                if as_text:
                    line = text if len(prompts) == 1 else f"--- {prompt.sample_id + 1} of {len(prompts)}\n{text}"
                print(line, file=output, flush=True)


def _load(run: Path, device: str) -> SavedModel:
    from mdseq.engine.checkpoint import whole_checkpoints
    from mdseq.model.saved import CONFIG_FILE, load_model

    if (run / CONFIG_FILE).is_file():
        return load_model(run, device)
    if not run.is_dir():
        raise UserError(f"no run folder at {run}; give one that training made, such as runs/quickstart")
    checkpoints = whole_checkpoints(run / "checkpoints")
    if not checkpoints:
        raise UserError(f"{run} has no whole checkpoint; train it first, or give another folder")
    return load_model(checkpoints[-1][0] / "model", device)


def _read_records(path: Path, key: str) -> list[dict[str, Any]]:
    """The objects of a JSONL file, each with a string under `key`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --input {path}: {error}") from None
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(record, dict) or not isinstance(record.get(key), str):
            raise UserError(f"{path}, line {number} has no text under {key!r}; name the key with --source_key")
        records.append(record)
    return records


@contextmanager
def _opened_output(path: Path | None) -> Iterator[Any]:
    if path is None:
        yield sys.stdout
        return
    try:
        file = path.open("x", encoding="utf-8")
    except FileExistsError:
        raise UserError(f"--output {path} exists and is never overwritten; remove it, or choose another") from None
    except OSError as error:
        raise UserError(f"cannot write --output {path}: {error.strerror}") from None
    with file:
        yield file


def _report(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from mdseq.report.metrics import read_metrics
    from mdseq.report.plots import plot_run

    metrics = read_metrics(options.run)
    if not metrics:
        raise UserError(f"{options.run} has no metrics; give the folder of a run that has logged a step")
    first, last = metrics[0], metrics[-1]
    png = options.run / "report.png"
    plot_run(metrics, str(options.run), png)
    table = Table(title=str(options.run), show_header=False, title_justify="left")
    table.add_row("steps", f"{last['step']:,}")
    table.add_row("tokens", f"{last['tokens']:,}")
    table.add_row("loss", f"{first['loss']:.4f} at step {first['step']:,}, {last['loss']:.4f} at the end")
    rates = [line["tokens_per_second"] for line in metrics if line["tokens_per_second"]]
    if rates:
        table.add_row("tokens per second", f"{sorted(rates)[len(rates) // 2]:,.0f} (median)")
    if last["expert_load"]:
        busiest = max(max(load_e) * len(load_e) for load_e in last["expert_load"])
        table.add_row("busiest expert", f"{busiest:.2f} times an even share")
    table.add_row("curves", str(png))
    Console().print(table)


def _inspect_attention(options: argparse.Namespace) -> None:
    from mdseq.spec import load_spec

    run_spec = options.spec / "spec.toml"
    spec = load_spec(run_spec if run_spec.is_file() else options.spec, options.overrides).spec
    output = options.output
    if output is None:
        output = options.spec / "attention.png" if run_spec.is_file() else Path(f"{options.spec.stem}-attention.png")
    elif output.exists():
        raise UserError(f"--output {output} exists and is never overwritten; remove it, or choose another")

    from rich.console import Console

    from mdseq.model.denoiser import DenoiserConfig
    from mdseq.report.attention import AttentionRow, attention_table, packed
    from mdseq.report.attention_plot import plot_attention

    config = DenoiserConfig.of(spec, vocab_size=1)
    documents = packed(options.documents or [options.length or spec.data.row_length])
    row = AttentionRow(
        title=options.spec.resolve().name if run_spec.is_file() else options.spec.stem,
        patterns=config.patterns,
        documents=documents.marked(documents.position_bl < config.num_source_global),
        num_global=config.num_global,
        num_heads=config.num_heads,
        head_dim=config.hidden_dim // config.num_heads,
    )
    try:
        plot_attention(row, output)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}; choose another --output") from None
    Console(width=None if Console().is_terminal else 110).print(attention_table(row))
    print(f"masks and receptive field: {output}")

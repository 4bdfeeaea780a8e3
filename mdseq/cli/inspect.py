"""`mdseq inspect attention SPEC`: what a spec means, before it is run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mdseq.cli.arguments import at_least, lengths
from mdseq.errors import UserError


def add_command(commands: Any) -> None:
    command = commands.add_parser("inspect", help="what a spec means, before it is run")
    subjects = command.add_subparsers(required=True, metavar="SUBJECT")
    command = subjects.add_parser("attention", help="masks, receptive field and cost of each layer; a table and a PNG")
    command.set_defaults(command=inspect_attention)
    command.intermixed = True
    command.add_argument("spec", type=Path, metavar="SPEC", help="a TOML file, the name of a preset, or a run folder")
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the spec")
    row = command.add_mutually_exclusive_group()
    row.add_argument("--length", type=at_least(1), metavar="N", help="tokens of the row; default data.row_length")
    row.add_argument("--documents", type=lengths, metavar="N,N,...", help="tokens of each of several documents in it")
    command.add_argument(
        "--output",
        type=Path,
        metavar="PNG",
        help="default: attention.png in the run folder, or SPEC-attention.png here",
    )


def inspect_attention(options: argparse.Namespace) -> None:
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

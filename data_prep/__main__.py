"""Command line of the builder: `python -m data_prep build|verify|stats|show`.

Exit status: 0 done, 2 a mistake of the user (one message, no traceback), 130 interrupted.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from data_prep import audit
from data_prep.run import FORMATS, BuildOptions, build
from mdseq.data.corpus import Corpus
from mdseq.data.format import Manifest, SplitEntry
from mdseq.errors import exit_status


def main(arguments: Sequence[str]) -> int:
    # Long options may be spelled with hyphens or underscores.
    spelled = [re.sub(r"^--[\w-]+", lambda name: "--" + name[0][2:].replace("-", "_"), a) for a in arguments]
    options = _parser().parse_args(spelled)
    return exit_status(lambda: options.command(options), "interrupted; nothing was kept")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_prep", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("build", help="text in, dataset out")
    command.set_defaults(command=_build)
    command.add_argument("data", type=Path, metavar="DATA", help="a file, or a folder to read in full")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="dataset to create")
    command.add_argument("--vocab", type=int, default=BuildOptions.vocab, metavar="N", help="vocabulary to train")
    command.add_argument("--tokenizer", type=Path, metavar="MODEL", help="take this model, train none")
    command.add_argument("--format", choices=FORMATS, default=BuildOptions.format)
    command.add_argument("--text_key", default=BuildOptions.text_key, help="JSONL field that holds the text")
    command.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="skip matching names or paths; repeatable",
    )
    command.add_argument("--valid_fraction", type=float, default=BuildOptions.valid_fraction, metavar="F")
    command.add_argument("--max_rejected_fraction", type=float, default=BuildOptions.max_rejected_fraction, metavar="F")
    command.add_argument("--max_shard_tokens", type=int, default=BuildOptions.max_shard_tokens, metavar="N")
    command.add_argument("--workers", type=int, default=BuildOptions.workers, metavar="N", help="processes")

    command = commands.add_parser("verify", help="check every byte of a dataset")
    command.set_defaults(command=_verify)
    command.add_argument("dir", type=Path, metavar="DIR")

    command = commands.add_parser("stats", help="sizes and lengths")
    command.set_defaults(command=_stats)
    command.add_argument("dir", type=Path, metavar="DIR")

    command = commands.add_parser("show", help="one document as text, its boundaries visible")
    command.set_defaults(command=_show)
    command.add_argument("dir", type=Path, metavar="DIR")
    command.add_argument("document", type=int, metavar="N")
    command.add_argument("--split", choices=("train", "valid"), default="train")
    return parser


def _build(options: argparse.Namespace) -> None:
    fields = {name: value for name, value in vars(options).items() if name != "command"}
    build_options = BuildOptions(**fields | {"exclude": tuple(options.exclude)})
    started = time.monotonic()
    manifest = build(build_options)
    seconds = time.monotonic() - started
    text_bytes = sum(entry.text_bytes for entry in manifest.splits.values())
    table = _table(f"{build_options.out}: {manifest.kind}, {manifest.vocab_size:,} token vocabulary", manifest)
    table.caption = f"{seconds:.1f} s, {text_bytes / 1e6 / seconds:.1f} MB/s; fingerprint {manifest.fingerprint[:16]}"
    Console().print(table)
    if manifest.rejected:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in manifest.rejected.items())
        print(f"rejected: {reasons}; listed in {build_options.out / 'rejected.jsonl'}")
    if not build_options.tokenizer and manifest.vocab_size < build_options.vocab:
        print(f"the text supports {manifest.vocab_size:,} tokens, not the {build_options.vocab:,} asked for")


def _verify(options: argparse.Namespace) -> None:
    print(f"{options.dir} is intact: {audit.verify(options.dir):,} documents")


def _stats(options: argparse.Namespace) -> None:
    manifest = Manifest.load(options.dir)
    table = _table(f"{options.dir}: {manifest.kind}, {manifest.vocab_size:,} token vocabulary", manifest)
    Console().print(table)
    lengths = Table("split", title="tokens a document")
    for split in audit.splits_in_use(manifest):
        quantiles = audit.length_quantiles(Corpus.open(options.dir, split))
        if not lengths.rows:
            for name in quantiles:
                lengths.add_column(name, justify="right")
        lengths.add_row(split, *(f"{value:,}" for value in quantiles.values()))
    Console().print(lengths)


def _show(options: argparse.Namespace) -> None:
    print(audit.show(options.dir, options.split, options.document))


def _table(title: str, manifest: Manifest) -> Table:
    table = Table("split", title=title)
    for name in ("documents", "tokens", "text MB", "tokens/byte", "shards"):
        table.add_column(name, justify="right")
    for split, entry in manifest.splits.items():
        table.add_row(split, *_row(entry))
    return table


def _row(entry: SplitEntry) -> tuple[str, ...]:
    return (
        f"{entry.documents:,}",
        f"{entry.tokens:,}",
        f"{entry.text_bytes / 1e6:,.1f}",
        f"{entry.tokens / max(entry.text_bytes, 1):.3f}",
        f"{len(entry.shards):,}",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

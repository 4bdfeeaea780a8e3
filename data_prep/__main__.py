"""Command line of the builder: `python -m data_prep plan|build|tokenizer|verify|stats|show|pairs`.

Exit status: 0 done, 2 a mistake of the user (one message, no traceback), 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from data_prep.spec import PrepSpec, SourceFormat, SourceSplit, load_prep_spec
from data_prep.workers import worker_context
from mdseq.errors import UserError, exit_status

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from data_prep.run import Where
    from mdseq.data.format import Manifest, ShardEntry

# Options that are short names for keys of the prep spec.
OF_SOURCES = ("format", "text", "source", "target", "turns", "turn", "split", "path_header")
SHORT_NAMES = {
    "vocab": "vocabulary.size",
    "model": "vocabulary.model",
    "tokenizer": "vocabulary.tokenizer",
    "valid_fraction": "splits.valid_fraction",
    "test_fraction": "splits.test_fraction",
}
OVERRIDE = re.compile(rf"({'|'.join(PrepSpec.model_fields)})\.[\w.]+=")


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    return exit_status(lambda: options.command(options), "interrupted; the same command goes on where it stopped")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """What the command line says. Exits with status 2 and a message when that makes no sense."""
    # Long options may be spelled with hyphens or underscores.
    spelled = [re.sub(r"^--[\w-]+", lambda name: "--" + name[0][2:].replace("-", "_"), a) for a in arguments]
    parser = _parser()
    options, more = parser.parse_known_args(spelled)
    if unknown := [word for word in more if word.startswith("-") or not hasattr(options, "data")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if more:  # argparse gathers positional arguments only up to the next option
        options.data += more
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_prep", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("build", help="text in, dataset out; again after an interruption, goes on")
    command.set_defaults(command=_build)
    _add_spec(command)
    _add_out(command)
    command.add_argument("--cluster", choices=("slurm",), help="build the shards as job arrays instead of here")
    command.add_argument("--tasks", type=int, default=16, metavar="N", help="tasks of a job array; default 16")

    command = commands.add_parser(
        "plan", help="freeze inputs and shards, and show them; `build` then starts from there"
    )
    command.set_defaults(command=_plan)
    _add_spec(command)
    _add_out(command)

    command = commands.add_parser("tokenizer", help="train a vocabulary alone, for --tokenizer")
    command.set_defaults(command=_tokenizer)
    _add_spec(command)
    command.add_argument("--out", type=Path, required=True, metavar="MODEL", help="model file to create")

    command = commands.add_parser("verify", help="check every byte of a dataset")
    command.set_defaults(command=_verify)
    command.add_argument("dir", type=Path, metavar="DIR")

    command = commands.add_parser("stats", help="sizes and lengths, as tables and as a picture")
    command.set_defaults(command=_stats)
    command.add_argument("dir", type=Path, metavar="DIR")
    command.add_argument("--png", type=Path, metavar="PNG", help="default: DIR with .png behind it")

    command = commands.add_parser("show", help="one document as text, its boundaries visible")
    command.set_defaults(command=_show)
    command.add_argument("dir", type=Path, metavar="DIR")
    command.add_argument("document", type=int, metavar="N")
    command.add_argument("--split", choices=get_args(SourceSplit)[2:], default="train")

    command = commands.add_parser("pairs", help="pairs of code and docstring from Python source trees")
    command.set_defaults(command=_pairs)
    command.add_argument("trees", type=Path, nargs="+", metavar="TREE", help="file or folder of Python sources")
    command.add_argument("--out", type=Path, required=True, metavar="JSONL", help="file to create, .jsonl or .jsonl.gz")
    return parser


def _add_spec(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "data",
        nargs="+",
        metavar="DATA",
        help="a file, folder or glob of text, several, NAME=PATH to name one; or one prep spec (.toml); "
        "section.key=value changes a key of the spec (docs/prep_spec.md)",
    )
    command.add_argument("--format", choices=get_args(SourceFormat), help="default: auto")
    command.add_argument("--text", metavar="FIELD", help="field of a record, or template: '{title}: {body}'")
    command.add_argument("--source", metavar="FIELD", help="field or template of a pair's source")
    command.add_argument("--target", metavar="FIELD", help="field or template of a pair's target")
    command.add_argument("--turns", metavar="FIELD", help="field with the turns of a dialogue")
    command.add_argument("--turn", metavar="TEMPLATE", help="a turn's items by number or name; default '{0}: {1}\\n'")
    command.add_argument("--last_turn_is_target", action="store_true", help="make pairs of dialogues")
    command.add_argument("--split", choices=get_args(SourceSplit), help="how documents are split; default: hash")
    command.add_argument("--path_header", metavar="TEMPLATE", help="first line of a source file; default '# {path}\\n'")
    command.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help="names or paths to skip")
    command.add_argument(
        "--weight", action="append", default=[], metavar="NAME=W", help="share of a source in training"
    )
    command.add_argument("--vocab", metavar="N", help="tokens of the vocabulary to train; default 16384")
    command.add_argument("--model", choices=("unigram", "bpe"), help="kind of vocabulary; default unigram")
    command.add_argument("--tokenizer", metavar="PATH", help="take this model, or that of a dataset, and train none")
    command.add_argument("--valid_fraction", metavar="F", help="share held out for validation; default 0.01")
    command.add_argument("--test_fraction", metavar="F", help="share held out for tests; default 0")
    command.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="processes; default: one a core"
    )


def _add_out(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="dataset to create")


def _spec_of(options: argparse.Namespace) -> PrepSpec:
    if options.workers < 1:
        raise UserError(f"WORKERS={options.workers} is not allowed; give 1 or more")
    overrides = [word for word in options.data if OVERRIDE.match(word)]
    data = [word for word in options.data if not OVERRIDE.match(word)]
    if not data:
        raise UserError("give DATA, a file, a folder or a glob of text, or a prep spec (.toml)")
    of_sources: dict[str, Any] = {
        name: getattr(options, name) for name in OF_SOURCES if getattr(options, name) is not None
    }
    for name in ("turn", "path_header", "text", "source", "target"):
        if name in of_sources:  # as a shell passes it
            of_sources[name] = of_sources[name].replace("\\n", "\n").replace("\\t", "\t")
    if options.last_turn_is_target:
        of_sources["last_turn_is_target"] = True
    if options.exclude:
        of_sources["exclude"] = tuple(options.exclude)
    short = [
        f"{key}={getattr(options, name)}" for name, key in SHORT_NAMES.items() if getattr(options, name) is not None
    ]
    weights = dict(weight.partition("=")[::2] for weight in options.weight)
    return load_prep_spec(data, of_sources, weights, [*short, *overrides])


def _where(options: argparse.Namespace) -> Where:
    from data_prep.run import Where

    if options.tasks < 1:
        raise UserError(f"--tasks {options.tasks} is not allowed; give 1 or more")
    return Where(options.workers, options.tasks if options.cluster else 0)


def _build(options: argparse.Namespace) -> None:
    started = time.monotonic()
    spec = _spec_of(options)
    if options.workers > 1:
        worker_context()

    from data_prep.run import build

    built = build(spec, options.out, _where(options))
    manifest, seconds = built.manifest, time.monotonic() - started
    if built.was_there:
        print(f"{options.out} is there already, built of the same inputs in the same way; nothing to do")
        return
    text_bytes = sum(entry.text_bytes for entry in manifest.splits.values())
    table = _table(f"{options.out}: {manifest.kind}, {manifest.vocab_size:,} token vocabulary", manifest)
    table.caption = f"{seconds:.1f} s, {text_bytes / 1e6 / seconds:.1f} MB/s; fingerprint {manifest.fingerprint[:16]}"
    _console().print(table)
    _print_what_became_of_records(options.out, manifest)
    if not spec.vocabulary.tokenizer and manifest.vocab_size < spec.vocabulary.size:
        print(f"the text supports {manifest.vocab_size:,} tokens, not the {spec.vocabulary.size:,} asked for")


def _plan(options: argparse.Namespace) -> None:
    from rich.table import Table

    from data_prep.run import plan_build

    plan = plan_build(_spec_of(options), options.out, options.workers)
    table = Table(
        "source", title=f"{options.out}: planned", caption="`build` with the same arguments goes on from here"
    )
    for name in ("files", "text MB", "shards"):
        table.add_column(name, justify="right")
    for number, source in enumerate(plan.spec.sources):
        shards = [shard for shard in plan.shards if shard.source == number]
        files = {stretch.file for shard in shards for stretch in shard.stretches}
        megabytes = sum(shard.text_bytes for shard in shards) / 1e6
        table.add_row(source.name, f"{len(files):,}", f"{megabytes:,.1f}", f"{len(shards):,}")
    _console().print(table)


def _tokenizer(options: argparse.Namespace) -> None:
    from data_prep.run import train_tokenizer

    tokenizer = train_tokenizer(_spec_of(options), options.out, options.workers)
    print(f"wrote {options.out}: {tokenizer.vocab_size:,} tokens, fingerprint {tokenizer.fingerprint[:16]}")


def _verify(options: argparse.Namespace) -> None:
    from data_prep.audit import verify
    from data_prep.progress import Stage
    from mdseq.data.format import Manifest

    total = sum(shard.bytes for shard in _shards(Manifest.load(options.dir)))
    with Stage("verifying", total) as stage:
        num_documents = verify(options.dir, stage.advance)
    print(f"{options.dir} is intact: {num_documents:,} documents")


def _stats(options: argparse.Namespace) -> None:
    from rich.table import Table

    from data_prep.picture import plot_stats
    from data_prep.progress import Stage
    from data_prep.statistics import LENGTH_QUANTILES, stats
    from mdseq.data.format import Manifest

    png = options.png or options.dir.with_name(f"{options.dir.name}.png")
    total = sum(shard.bytes for shard in _shards(Manifest.load(options.dir)))
    with Stage("reading", total) as stage:
        parts = stats(options.dir, stage.advance)
    sizes = Table("split", "source", title=str(options.dir))
    for name in ("documents", "tokens", "text MB", "tokens/byte", "byte tokens"):
        sizes.add_column(name, justify="right")
    lengths = Table("split", "source", title="tokens a document")
    for name in LENGTH_QUANTILES:
        lengths.add_column(name, justify="right")
    for part in parts:
        sizes.add_row(
            part.split,
            part.source,
            f"{part.documents:,}",
            f"{part.tokens:,}",
            f"{part.text_bytes / 1e6:,.1f}",
            f"{part.tokens_per_byte:.3f}",
            f"{part.byte_fallback:.2%}",
        )
        lengths.add_row(part.split, part.source, *(f"{value:,}" for value in part.length_quantiles.values()))
    _console().print(sizes)
    _console().print(lengths)
    plot_stats(parts, str(options.dir), png)
    print(f"drawn in {png}")


def _show(options: argparse.Namespace) -> None:
    from data_prep.audit import show

    print(show(options.dir, options.split, options.document))


def _pairs(options: argparse.Namespace) -> None:
    from data_prep.pairs import write_pairs

    counts = write_pairs(options.trees, options.out)
    for name, finding in counts.unreadable.items():
        print(f"left out {name}: {finding}", file=sys.stderr)
    print(f"wrote {options.out}: {counts.pairs:,} pairs from {counts.files - len(counts.unreadable):,} files")


def _console() -> Console:
    """Standard output; wide enough for the tables where it is no terminal."""
    from rich.console import Console

    return Console(width=None if Console().is_terminal else 110)


def _shards(manifest: Manifest) -> list[ShardEntry]:
    return [shard for split in manifest.splits.values() for part in split.sources.values() for shard in part.shards]


def _table(title: str, manifest: Manifest) -> Table:
    from rich.table import Table

    table = Table("split", "source", title=title)
    for name in ("documents", "tokens", "text MB", "tokens/byte", "shards"):
        table.add_column(name, justify="right")
    for split, entry in manifest.splits.items():
        for name, part in entry.sources.items():
            table.add_row(
                split,
                name,
                f"{part.documents:,}",
                f"{part.tokens:,}",
                f"{part.text_bytes / 1e6:,.1f}",
                f"{part.tokens / max(part.text_bytes, 1):.3f}",
                f"{len(part.shards):,}",
            )
    return table


def _print_what_became_of_records(out: Path, manifest: Manifest) -> None:
    from mdseq.data.format import REJECTED_FILE

    for name, source in manifest.sources.items():
        if source.rejected:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in source.rejected.items())
            print(f"rejected of {name}: {reasons}; listed in {out / REJECTED_FILE}")
        if source.merged:
            print(f"joined of {name}: {source.merged:,} documents, each to the one before")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

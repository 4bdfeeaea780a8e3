"""What a run would be, without starting it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mdseq.data.corpus import Corpus
from mdseq.data.lengths import check_sources
from mdseq.diffusion.schedule import NoiseSchedule
from mdseq.engine.config import EngineConfig
from mdseq.engine.memory import estimate_memory
from mdseq.errors import UserError
from mdseq.model.cost import ASSUMED_VOCAB_SIZE, attention_cost, count_parameters
from mdseq.model.denoiser import DenoiserConfig
from mdseq.settings import Resolved
from mdseq.spec import RunSpec
from mdseq.train.attention import choose_attention
from mdseq.train.rows import Rows


def print_dry_run(resolved: Resolved[RunSpec], engine: EngineConfig) -> None:
    """Print the spec with where each value came from, the engine's configuration, and the run's size."""
    console = Console(width=None if Console().is_terminal else 110)
    spec = resolved.spec
    table = Table("key", "value", "from", title="run spec", title_justify="left")
    for path, value, origin in resolved.rows():
        style = None if origin == "default" else "bold"
        table.add_row(path, value, origin, style=style)
    console.print(table)

    NoiseSchedule.of(spec.diffusion)  # says what is wrong with it
    console.print("\n[bold]engine configuration[/bold]")
    console.print_json(json.dumps(engine.values))

    vocab_size, origin, rows = ASSUMED_VOCAB_SIZE, "assumed; give --data for the real one", "give --data to count them"
    if spec.data.path:
        corpus = Corpus.open(Path(spec.data.path), "train")
        check_sources(corpus, spec.data.lengths_of)
        vocab_size, origin, rows = corpus.manifest.vocab_size, spec.data.path, Rows.of(corpus, spec).describe()
    config = DenoiserConfig.of(spec, vocab_size)
    parameters = count_parameters(config, spec.diffusion.absorbing)
    size = Table(title="size", title_justify="left", show_header=False)
    size.add_row("vocabulary", f"{vocab_size:,} ({origin})")
    size.add_row("parameters", f"{parameters.total:,}")
    size.add_row("  active per token", f"{parameters.active:,}")
    attention = attention_cost(config, spec.data.row_length)
    size.add_row("attention per row, forward", f"{attention.flops / 1e9:,.1f} GFLOP, {attention.of_dense:.1%} of dense")
    size.add_row("  engine on this machine", _attention_engine(spec))
    size.add_row("ranks", f"{engine.num_ranks}, experts spread over {engine.expert_parallel_size}")
    size.add_row("micro-batches per rank and step", f"{engine.micro_batches}")
    size.add_row("rows", rows)
    size.add_row("tokens per step", f"{spec.data.batch_size * spec.data.row_length:,}")
    size.add_row("tokens in all", f"{spec.schedule.steps * spec.data.batch_size * spec.data.row_length:,}")
    console.print(size)

    on_gpu = torch.cuda.is_available()
    memory = estimate_memory(config, spec, engine, on_gpu=on_gpu)
    title = f"memory per rank on {'a GPU' if on_gpu else 'CPUs, as here'}, estimated"
    estimate = Table(title, "GiB", title_justify="left")
    for name, num_bytes in memory.parts.items():
        estimate.add_row(name, f"{num_bytes / 2**30:.3f}")
    estimate.add_section()
    estimate.add_row("sum", f"{memory.total / 2**30:.3f}")
    if on_gpu:
        estimate.add_row("besides, in CPU memory", f"{memory.on_host / 2**30:.3f}")
    console.print(estimate)
    if not on_gpu:
        console.print("`mdseq plan` estimates it for GPUs")


def _attention_engine(spec: RunSpec) -> str:
    """What attention would take here, or why not: the run itself may be meant for another machine."""
    try:
        choice = choose_attention(spec, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    except UserError as error:
        return str(error)
    return f"{choice.engine} ({choice.reason})"

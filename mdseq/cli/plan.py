"""`mdseq plan SPEC --gpus 8,64`: how to spread a run over GPUs, before there are any."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdseq.cli.arguments import at_least, lengths, number_between

if TYPE_CHECKING:
    from rich.table import Table

    from mdseq.engine.plan import Choice
    from mdseq.spec import RunSpec

GIB = 2**30


def add_command(commands: Any) -> None:
    command = commands.add_parser("plan", help="memory and communication of a run by GPUs, ZeRO stage and experts")
    command.set_defaults(command=plan)
    command.intermixed = True
    command.add_argument("spec", type=Path, metavar="SPEC", help="a TOML file, or the name of a preset")
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the spec")
    command.add_argument("--gpus", type=lengths, required=True, metavar="N,N,...", help="how many, one table for each")
    command.add_argument(
        "--gpu_memory_gib", type=number_between(0, least_allowed=False), default=80.0, metavar="GIB", help="default: 80"
    )
    command.add_argument("--gpus_per_node", type=at_least(1), default=8, metavar="N", help="default: 8")
    command.add_argument("--vocab_size", type=at_least(1), metavar="N", help="default: the dataset's, or 16384")


def plan(options: argparse.Namespace) -> None:
    from mdseq.spec import load_spec

    wanted = load_spec(options.spec, options.overrides).spec

    from rich.console import Console

    from mdseq.data.format import Manifest
    from mdseq.engine.advice import memory_advice
    from mdseq.engine.plan import choices, recommended, with_nearest_batch
    from mdseq.model.cost import ASSUMED_VOCAB_SIZE, count_parameters
    from mdseq.model.denoiser import DenoiserConfig

    vocab_size, memory_bytes = options.vocab_size, options.gpu_memory_gib * GIB
    if vocab_size is None:
        vocab_size = Manifest.load(Path(wanted.data.path)).vocab_size if wanted.data.path else ASSUMED_VOCAB_SIZE
    count = count_parameters(DenoiserConfig.of(wanted, vocab_size), wanted.diffusion.absorbing)
    console = Console(width=None if Console().is_terminal else 120, highlight=False)
    console.print(
        f"{count.total:,} parameters, {count.active:,} active for a token; vocabulary of {vocab_size:,}; "
        f"{wanted.optimiser.precision}. Estimated GiB of a rank, whose GPU has {options.gpu_memory_gib:g}: of each "
        "part, by ZeRO stage and ranks that experts are spread over; and sent by it in a step, within a node of "
        f"{options.gpus_per_node} GPUs and between nodes"
    )
    for num_gpus in options.gpus:
        spec = with_nearest_batch(wanted, num_gpus)
        found = choices(spec, vocab_size, num_gpus, options.gpus_per_node)
        best = recommended(found, memory_bytes)
        gpus = "1 GPU" if num_gpus == 1 else f"{num_gpus:,} GPUs"
        console.print(f"\n[bold]{gpus}[/bold]: {_rows(wanted, spec, num_gpus)}")
        console.print(_table(found, best, memory_bytes, spread=spec.experts.num_experts > 0))
        if best is not None:
            console.print(f"take {_how(best)}: {_why(best, found, memory_bytes)}")
            continue
        least = min(found, key=lambda choice: choice.memory.total)
        console.print(f"nothing fits with a tenth to spare; the least is {_how(least)}. Of its memory,")
        for line in memory_advice(spec, least.engine, vocab_size, on_gpu=True):
            console.print(f"  {line}")


def _rows(wanted: RunSpec, spec: RunSpec, num_gpus: int) -> str:
    data = spec.data
    count = data.batch_size // (data.micro_batch_size * num_gpus)
    micro_batches = "1 micro-batch" if count == 1 else f"{count} micro-batches"
    text = (
        f"{data.batch_size:,} rows of {data.row_length:,}, {micro_batches} of {data.micro_batch_size} a rank, "
        f"{data.batch_size * data.row_length:,} tokens a step"
    )
    if data.batch_size != wanted.data.batch_size:
        text += (
            f" (data.batch_size = {wanted.data.batch_size} is no multiple of {data.micro_batch_size} x {num_gpus}; "
            f"this is the nearest)"
        )
    return text


def _table(found: Sequence[Choice], best: Choice | None, memory_bytes: float, *, spread: bool) -> Table:
    from rich import box
    from rich.table import Table

    parts = [name for name in found[0].memory.parts if any(choice.memory.parts[name] for choice in found)]
    of_experts = ["of which\nexperts"] if spread else []
    others = ["fits", "in\nnode", "between\nnodes", "CPU\nmemory"]
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("ZeRO", no_wrap=True)
    for name in (*(["experts\nover"] if spread else []), *parts, "sum", *of_experts, *others):
        table.add_column(name, justify="right", no_wrap=True)
    for choice in found:
        memory, sent = choice.memory, choice.communication.all
        fits = "yes" if choice.fits(memory_bytes) else "tight" if memory.total <= memory_bytes else "no"
        table.add_row(
            f"{choice.engine.zero_stage}{' offload' if choice.engine.offloads_optimiser else ''}"
            f"{' <-' if choice is best else ''}",
            *([str(choice.engine.expert_parallel_size)] if spread else []),
            *(_gib(memory.parts[name]) for name in parts),
            _gib(memory.total),
            *([_gib(memory.experts)] if spread else []),
            fits,
            *map(_gib, (sent.within_nodes, sent.between_nodes, memory.on_host)),
            style="bold" if choice is best else None,
        )
    return table


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f}"


def _how(choice: Choice) -> str:
    """What to give `--ds_config`."""
    additions = f" with {' and '.join(choice.additions)}" if choice.additions else ""
    return f"ds_configs/{choice.file}{additions}"


def _why(choice: Choice, found: Sequence[Choice], memory_bytes: float) -> str:
    if choice.engine.offloads_optimiser:
        return "only with the optimiser in CPU memory does it fit"
    num_fitting = sum(one.fits(memory_bytes) for one in found)
    parts = choice.communication
    kinds = {"gradients and updated weights": parts.updates, "tokens": parts.tokens, "gathered weights": parts.gathered}
    listed = ", ".join(f"{_gib(traffic.total)} GiB of {name}" for name, traffic in kinds.items() if traffic.total)
    if not listed:
        return f"nothing is sent, and of {num_fitting} that fit with a tenth to spare it takes the least memory"
    return f"of {num_fitting} that fit with a tenth to spare it waits least for what is sent: {listed}"

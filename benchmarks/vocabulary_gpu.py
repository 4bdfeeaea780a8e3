"""The loss over the vocabulary on a CUDA GPU, beside the GPU's ceilings and all logits at once.

    python -m benchmarks.vocabulary_gpu [--json FILE] [--dry_run]

The cross-entropy and its three gradients, computed in fp32, and with products in TF32 as a bf16 run has them. Their
products count as TFLOP/s against a product of large square matrices of the same kind; the least that chunks of logits
move, against a large copy. Times are medians by CUDA events.

Shapes: n tokens, z embedding dimension, v vocabulary.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.gpu import Bench, Ceilings
from benchmarks.vocabulary import EMBEDDING_DIM, OURS, Case, Point, check_same_answer, losses, peak
from mdseq.errors import exit_status

POINT, DRY_POINT = Point(32_768, 16_384, 1), Point(64, 128, 1)
PRODUCTS = ("fp32", "TF32")
# Logits are written, read for their softmax, written as their slopes, and read for each of two products.
PASSES_OVER_LOGITS = 5


@dataclass(frozen=True)
class Result:
    """One measurement, with the ceilings it is held against; rates in TFLOP/s and TB/s."""

    products: str
    way: str
    milliseconds: float
    peak_megabytes: float
    product_rate: float
    of_product: float
    copy_rate: float
    of_copy: float


def results(bench: Bench, point: Point) -> Iterator[Result]:
    flops = 3 * 2 * point.length * point.vocab_size * EMBEDDING_DIM
    num_bytes = PASSES_OVER_LOGITS * point.logits_bytes
    allowed = torch.backends.cuda.matmul.allow_tf32
    try:
        for products in PRODUCTS:
            torch.backends.cuda.matmul.allow_tf32 = products == "TF32"
            ceilings = Ceilings.measured(bench)
            runs = losses(Case.of(point, bench.device), with_plain=True)
            if products == "fp32":
                check_same_answer(runs)
            for way, run in runs.items():
                seconds = bench.milliseconds(run) / 1e3
                yield Result(
                    products,
                    way,
                    seconds * 1e3,
                    peak(run, bench.device) / 1e6,
                    flops / seconds / 1e12,
                    flops / seconds / ceilings.product_flops,
                    num_bytes / seconds / 1e12,
                    num_bytes / seconds / ceilings.copy_bytes,
                )
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def table_of(measured: Sequence[Result], point: Point, title: str) -> Table:
    table = Table(
        "products", "",
        title=f"Loss over the vocabulary, forward and backward: {point.length:,} tokens, {point.vocab_size:,} words, "
        f"z = {EMBEDDING_DIM}; {title}",
        caption=f"TB/s: as if all logits were passed over {PASSES_OVER_LOGITS} times, as {OURS} does.",
        title_justify="left", caption_justify="left",
    )  # fmt: skip
    for name in ("ms", "peak MB", "TFLOP/s", "of a product", "TB/s", "of a copy"):
        table.add_column(name, justify="right")
    for one in measured:
        table.add_row(
            one.products, one.way, f"{one.milliseconds:.3f}", f"{one.peak_megabytes:,.0f}", f"{one.product_rate:.3g}",
            f"{one.of_product:.2f}", f"{one.copy_rate:.3g}", f"{one.of_copy:.2f}",
        )  # fmt: skip
    return table


def measure(options: argparse.Namespace) -> None:
    bench = replace(Bench.of(options.dry_run, warmups=3, repeats=15), dtype=torch.float32)
    point = DRY_POINT if options.dry_run else POINT
    torch.manual_seed(0)
    measured = list(results(bench, point))
    console = Console() if Console().is_terminal else Console(width=140)
    console.print(table_of(measured, point, str(bench)))
    if options.json:
        with options.json.open("a") as file:
            for one in measured:
                file.write(json.dumps({"device": str(bench), **asdict(one)}) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="append one object a result")
    parser.add_argument("--dry_run", action="store_true", help="every path on the CPU, tiny")
    options = parser.parse_args(arguments)
    return exit_status(lambda: measure(options), "stopped")


if __name__ == "__main__":
    raise SystemExit(main())

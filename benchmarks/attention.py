"""Window attention against dense attention: seconds of one forward and backward pass, on this CPU.

    python -m benchmarks.attention [--lengths 1024 2048 4096 8192] [--window 128]

Ratios are within one run, each engine timed in turn; absolute times are of this machine alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from mdseq.sparse import Documents, Layout, Pattern, attend

HEADS, HEAD_DIM, REPEATS = 8, 64, 3


def seconds_of(attention: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor], slots: int) -> float:
    """The fastest of a few passes, forward and backward."""
    q, k, v = (torch.randn(1, slots, HEADS, HEAD_DIM, requires_grad=True) for _ in range(3))
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        attention(q, k, v).sum().backward()
        times.append(time.perf_counter() - started)
    return min(times)


def dense(q_bshd: torch.Tensor, k_bshd: torch.Tensor, v_bshd: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_bshd, k_bshd, v_bshd))
    return F.scaled_dot_product_attention(q, k, v)


def sparse(pattern: Pattern, layout: Layout) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    return lambda q, k, v: attend(q, k, v, pattern, layout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--window", type=int, default=128)
    options = parser.parse_args()
    table = Table(
        "tokens", "dense SDPA, s", "window, s", "faster", "dilation 4", "16 globals",
        title=f"{HEADS} heads of {HEAD_DIM}, window {options.window} a side, {torch.get_num_threads()} threads",
        caption="faster: dense over window. dilation 4, 16 globals: time over the plain window's.",
    )  # fmt: skip
    for column in table.columns:
        column.justify = "right"
    for length in options.lengths:
        documents = Documents.whole(torch.tensor([length]), length)
        plain_layout, global_layout = Layout.of(documents, 0), Layout.of(documents, 16)
        plain = seconds_of(sparse(Pattern(options.window), plain_layout), length)
        table.add_row(
            f"{length:,}",
            f"{(full := seconds_of(dense, length)):.3f}",
            f"{plain:.3f}",
            f"{full / plain:.1f}x",
            f"{seconds_of(sparse(Pattern(options.window, 4), plain_layout), length) / plain:.2f}",
            f"{seconds_of(sparse(Pattern(options.window), global_layout), length + 16) / plain:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()

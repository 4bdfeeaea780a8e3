"""Scoring embeddings against the whole vocabulary: chunks of logits against all logits at once.

    python -m benchmarks.vocabulary [--only a,b] [--device cuda] [--quick]

Part a compares the cross-entropy and its gradients, part b the likeliest token. Candidates take turns, so ratios mean
something; absolute times are of this machine alone. Peers, where torch has it: `F.linear_cross_entropy` with a loss for
each position, which can be weighed as ours is, and with their sum alone, which cannot.

Shapes: n positions, z embedding dimension, v vocabulary.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.measure import fastest_seconds, peak_bytes
from mdseq.diffusion.rounding import CHUNK_LOGITS, cross_entropy, likeliest_tokens
from mdseq.errors import UserError, exit_status
from mdseq.model.denoiser import Vocabulary

EMBEDDING_DIM = 128
FP32_BYTES = 4
MOST_PLAIN_BYTES = 16 * 2**30
PLAIN_LOSS_COPIES, PLAIN_TOKEN_COPIES = 3, 2  # of all logits: they, their log-softmax, a gradient; their softmax
SLOWEST = 1.10  # of plain
PLAIN, OURS = "plain", "chunked"

Loss = Callable[[Tensor, Vocabulary, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Point:
    """One size, and how often every candidate runs on it."""

    length: int
    vocab_size: int
    repeats: int

    @property
    def logits_bytes(self) -> int:
        return self.length * self.vocab_size * FP32_BYTES

    @property
    def allowed_bytes(self) -> int:
        """One chunk of logits, and a few tensors as large as x and the embeddings: gradients, and what scales them."""
        return FP32_BYTES * (CHUNK_LOGITS + 4 * (self.length + self.vocab_size) * EMBEDDING_DIM)


POINTS = (Point(4096, 8192, 5), Point(8192, 16384, 3), Point(16384, 32768, 2), Point(65536, 32768, 1))
QUICK = (Point(512, 1024, 1), Point(1024, 1024, 1))


@dataclass(frozen=True)
class Case:
    """Random embeddings and tokens; all weights count."""

    x_nz: Tensor
    vocabulary: Vocabulary
    token_n: Tensor
    weight_n: Tensor

    @classmethod
    def of(cls, point: Point, device: str) -> Case:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device).requires_grad_()

        return cls(
            normal(point.length, EMBEDDING_DIM),
            Vocabulary(normal(point.vocab_size, EMBEDDING_DIM), normal(point.vocab_size)),
            torch.randint(point.vocab_size, (point.length,), device=device),
            torch.rand(point.length, device=device) + 0.1,
        )


# ---------------------------------------------------------------------------------------------------------------------
# Candidates


def plain_loss(x_nz: Tensor, vocabulary: Vocabulary, token_n: Tensor, weight_n: Tensor) -> Tensor:
    logits_nv = x_nz @ vocabulary.embedding_vz.T + vocabulary.bias_v
    return (weight_n * F.cross_entropy(logits_nv, token_n, reduction="none")).sum()


def our_loss(x_nz: Tensor, vocabulary: Vocabulary, token_n: Tensor, weight_n: Tensor) -> Tensor:
    return cross_entropy(x_nz, vocabulary, token_n, weight_n)[0]


def torch_loss(x_nz: Tensor, vocabulary: Vocabulary, token_n: Tensor, weight_n: Tensor) -> Tensor:
    return (weight_n * _linear_cross_entropy(x_nz, vocabulary, token_n, "none")).sum()


def torch_sum(x_nz: Tensor, vocabulary: Vocabulary, token_n: Tensor, _: Tensor) -> Tensor:
    return _linear_cross_entropy(x_nz, vocabulary, token_n, "sum")


def _linear_cross_entropy(x_nz: Tensor, vocabulary: Vocabulary, token_n: Tensor, reduction: str) -> Tensor:
    return F.linear_cross_entropy(
        x_nz,
        vocabulary.embedding_vz,
        token_n,
        linear_bias=vocabulary.bias_v,
        reduction=reduction,
        options=torch.nn.LinearCrossEntropyOptions(),  # its own choice of chunks
    )


@torch.no_grad()
def plain_tokens(x_nz: Tensor, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    confidence_n, token_n = (x_nz @ vocabulary.embedding_vz.T + vocabulary.bias_v).softmax(dim=1).max(dim=1)
    return token_n, confidence_n


def losses(case: Case, with_plain: bool) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """The loss and its three gradients."""
    functions: dict[str, Loss] = {PLAIN: plain_loss} if with_plain else {}
    functions[OURS] = our_loss
    if hasattr(F, "linear_cross_entropy"):
        functions |= {"torch, each": torch_loss, "torch, sum": torch_sum}

    def run(function: Loss) -> tuple[Tensor, ...]:
        loss = function(case.x_nz, case.vocabulary, case.token_n, case.weight_n)
        return loss.detach(), *torch.autograd.grad(
            loss, (case.x_nz, case.vocabulary.embedding_vz, case.vocabulary.bias_v)
        )

    return {name: lambda function=function: run(function) for name, function in functions.items()}  # type: ignore[misc]


def tokens(case: Case, with_plain: bool) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """The likeliest token, and its probability."""
    runs: dict[str, Callable[[], tuple[Tensor, ...]]] = {}
    if with_plain:
        runs[PLAIN] = lambda: plain_tokens(case.x_nz, case.vocabulary)
    runs[OURS] = lambda: likeliest_tokens(case.x_nz, case.vocabulary, forbidden=[])
    return runs


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def synchronised(run: Callable[[], object], device: str) -> Callable[[], object]:
    """Ends when the device has done its work."""

    def run_to_the_end() -> None:
        run()
        if device == "cuda":
            torch.cuda.synchronize()

    return run_to_the_end


def peak(run: Callable[[], object], device: str) -> int:
    """The most bytes held above those held before."""
    if device == "cpu":
        return peak_bytes(run)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before


def check_same_answer(runs: Mapping[str, Callable[[], tuple[Tensor, ...]]]) -> None:
    """Speed is worth comparing only between things that compute the same."""
    if PLAIN in runs:
        torch.testing.assert_close(runs[OURS](), runs[PLAIN](), rtol=1e-3, atol=1e-3)


def compare(
    title: str,
    candidates: Callable[[Case, bool], dict[str, Callable[[], tuple[Tensor, ...]]]],
    plain_copies: int,
    points: Sequence[Point],
    device: str,
) -> Table:
    table = Table(title=f"{title}, fp32, z = {EMBEDDING_DIM}, {machine(device)}", title_justify="left")
    for name in ("tokens", "words", "", "seconds", "over plain", "peak MB", "of all logits", "target", "reached"):
        table.add_column(name, justify="left" if name == "" else "right")
    for point in points:
        with_plain = plain_copies * point.logits_bytes < MOST_PLAIN_BYTES
        runs = candidates(Case.of(point, device), with_plain)
        check_same_answer(runs)
        seconds = fastest_seconds({name: synchronised(run, device) for name, run in runs.items()}, point.repeats)
        for name, run in runs.items():
            ratio = seconds[name] / seconds[PLAIN] if with_plain else None
            held = peak(run, device)
            table.add_row(
                f"{point.length:,}" if name == next(iter(runs)) else "",
                f"{point.vocab_size:,}" if name == next(iter(runs)) else "",
                name,
                f"{seconds[name]:.3f}",
                "" if ratio is None else f"{ratio:.2f}",
                f"{held / 1e6:,.0f}",
                f"{held / point.logits_bytes:.3f}",
                *(verdict(point, ratio, held) if name == OURS else ("", "")),
            )
        table.add_section()
    table.caption_justify = "left"
    table.caption = (
        "peak: above what was held before. of all logits: over the n x v x 4 bytes of one copy of them. Plain is left "
        f"out where it would hold {MOST_PLAIN_BYTES / 2**30:.0f} GiB. Targets: seconds over plain; peak MB, of a chunk "
        "of logits and 4 (n + v) z values."
    )
    return table


def verdict(point: Point, ratio: float | None, held: int) -> tuple[str, str]:
    reached = held <= point.allowed_bytes and (ratio is None or ratio <= SLOWEST)
    target = f"<= {point.allowed_bytes / 1e6:,.0f} MB"
    return target if ratio is None else f"<= {SLOWEST:.2f}, {target}", "[green]yes[/]" if reached else "[red]no[/]"


def machine(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"


def compare_losses(points: Sequence[Point], device: str) -> Table:
    return compare("a. cross-entropy and its gradients", losses, PLAIN_LOSS_COPIES, points, device)


def compare_tokens(points: Sequence[Point], device: str) -> Table:
    return compare("b. the likeliest token", tokens, PLAIN_TOKEN_COPIES, points, device)


PARTS: dict[str, Callable[[Sequence[Point], str], Table]] = {"a": compare_losses, "b": compare_tokens}


def measure(only: str, device: str, points: Sequence[Point]) -> None:
    parts = only.split(",")
    if unknown := sorted(set(parts) - set(PARTS)):
        raise UserError(
            f"--only {only}: no part {', '.join(unknown)}; give some of {', '.join(PARTS)}, as in --only a,b"
        )
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise UserError("--device cuda: no CUDA GPU here; leave it out, or give --device cpu")
    if device == "auto":
        device = "cuda" if has_gpu else "cpu"
    torch.manual_seed(0)
    console = Console() if Console().is_terminal else Console(width=120)
    for part in parts:
        console.print(PARTS[part](points, device))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(PARTS), metavar="PARTS", help="some of a,b")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: a GPU if there is one")
    parser.add_argument("--quick", action="store_true", help="short, run once: shows that it runs, no more")
    options = parser.parse_args(arguments)
    points = QUICK if options.quick else POINTS
    return exit_status(lambda: measure(options.only, options.device, points), "stopped")


if __name__ == "__main__":
    raise SystemExit(main())

"""Sparse attention on a CUDA GPU: useful TFLOP/s against FlexAttention, the dense flash kernel and the GPU's ceilings.

    python -m benchmarks.attention_gpu [--only window,dilation] [--json FILE] [--dry_run]

Only pairs that the pattern makes visible count as useful (`mdseq/sparse/count.py`). The target is 0.70 of the dense
kernel's rate in the same run, over the tile factor 1.25 that a window of 256 costs in blocks of 128, and the rate of
FlexAttention. Times are medians by CUDA events, in bf16.

Shapes: b batch (1), s slots, h heads, d head dimension.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu import Bench, Ceilings
from mdseq.errors import UserError, exit_status
from mdseq.sparse import Documents, Pattern, attend
from mdseq.sparse.count import BACKWARD_TO_FORWARD, forward_flops, visible_pairs

HIDDEN = 1024
TARGET_OF_DENSE, TILE_FACTOR = 0.70, 1.25
LONGEST_DENSE_BACKWARD = 16384
PLAIN_FLEX = "plain flex"  # FlexAttention over the original order: the way without a library of ours
OURS = ("fused", "flash")
ALL = (PLAIN_FLEX, "flex", *OURS)

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One pattern and one size; `part` is what varies."""

    part: str
    tokens: int
    window: int = 256
    dilation: int = 1
    head_dim: int = 64
    num_global: int = 0
    num_documents: int = 1
    engines: tuple[str, ...] = OURS

    @property
    def num_heads(self) -> int:
        return HIDDEN // self.head_dim

    @property
    def pattern(self) -> Pattern:
        return Pattern(self.window, (self.dilation,))

    @property
    def documents(self) -> Documents:
        """One or several, as long as each other, that fill the row."""
        slot_1l, length = torch.arange(self.tokens)[None], self.tokens // self.num_documents
        return Documents(slot_1l // length, slot_1l % length, self.num_documents)

    def useful_flops(self) -> int:
        """Of the forward pass, all heads."""
        pairs = visible_pairs(self.pattern, self.documents.layout(self.num_global), self.num_heads)
        return forward_flops(int(pairs), self.head_dim)


@dataclass(frozen=True)
class Result:
    """One line of the report; rates in TFLOP/s, None where a pass was not measured."""

    case: Case
    engine: str
    forward_ms: float
    both_ms: float | None
    forward_rate: float
    both_rate: float | None
    forward_of_dense: float | None = None
    both_of_dense: float | None = None
    forward_of_flex: float | None = None
    both_of_flex: float | None = None


def cases() -> Iterator[Case]:
    """All that is measured. FlexAttention compiles for every shape, many seconds each, so it runs on a few cases."""
    for head_dim in (64, 128):
        for tokens in (4096, 16384, 65536):
            yield Case("length", tokens, head_dim=head_dim, engines=ALL if tokens > 4096 else OURS)
        for window in (128, 512):
            yield Case("window", 16384, window=window, head_dim=head_dim)
        for dilation in (2, 4, 8):
            engines = ALL if (dilation, head_dim) == (4, 64) else OURS
            yield Case("dilation", 16384, dilation=dilation, head_dim=head_dim, engines=engines)
        for tokens in (4096, 16384, 65536):
            engines = ALL if (tokens, head_dim) == (16384, 64) else OURS
            yield Case("globals", tokens, num_global=16, head_dim=head_dim, engines=engines)
        for num_documents in (16, 128):
            yield Case("documents", 65536, head_dim=head_dim, num_documents=num_documents)


def ours(engine: str, case: Case, bench: Bench) -> tuple[Attention, int]:
    """An engine of ours and the number of its slots."""
    document_bl, position_bl = (x.to(bench.device) for x in (case.documents.document_bl, case.documents.position_bl))
    layout = Documents(document_bl, position_bl, case.num_documents).layout(case.num_global)
    name = "banded" if bench.dry else engine
    return (lambda q, k, v: attend(q, k, v, case.pattern, layout, engine=name)), layout.document_bs.shape[1]


def plain_flex(case: Case, bench: Bench) -> tuple[Attention, int]:
    """FlexAttention with one mask over the row, its globals in front."""
    g, window, dilation = case.num_global, case.window, case.dilation
    slots = g + case.tokens

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = (query - key).abs()
        in_window = (distance <= window * dilation) & (distance % dilation == 0)
        return in_window | (query < g) | (key < g)

    compile_mask = not bench.dry  # compiled, the mask is never there in whole
    block_mask = create_block_mask(visible, None, None, slots, slots, bench.device, _compile=compile_mask)
    call = flex_attention if bench.dry else torch.compile(flex_attention, dynamic=False)

    def attention(q_bshd: Tensor, k_bshd: Tensor, v_bshd: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q_bshd, k_bshd, v_bshd))
        return call(q, k, v, block_mask=block_mask).transpose(1, 2)

    return attention, slots


def dense(bench: Bench) -> Attention:
    backends = [SDPBackend.MATH] if bench.dry else [SDPBackend.FLASH_ATTENTION]

    def attention(q_bshd: Tensor, k_bshd: Tensor, v_bshd: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q_bshd, k_bshd, v_bshd))
        with sdpa_kernel(backends):
            return scaled_dot_product_attention(q, k, v).transpose(1, 2)

    return attention


def timed(bench: Bench, attention: Attention, case: Case, slots: int, backward: bool) -> tuple[float, float | None]:
    """Milliseconds of the forward pass, and of forward and backward."""
    shape = (1, slots, case.num_heads, case.head_dim)
    q, k, v, gradient = (bench.random(*shape) for _ in range(4))
    with torch.no_grad():
        forward = bench.milliseconds(lambda: attention(q, k, v))
    if not backward:
        return forward, None
    inputs = [x.requires_grad_() for x in (q, k, v)]
    return forward, bench.milliseconds(lambda: torch.autograd.grad(attention(*inputs), inputs, gradient))


def result(case: Case, engine: str, flops: int, forward: float, both: float | None) -> Result:
    both_rate = None if both is None else (1 + BACKWARD_TO_FORWARD) * flops / both / 1e9
    return Result(case, engine, forward, both, flops / forward / 1e9, both_rate)


def dense_results(bench: Bench, chosen: Sequence[Case]) -> dict[tuple[int, int], Result]:
    """The dense kernel at every length and head dimension, where all pairs are useful."""
    results = {}
    for head_dim, tokens in sorted({(case.head_dim, case.tokens) for case in chosen}):
        case = Case("dense", tokens, head_dim=head_dim)
        backward = tokens <= LONGEST_DENSE_BACKWARD
        times = timed(bench, dense(bench), case, tokens, backward)
        results[head_dim, tokens] = result(case, "dense", forward_flops(tokens**2 * case.num_heads, head_dim), *times)
    return results


def compare(bench: Bench, chosen: Sequence[Case]) -> Iterator[Result]:
    """All engines on every case, each against the dense kernel and against FlexAttention on the same case."""
    of_dense = dense_results(bench, chosen)
    yield from of_dense.values()
    for case in chosen:
        flops, rival = case.useful_flops(), None
        for engine in case.engines:
            attention, slots = plain_flex(case, bench) if engine == PLAIN_FLEX else ours(engine, case, bench)
            backward = engine != PLAIN_FLEX or not bench.dry  # it has no backward pass on a CPU
            measured = result(case, engine, flops, *timed(bench, attention, case, slots, backward))
            rival = measured if rival is None and engine not in OURS else rival
            yield against(measured, of_dense, rival)
        torch.compiler.reset()  # the next shape is no recompile of this one


def against(measured: Result, of_dense: dict[tuple[int, int], Result], flex: Result | None) -> Result:
    """The same with its ratios. The longest rows have no dense backward pass: there, that of shorter rows stands in."""
    case = measured.case
    forward = of_dense[case.head_dim, case.tokens].forward_rate
    both_rates = [r.both_rate for (head_dim, _), r in of_dense.items() if head_dim == case.head_dim and r.both_rate]
    both = of_dense[case.head_dim, case.tokens].both_rate or max(both_rates, default=None)
    return replace(
        measured,
        forward_of_dense=measured.forward_rate / forward,
        both_of_dense=_ratio(measured.both_rate, both),
        forward_of_flex=_ratio(measured.forward_rate, flex.forward_rate if flex else None),
        both_of_flex=_ratio(measured.both_rate, flex.both_rate if flex else None),
    )


def _ratio(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else value / other


def table_of(results: Sequence[Result], title: str, caption: str) -> Table:
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    names = ["", "d", "tokens", "w", "dil.", "glob.", "docs", "engine", "fwd ms", "f+b ms", "fwd TF/s", "f+b TF/s"]
    for name in [*names, "of dense", "of flex", "target"]:
        table.add_column(name, justify="right")
    previous = None
    for measured in results:
        case = measured.case
        if previous not in (None, case):
            table.add_section()
        same, previous = previous == case, case
        sizes: list[object] = [case.part, case.head_dim, f"{case.tokens:,}"]
        window = [case.window, case.dilation, case.num_global, case.num_documents]
        sizes += [""] * len(window) if case.part == "dense" else window
        table.add_row(
            *(["" if same else str(size) for size in sizes]),
            measured.engine,
            f"{measured.forward_ms:.3f}",
            _optional("{:.3f}", measured.both_ms),
            f"{measured.forward_rate:.0f}",
            _optional("{:.0f}", measured.both_rate),
            _pair(measured.forward_of_dense, measured.both_of_dense),
            _pair(measured.forward_of_flex, measured.both_of_flex),
            target_of(measured),
        )
    return table


def target_of(measured: Result) -> str:
    """Whether an engine of ours reaches the target, forward and backward together."""
    if measured.engine not in OURS or measured.both_of_dense is None:
        return ""
    enough = measured.both_of_dense >= TARGET_OF_DENSE / TILE_FACTOR
    return "[green]yes[/]" if enough and (measured.both_of_flex or 1) >= 1 else "[red]no[/]"


def _optional(form: str, value: float | None) -> str:
    return "" if value is None else form.format(value)


def _pair(forward: float | None, both: float | None) -> str:
    return " ".join(f"{value:.2f}" for value in (forward, both) if value is not None)


def tiny(case: Case) -> Case:
    return replace(case, tokens=case.tokens // 32, window=case.window // 16)


def measure(options: argparse.Namespace) -> None:
    chosen = list(cases())
    known = sorted({case.part for case in chosen})
    parts = known if options.only is None else options.only.split(",")
    if unknown := sorted(set(parts) - set(known)):
        raise UserError(f"--only {options.only}: no part {', '.join(unknown)}; give some of {', '.join(known)}")
    bench = Bench.of(options.dry_run)
    chosen = [tiny(case) if options.dry_run else case for case in chosen if case.part in parts]
    torch.manual_seed(0)
    ceilings = Ceilings.measured(bench)
    results: list[Result] = []
    console = Console() if Console().is_terminal else Console(width=140)
    try:
        for measured in compare(bench, chosen):
            results.append(measured)
            print(f"{len(results)}: {measured.engine} {measured.case}", file=sys.stderr)
            if options.json:  # at once: a run that is cut short keeps what it has
                with options.json.open("a") as file:
                    file.write(
                        json.dumps({"device": str(bench), "ceilings": asdict(ceilings), **asdict(measured)}) + "\n"
                    )
    finally:
        caption = (
            f"Ceilings: {ceilings}. Rates count useful pairs. of dense, of flex: rate over the dense flash kernel's "
            f"and over FlexAttention's (over the original order), forward, then forward and backward. "
            f"target: forward and backward >= {TARGET_OF_DENSE:.2f} / {TILE_FACTOR} of dense, >= FlexAttention."
        )
        console.print(table_of(results, f"{bench}; {HIDDEN} hidden, forward and backward", caption))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="PARTS", help="some of length,window,dilation,globals,documents")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append one object a result")
    parser.add_argument("--dry_run", action="store_true", help="every path on the CPU, tiny, with the engine banded")
    options = parser.parse_args(arguments)
    return exit_status(lambda: measure(options), "stopped")


if __name__ == "__main__":
    raise SystemExit(main())

"""Feed-forward layers and rotary positions on a CUDA GPU, beside the GPU's ceilings and plain PyTorch.

    python -m benchmarks.experts_gpu [--json FILE] [--dry_run]

Products of experts count as TFLOP/s against a product of large square matrices, passes over memory as GB/s of the bytes
that must be read and written once against a large copy. Times are medians by CUDA events, in bf16.

Shapes: n tokens, k experts a token, a = n * k rows, e experts, d hidden and f inner dimension.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.gpu import Bench, Ceilings, Run
from mdseq.errors import exit_status
from mdseq.kernels import combine, dispatch, grouped_linear, rotate, swiglu
from mdseq.kernels.grouped import loop_linear
from mdseq.kernels.rotate import plain_rotate
from mdseq.kernels.swiglu import plain_swiglu
from mdseq.model.assignment import Assignment
from mdseq.model.embedding import rotary_angles
from mdseq.model.experts import DenseFeedForward, RoutedExperts

TOP_K = 2
HEAD_DIM = 64


@dataclass(frozen=True)
class Case:
    """Sizes of a layer and the rows that its experts work on together."""

    hidden: int
    inner: int
    num_experts: int
    rows: int

    def __str__(self) -> str:
        return f"{self.hidden:,} / {self.inner:,} / {self.num_experts} / {self.rows:,}"

    @property
    def flops(self) -> int:
        """Of the three products of a SwiGLU, forward."""
        return 6 * self.rows * self.hidden * self.inner

    def counts(self, spread: str) -> list[int]:
        """Rows of each expert."""
        share_e = {
            "even": [1.0] * self.num_experts,
            "1 / (i + 1)": [1 / (i + 1) for i in range(self.num_experts)],
            "one has half": [self.num_experts - 1.0] + [1.0] * (self.num_experts - 1),
        }[spread]
        counts = [int(self.rows * share / sum(share_e)) for share in share_e]
        return [self.rows - sum(counts[1:]), *counts[1:]]


CASES = (Case(1024, 2048, 8, 32768), Case(2048, 4096, 8, 32768), Case(1024, 512, 64, 131072))
SPREADS = ("even", "1 / (i + 1)", "one has half")


@dataclass(frozen=True)
class Result:
    """One measurement; the rate is in TFLOP/s for products and in TB/s for passes over memory."""

    table: str
    case: str
    what: str
    direction: str
    milliseconds: float
    rate: float
    of_ceiling: float


def of_product(ceilings: Ceilings, table: str, case: str, what: str, direction: str, ms: float, flops: int) -> Result:
    rate = flops / ms * 1e3
    return Result(table, case, what, direction, ms, rate / 1e12, rate / ceilings.product_flops)


def of_copy(ceilings: Ceilings, table: str, case: str, what: str, direction: str, ms: float, num_bytes: int) -> Result:
    rate = num_bytes / ms * 1e3
    return Result(table, case, what, direction, ms, rate / 1e12, rate / ceilings.copy_bytes)


def products(bench: Bench, ceilings: Ceilings, case: Case) -> Iterator[Result]:
    """The products of experts, of any spread of rows, beside one dense layer that does as much work."""
    x_ad = bench.random(case.rows, case.hidden)
    gate_up_eFd = bench.random(case.num_experts, 2 * case.inner, case.hidden)
    down_edf = bench.random(case.num_experts, case.hidden, case.inner)

    def dense(x_ad: Tensor, gate_up_Fd: Tensor, down_df: Tensor) -> Tensor:
        return F.linear(swiglu(F.linear(x_ad, gate_up_Fd)), down_df)

    def of_experts(linear: Run, end_e: Tensor) -> Run:
        return lambda x, gate_up, down: linear(swiglu(linear(x, gate_up, end_e)), down, end_e)

    ways: list[tuple[str, Run, list[Tensor]]] = [("one dense layer", dense, [x_ad, gate_up_eFd[0], down_edf[0]])]
    for spread in SPREADS:
        end_e = torch.tensor(case.counts(spread), device=bench.device).cumsum(0, dtype=torch.int32)
        for name, linear in (("grouped", grouped_linear), ("loop", loop_linear)):
            ways.append((f"{name}, {spread}", of_experts(linear, end_e), [x_ad, gate_up_eFd, down_edf]))
    for what, function, inputs in ways:
        forward, both = bench.forward(function, inputs), bench.both(function, inputs)
        yield of_product(ceilings, "products", str(case), what, "forward", forward, case.flops)
        yield of_product(ceilings, "products", str(case), what, "forward + backward", both, 3 * case.flops)


def passes(bench: Bench, ceilings: Ceilings, case: Case) -> Iterator[Result]:
    """What only moves memory, beside its plain form; bytes are those of each tensor once."""
    a, n, d, f = case.rows, case.rows // TOP_K, case.hidden, case.inner
    size = bench.dtype.itemsize
    expert_nk = torch.rand(n, case.num_experts, device=bench.device).topk(TOP_K).indices
    assignment = Assignment.of(expert_nk, case.num_experts)
    position_nk, token_a = assignment.position_nk, assignment.order_a // TOP_K
    weight_a = torch.rand(a, device=bench.device)
    heads = (1, n, d // HEAD_DIM, HEAD_DIM)
    angles = rotary_angles(torch.arange(n, device=bench.device)[None], HEAD_DIM)
    row_bytes, angle_bytes = (n + a) * d * size, 2 * n * (HEAD_DIM // 2) * 4
    rows_ad, tokens_nd = bench.random(a, d), bench.random(n, d)

    def plain_dispatch(x_nd: Tensor) -> Tensor:
        return x_nd[token_a]

    def plain_combine(y_ad: Tensor) -> Tensor:
        return y_ad[position_nk].sum(dim=1)

    operations: list[tuple[str, Run, Run, list[Tensor], int, int]] = [
        ("dispatch", lambda x: dispatch(x, token_a, position_nk), plain_dispatch, [tokens_nd], row_bytes, row_bytes),
        ("combine", lambda y: combine(y, token_a, position_nk), plain_combine, [rows_ad], row_bytes, row_bytes),
        ("swiglu, weighted", swiglu, plain_swiglu, [bench.random(a, 2 * f), weight_a],
         3 * a * f * size + 4 * a, 5 * a * f * size + 8 * a),
        ("rotate", lambda x: rotate(x, angles), lambda x: plain_rotate(x, angles), [bench.random(*heads)],
         2 * n * d * size + angle_bytes, 2 * n * d * size + angle_bytes),
    ]  # fmt: skip
    for name, ours, plain, inputs, forward_bytes, backward_bytes in operations:
        for kind, function in (("", ours), (", plain", plain)):
            forward, backward = bench.forward(function, inputs), bench.backward(function, inputs)
            yield of_copy(ceilings, "passes", str(case), name + kind, "forward", forward, forward_bytes)
            yield of_copy(ceilings, "passes", str(case), name + kind, "backward", backward, backward_bytes)


def layers(bench: Bench, ceilings: Ceilings, case: Case) -> Iterator[Result]:
    """A whole layer of routed experts beside the dense layer as wide as a token's experts together."""
    n = case.rows // TOP_K
    x_bsd = bench.random(1, n, case.hidden)
    candidates: list[tuple[str, nn.Module]] = [
        (f"{case.num_experts} experts, top {TOP_K}", RoutedExperts(case.hidden, case.inner, case.num_experts, TOP_K)),
        ("dense", DenseFeedForward(case.hidden, TOP_K * case.inner)),
    ]
    for what, layer in candidates:
        layer = layer.to(bench.device, bench.dtype)
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        names, parameters = zip(*layer.named_parameters(), strict=True)

        def function(x: Tensor, *values: Tensor, layer: nn.Module = layer, names: tuple[str, ...] = names) -> Tensor:
            return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

        inputs = [x_bsd, *parameters]
        forward, both = bench.forward(function, inputs), bench.both(function, inputs)
        yield of_product(ceilings, "layers", str(case), what, "forward", forward, case.flops)
        yield of_product(ceilings, "layers", str(case), what, "forward + backward", both, 3 * case.flops)


TABLES = {
    "products": (products, "SwiGLU of sorted rows", "TFLOP/s"),
    "passes": (passes, f"Passes over memory, top {TOP_K}", "TB/s"),
    "layers": (layers, "Whole layers: router, sorting, experts", "TFLOP/s"),
}


def table_of(results: Sequence[Result], title: str, unit: str, ceilings: Ceilings) -> Table:
    """A line for each thing measured, forward and the other direction beside each other."""
    other = results[1].direction
    table = Table(title=title, caption=f"Ceilings: {ceilings}", title_justify="left", caption_justify="left")
    names = ["d / f / experts / rows", "", "ms", unit, "of ceiling", f"{other}, ms", unit, "of ceiling"]
    for index, name in enumerate(names):
        table.add_column(name, justify="left" if index < 2 else "right")
    case = None
    for forward, backward in zip(results[::2], results[1::2], strict=True):
        if case not in (None, forward.case):
            table.add_section()
        cells = [
            cell
            for one in (forward, backward)
            for cell in (f"{one.milliseconds:.3f}", f"{one.rate:.3g}", f"{one.of_ceiling:.2f}")
        ]
        table.add_row("" if case == forward.case else forward.case, forward.what, *cells)
        case = forward.case
    return table


def measure(options: argparse.Namespace) -> None:
    bench = Bench.of(options.dry_run, warmups=3, repeats=15)
    chosen = (Case(128, 32, 4, 64),) if options.dry_run else CASES
    torch.manual_seed(0)
    ceilings = Ceilings.measured(bench)
    console = Console() if Console().is_terminal else Console(width=140)
    console.print(str(bench))
    for part, title, unit in TABLES.values():
        results = [result for case in chosen for result in part(bench, ceilings, case)]
        console.print(table_of(results, title, unit, ceilings))
        if options.json:  # at once: a run that is cut short keeps what it has
            with options.json.open("a") as file:
                for result in results:
                    file.write(
                        json.dumps({"device": str(bench), "ceilings": asdict(ceilings), **asdict(result)}) + "\n"
                    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="append one object a result")
    parser.add_argument("--dry_run", action="store_true", help="every path on the CPU, tiny")
    options = parser.parse_args(arguments)
    return exit_status(lambda: measure(options), "stopped")


if __name__ == "__main__":
    raise SystemExit(main())

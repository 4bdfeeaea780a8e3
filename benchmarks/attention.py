"""Sparse attention on this CPU: against dense attention, Hugging Face's Longformer and compiled FlexAttention.

    python -m benchmarks.attention [--only a,b,c] [--quick]

Part a compares one forward and backward pass over several lengths, b follows its cost to long rows, c compares the
forward pass alone. Everything in a table is measured in turn in the same run, so ratios mean something; absolute times
are of this machine alone. On a GPU: `python -m benchmarks.attention_gpu`.

Shapes: b batch (1), s slots, h heads, d head dimension, D = h * d.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from benchmarks.measure import fastest_seconds, peak_bytes, slope
from mdseq.errors import UserError, exit_status
from mdseq.sparse import Documents, Layout, Pattern, attend

HEADS, HEAD_DIM, WINDOW = 8, 64, 128
HIDDEN = HEADS * HEAD_DIM
GROWN_HEADS = 2  # of the longest rows, to fit time and memory
NO_LONGFORMER = "not installed: pip install -e '.[bench]'"
FLEX_BLOCKS = (64, 128, 256)

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Sizes:
    """Row lengths of each part, and how often each candidate runs."""

    compared: tuple[int, ...] = (1024, 2048, 4096, 8192)
    grown: tuple[int, ...] = (4096, 8192, 16384, 32768, 65536, 131072)
    forward: int = 65536
    repeats: int = 5


QUICK = Sizes(compared=(512, 1024), grown=(512, 1024), forward=2048, repeats=1)


def dense(q_bshd: Tensor, k_bshd: Tensor, v_bshd: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_bshd, k_bshd, v_bshd))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def ours(pattern: Pattern, layout: Layout) -> Attention:
    return lambda q, k, v: attend(q, k, v, pattern, layout)


def row_of(length: int, num_documents: int = 1) -> Documents:
    """One row that equal documents fill."""
    slot_s = torch.arange(length)[None]
    size = length // num_documents
    return Documents(slot_s // size, slot_s % size, num_documents)


def forward_and_backward(attention: Attention, num_slots: int, num_heads: int = HEADS) -> Callable[[], None]:
    """A pass over inputs that exist before and whose gradients do not, as in training."""
    inputs = [torch.randn(1, num_slots, num_heads, HEAD_DIM, requires_grad=True) for _ in range(3)]
    gradient = torch.randn(1, num_slots, num_heads, HEAD_DIM)

    def run() -> None:
        torch.autograd.grad(attention(*inputs), inputs, gradient)

    return run


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face's Longformer


class Given(nn.Module):
    """Stands in for a projection: returns what it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.x_sbD = torch.empty(0)

    def forward(self, _: Tensor) -> Tensor:
        return self.x_sbD.clone()  # as new as a projection's result: the module divides its queries in place


def longformer() -> Any:
    """LongformerSelfAttention with our window, its `attention_window` counting both sides."""
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    config = LongformerConfig(
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        attention_window=[2 * WINDOW],
        attention_probs_dropout_prob=0.0,
        num_hidden_layers=1,
    )
    return LongformerSelfAttention(config, layer_id=0)


def run_longformer(module: Any, x_bsD: Tensor) -> Tensor:
    nothing_bs = torch.zeros(x_bsD.shape[:2])
    (out_bsD,) = module(
        x_bsD,
        attention_mask=nothing_bs,
        is_index_masked=nothing_bs.bool(),
        is_index_global_attn=nothing_bs.bool(),
        is_global_attn=False,
    )
    return out_bsD


def longformer_alone() -> Attention:
    """Its attention without its projections."""
    module, given = longformer(), [Given() for _ in range(3)]
    module.query, module.key, module.value = given

    def attention(*qkv_bshd: Tensor) -> Tensor:
        for part, x_bshd in zip(given, qkv_bshd, strict=True):
            part.x_sbD = x_bshd.flatten(2).transpose(0, 1)
        return run_longformer(module, qkv_bshd[0].detach().flatten(2)).view_as(qkv_bshd[0])

    return attention


def projected(module: Any, attention: Callable[[Tensor], Tensor], length: int) -> Callable[[], None]:
    """A pass from hidden states and the weights of q, k, v to the gradients of both."""
    x_bsD = torch.randn(1, length, HIDDEN, requires_grad=True)
    weights = [p for part in (module.query, module.key, module.value) for p in part.parameters()]
    gradient = torch.randn(1, length, HIDDEN)

    def run() -> None:
        torch.autograd.grad(attention(x_bsD), [x_bsD, *weights], gradient)

    return run


def ours_projected(module: Any, attention: Attention) -> Callable[[Tensor], Tensor]:
    """Our attention behind the Longformer's own projections."""

    def project_and_attend(x_bsD: Tensor) -> Tensor:
        q, k, v = (part(x_bsD).unflatten(2, (HEADS, HEAD_DIM)) for part in (module.query, module.key, module.value))
        return attention(q, k, v).flatten(2)

    return project_and_attend


def check_same_answer(attention: Attention, other: Attention, length: int) -> None:
    """Speed is worth comparing only between things that compute the same."""
    q, k, v = (torch.randn(1, length, HEADS, HEAD_DIM) for _ in range(3))
    torch.testing.assert_close(attention(q, k, v), other(q, k, v), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# a: one forward and backward pass


@dataclass(frozen=True)
class Row:
    """One line of table a: a name, a value a length, the target at the longest, and how both are written."""

    name: str
    values: list[float]
    form: str
    least: float | None = None
    most: float | None = None

    def cells(self) -> list[str]:
        last = self.values[-1]
        target = reached = ""
        if self.least is not None:
            target, reached = f">= {self.least:.3g}", verdict(last >= self.least)
        if self.most is not None:
            target, reached = f"<= {self.most:.3g}", verdict(last <= self.most)
        return [self.name, *(self.form.format(value) for value in self.values), target, reached]


def verdict(reached: bool) -> str:
    return "[green]yes[/]" if reached else "[red]no[/]"


def compare(sizes: Sizes) -> Table:
    """Table a."""
    has_longformer = importlib.util.find_spec("transformers") is not None
    seconds: dict[str, list[float]] = {}
    megabytes: dict[str, list[float]] = {}
    for length in sizes.compared:
        passes = passes_over(length, has_longformer)
        for name, best in fastest_seconds(passes, sizes.repeats).items():
            seconds.setdefault(name, []).append(best)
        for name in ("dense", "ours", "HF", "ours, projected", "HF, projected"):
            if name in passes:
                megabytes.setdefault(name, []).append(peak_bytes(passes[name]) / 1e6)

    def ratio(of: dict[str, list[float]], one: str, other: str) -> list[float]:
        return [a / max(b, 1e-9) for a, b in zip(of[one], of[other], strict=True)]

    lines = [
        Row("dense SDPA, s", seconds["dense"], "{:.4f}"),
        Row("ours, s", seconds["ours"], "{:.4f}"),
        Row("dense / ours", ratio(seconds, "dense", "ours"), "{:.1f}x", least=10),
        Row("dilation 4 / 1", ratio(seconds, "dilation 4", "ours"), "{:.2f}", most=1.15),
        Row("16 globals / none", ratio(seconds, "16 globals", "ours"), "{:.2f}", most=1.15),
        Row("dilations 1, 4 by head / 1", ratio(seconds, "groups", "ours"), "{:.2f}"),
        Row("4 documents / 1", ratio(seconds, "4 documents", "ours"), "{:.2f}"),
        Row("dense SDPA, peak MB", megabytes["dense"], "{:,.0f}"),
        Row("ours, peak MB", megabytes["ours"], "{:,.0f}"),
    ]
    if has_longformer:
        lines += [
            Row("HF Longformer, s", seconds["HF"], "{:.4f}"),
            Row("HF / ours", ratio(seconds, "HF", "ours"), "{:.1f}x", least=3),
            Row("HF Longformer, peak MB", megabytes["HF"], "{:,.0f}"),
            Row("ours / HF, memory", ratio(megabytes, "ours", "HF"), "{:.2f}", most=1 / 3),
            Row("HF / ours, with projections", ratio(seconds, "HF, projected", "ours, projected"), "{:.1f}x"),
            Row("ours / HF, memory, the same", ratio(megabytes, "ours, projected", "HF, projected"), "{:.2f}"),
        ]
    table = table_of(
        ["", *(f"{length:,}" for length in sizes.compared), "target", "reached"],
        f"a. forward and backward, fp32, {HEADS} heads of {HEAD_DIM}, window {WINDOW} a side, "
        f"{torch.get_num_threads()} threads",
    )
    for line in lines:
        table.add_row(*line.cells())
    if not has_longformer:
        table.add_row("HF Longformer", *([""] * len(sizes.compared)), "", NO_LONGFORMER)
    table.caption = (
        "Columns are tokens; targets are for the last. Peak: above what was held before the pass. HF: the attention of "
        "LongformerSelfAttention, its projections replaced by given q, k, v; with projections: the module as it is, "
        "against ours behind the same three."
    )
    return table


def passes_over(length: int, has_longformer: bool) -> dict[str, Callable[[], None]]:
    whole = row_of(length)
    plain = ours(Pattern(WINDOW), whole.layout())
    attentions: dict[str, tuple[Attention, int]] = {
        "dense": (dense, length),
        "ours": (plain, length),
        "dilation 4": (ours(Pattern(WINDOW, (4,)), whole.layout()), length),
        "16 globals": (ours(Pattern(WINDOW), whole.layout(16)), length + 16),
        "groups": (ours(Pattern(WINDOW, (1, 4)), whole.layout()), length),
        "4 documents": (ours(Pattern(WINDOW), row_of(length, 4).layout()), length),
    }
    if has_longformer:
        check_same_answer(plain, alone := longformer_alone(), length)
        attentions["HF"] = (alone, length)
    passes = {name: forward_and_backward(attention, slots) for name, (attention, slots) in attentions.items()}
    if has_longformer:
        module = longformer()
        passes["ours, projected"] = projected(module, ours_projected(module, plain), length)
        passes["HF, projected"] = projected(module, lambda x_bsD: run_longformer(module, x_bsD), length)
    return passes


# ---------------------------------------------------------------------------------------------------------------------
# b: growth


def grow(sizes: Sizes) -> Table:
    """Table b. Lengths take turns as candidates do elsewhere."""
    passes = {
        length: forward_and_backward(ours(Pattern(WINDOW), row_of(length).layout()), length, GROWN_HEADS)
        for length in sizes.grown
    }
    seconds = fastest_seconds(passes, sizes.repeats)
    megabytes = {length: peak_bytes(run) / 1e6 for length, run in passes.items()}
    table = table_of(
        ["tokens", "seconds", "us a token", "peak MB", "KB a token"],
        f"b. growth: forward and backward, {GROWN_HEADS} heads of {HEAD_DIM}, window {WINDOW} a side",
    )
    for length in sizes.grown:
        table.add_row(
            f"{length:,}",
            f"{seconds[length]:.4f}",
            f"{seconds[length] / length * 1e6:.2f}",
            f"{megabytes[length]:,.0f}",
            f"{megabytes[length] / length * 1e3:.2f}",
        )
    table.add_section()
    slopes = [slope(sizes.grown, list(costs.values())) for costs in (seconds, megabytes)]
    for row in (["slope", *(f"{x:.3f}" for x in slopes)], ["<= 1.05", *(verdict(x <= 1.05) for x in slopes)]):
        table.add_row(row[0], row[1], "", row[2], "")
    table.caption = "slope: of the logarithm of the cost over that of the length, least squares"
    return table


# ---------------------------------------------------------------------------------------------------------------------
# c: the forward pass against FlexAttention


def window_mask(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return (query - key).abs() <= WINDOW


def window_blocks(length: int, block: int) -> BlockMask:
    """The blocks that the window touches, those that lie in it whole apart; made without a tensor of n x n."""
    num_blocks = length // block
    reach = -(-WINDOW // block)  # blocks to either side
    inside = max(-1, (WINDOW - block + 1) // block)  # of them, those whose every pair is in the window

    def stretch(offsets: Sequence[int]) -> tuple[Tensor, Tensor]:
        key_qk = torch.arange(num_blocks)[:, None] + torch.tensor(offsets, dtype=torch.long)
        inside_qk = (key_qk >= 0) & (key_qk < num_blocks)
        order = inside_qk.int().argsort(dim=1, descending=True, stable=True)
        index_qk = F.pad(key_qk.clamp(0, num_blocks - 1).gather(1, order), (0, max(0, num_blocks - len(offsets))))
        return inside_qk.sum(1).int()[None, None], index_qk[:, :num_blocks].int()[None, None].contiguous()

    whole = [o for o in range(-reach, reach + 1) if abs(o) <= inside]
    partial = [o for o in range(-reach, reach + 1) if abs(o) > inside]
    return BlockMask.from_kv_blocks(
        *stretch(partial), *stretch(whole), BLOCK_SIZE=block, mask_mod=window_mask, seq_lengths=(length, length)
    )


def flex(length: int, block: int) -> Attention:
    compiled, block_mask = torch.compile(flex_attention, dynamic=False), window_blocks(length, block)

    def attention(q_bshd: Tensor, k_bshd: Tensor, v_bshd: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q_bshd, k_bshd, v_bshd))
        return compiled(q, k, v, block_mask=block_mask).transpose(1, 2)

    return attention


@torch.no_grad()
def compare_forward(sizes: Sizes) -> Table:
    """Table c."""
    length = sizes.forward
    plain = ours(Pattern(WINDOW), row_of(length).layout())
    q, k, v = (torch.randn(1, length, HEADS, HEAD_DIM) for _ in range(3))
    passes: dict[str, Callable[[], Tensor]] = {"ours": lambda: plain(q, k, v)}
    for block in FLEX_BLOCKS:
        attention = flex(length, block)
        check_same_answer(plain, attention, length)  # and compiles
        passes[f"FlexAttention, blocks of {block}"] = lambda attention=attention: attention(q, k, v)  # type: ignore[misc]
    seconds = fastest_seconds(passes, sizes.repeats)
    best = min(value for name, value in seconds.items() if name != "ours")
    table = table_of(
        ["", "seconds", "over the best FlexAttention"],
        f"c. forward at {length:,} tokens, fp32, {HEADS} heads of {HEAD_DIM}, window {WINDOW} a side",
    )
    for name, value in seconds.items():
        table.add_row(name, f"{value:.4f}", f"{value / best:.2f}")
    table.add_section()
    table.add_row("target for ours", "<= 2", verdict(seconds["ours"] <= 2 * best))
    table.caption = "torch.compile'd for this CPU; time to compile and to build the block mask excluded"
    return table


def table_of(columns: Iterable[str], title: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left")
    return table


PARTS: dict[str, Callable[[Sizes], Table]] = {"a": compare, "b": grow, "c": compare_forward}


def measure(only: str, sizes: Sizes) -> None:
    parts = only.split(",")
    if unknown := sorted(set(parts) - set(PARTS)):
        raise UserError(
            f"--only {only}: no part {', '.join(unknown)}; give some of {', '.join(PARTS)}, as in --only a,c"
        )
    torch.manual_seed(0)
    console = Console()
    for part in parts:
        console.print(PARTS[part](sizes))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(PARTS), metavar="PARTS", help="some of a,b,c")
    parser.add_argument("--quick", action="store_true", help="short rows, run once: shows that it runs, no more")
    options = parser.parse_args(arguments)
    sizes = QUICK if options.quick else Sizes()
    return exit_status(lambda: measure(options.only, sizes), "stopped")


if __name__ == "__main__":
    raise SystemExit(main())

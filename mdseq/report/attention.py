"""What a model's attention sees and costs, layer by layer, in one row of documents: the numbers and their table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from rich import box
from rich.table import Table

from mdseq.sparse import NO_DOCUMENT, Documents, Layout, Pattern
from mdseq.sparse.count import forward_flops, visible_pairs
from mdseq.sparse.receptive_field import reachable


@dataclass(frozen=True)
class LayerCost:
    """One layer's attention over the row.

    Attributes:
        pairs_per_token: Keys that a token of the row sees, on average over tokens and heads; global queries counted in.
        of_dense: Share of the pairs that the layer would have without a window.
        flops: Of the forward pass, without the projections.
    """

    pairs_per_token: float
    of_dense: float
    flops: int


@dataclass(frozen=True)
class AttentionRow:
    """A model's patterns, laid over one row.

    Attributes:
        title: What the model is called.
        patterns: Of the layers, in order.
        documents: A single row, as `packed` makes it; tokens that are global are marked.
        num_global: Global slots of each document besides its tokens.
        num_heads, head_dim: Of every layer.
    """

    title: str
    patterns: tuple[Pattern, ...]
    documents: Documents
    num_global: int
    num_heads: int
    head_dim: int

    @property
    def heading(self) -> str:
        documents = f"{len(self.lengths)} documents" if len(self.lengths) > 1 else "one document"
        return f"{self.title}: attention over {self.num_tokens:,} tokens, {documents}"

    @cached_property
    def layout(self) -> Layout:
        return self.documents.layout(self.num_global)

    @cached_property
    def document_s(self) -> np.ndarray:
        """Document of each slot, up to the last that holds something."""
        document_s = self.layout.document_bs[0].numpy()
        return document_s[: max(np.flatnonzero(document_s != NO_DOCUMENT).max() + 1, self.layout.num_global)]

    @property
    def num_tokens(self) -> int:
        return self.documents.document_bl.numel()

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each document, global ones included."""
        return self.documents.document_bl.flatten().bincount().tolist()

    @cached_property
    def ordinary_tokens(self) -> int:
        """Those of the longest document that are not global: the receptive field is that of the one in their middle."""
        marked_bl = self.documents.global_bl
        longest_bl = self.documents.document_bl == int(np.argmax(self.lengths))
        return int((longest_bl if marked_bl is None else longest_bl & ~marked_bl).sum())

    @cached_property
    def seen_through_windows(self) -> list[np.ndarray]:
        """After each layer, the ordinary tokens that bear on the one in their middle: bool [ordinary_tokens]."""
        if not self.ordinary_tokens:
            return [np.zeros(0, dtype=bool) for _ in self.patterns]
        return reachable(self.patterns, self.ordinary_tokens, self.ordinary_tokens // 2)

    def seen_with_globals(self, layer: int) -> int:
        """How many tokens bear on it after a layer (counted from 0), by way of global slots too.

        In the first layer it reads them before they have read anything, in the second they know the whole document.
        """
        marked = max(self.lengths) - self.ordinary_tokens
        has_globals = self.num_global > 0 or marked > 0
        if has_globals and layer > 0:
            return max(self.lengths)
        return int(self.seen_through_windows[layer].sum()) + marked

    def layers_of_patterns(self) -> dict[Pattern, list[int]]:
        """The layers, counted from 1, that have each pattern; patterns in the order of the layers."""
        layers: dict[Pattern, list[int]] = {}
        for layer, pattern in enumerate(self.patterns, start=1):
            layers.setdefault(pattern, []).append(layer)
        return layers

    def costs(self) -> Iterator[LayerCost]:
        """Of each layer, in order."""
        dense = int(visible_pairs(Pattern(None), self.layout, self.num_heads).sum())
        pairs = {
            pattern: int(visible_pairs(pattern, self.layout, self.num_heads).sum()) for pattern in set(self.patterns)
        }
        for pattern in self.patterns:
            per_token = pairs[pattern] / self.num_heads / self.num_tokens
            yield LayerCost(per_token, pairs[pattern] / dense, forward_flops(pairs[pattern], self.head_dim))


def packed(lengths: Sequence[int]) -> Documents:
    """One row of documents of the given lengths, full."""
    document_l = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    position_l = torch.cat([torch.arange(length) for length in lengths])
    return Documents(document_l[None], position_l[None], num_documents=len(lengths))


def attention_table(row: AttentionRow) -> Table:
    """One line a layer, and their sum."""
    costs = list(row.costs())
    table = Table(title=row.heading, title_justify="left", show_footer=True, box=box.SIMPLE_HEAD, pad_edge=False)
    for heading, footer in (
        ("layer", "all"),
        ("window", ""),
        ("dilation", ""),
        ("reach", ""),
        ("pairs\na token", f"{sum(cost.pairs_per_token for cost in costs):,.0f}"),
        ("of\ndense", f"{np.mean([cost.of_dense for cost in costs]):.1%}"),
        ("GFLOP\nforward", _giga(sum(cost.flops for cost in costs))),
        ("reached by\nwindows", ""),
        ("and by\nglobals", ""),
    ):
        table.add_column(heading, footer, justify="right")
    for layer, (pattern, cost) in enumerate(zip(row.patterns, costs, strict=True)):
        table.add_row(
            str(layer + 1),
            "all" if pattern.window is None else f"{pattern.window:,}",
            "" if pattern.window is None else " | ".join(map(str, pattern.dilations)),
            "" if pattern.reach is None else f"{pattern.reach:,}",
            f"{cost.pairs_per_token:,.0f}",
            f"{cost.of_dense:.1%}",
            _giga(cost.flops),
            f"{row.seen_through_windows[layer].sum():,}",
            f"{row.seen_with_globals(layer):,}",
        )
    return table


def _giga(flops: int) -> str:
    return f"{flops / 1e9:,.2f}" if flops < 1e11 else f"{flops / 1e9:,.0f}"

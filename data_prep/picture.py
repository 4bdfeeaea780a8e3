"""The picture that goes with `stats`: lengths of documents, and how well the vocabulary fits each source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from data_prep.statistics import PartStatistics, length_edges
from mdseq.data.format import Split

MAX_PARTS = 20
MAX_LABEL_CHARACTERS = 28
LEAST_ROWS = 4

Colors = Mapping[str, tuple[float, ...]]


def plot_stats(parts: Sequence[PartStatistics], title: str, path: Path) -> None:
    """Draw the MAX_PARTS parts with the most tokens as a PNG, each source in a colour of its own.

    Args:
        parts: What `stats` returned, at least one.
        title: Heading of the figure.
        path: Where the PNG goes.
    """
    largest = sorted(parts, key=lambda part: -part.tokens)[:MAX_PARTS]
    shown = [part for part in parts if part in largest]
    sources = list(dict.fromkeys(part.source for part in shown))
    palette = plt.get_cmap("tab10" if len(sources) <= 10 else "tab20")
    colors = {source: palette(index) for index, source in enumerate(sources)}
    splits = list(dict.fromkeys(part.split for part in shown))

    height = max(4.5, 1.2 + 2.2 * len(splits), 1.6 + 0.3 * len(shown))
    figure = plt.figure(figsize=(16, height), dpi=120, layout="constrained")
    figure.suptitle(title if len(shown) == len(parts) else f"{title} (the {len(shown)} largest of {len(parts)} parts)")
    left, right = figure.subfigures(1, 2, squeeze=False)[0]
    lengths = left.subplots(len(splits), 1, sharex=True, squeeze=False)[:, 0]
    for axis, split in zip(lengths, splits, strict=True):
        _plot_lengths(axis, split, [part for part in shown if part.split == split], colors)
    _limit_to_lengths(lengths[-1], shown)
    compression, fallback = right.subplots(1, 2, sharey=True)
    _plot_bars(compression, shown, colors, [part.tokens_per_byte for part in shown], "tokens a byte of text", "{:.3f}")
    percent = [100 * part.byte_fallback for part in shown]
    _plot_bars(fallback, shown, colors, percent, "single-byte tokens, %", "{:.2f}")
    figure.savefig(path)
    plt.close(figure)


def _plot_lengths(axis: Axes, split: Split, parts: Sequence[PartStatistics], colors: Colors) -> None:
    """Share of each source's documents in each bin of length."""
    for part in parts:
        shares = 100 * np.array(part.length_histogram) / part.documents
        axis.stairs(shares, length_edges(), color=colors[part.source], linewidth=1.8)
    axis.set(title=f"length of documents, {split}", ylabel="% of a source", ylim=(0, None))
    axis.grid(alpha=0.3)


def _limit_to_lengths(axis: Axes, parts: Sequence[PartStatistics]) -> None:
    edges = length_edges()
    occupied = np.flatnonzero(np.sum([part.length_histogram for part in parts], axis=0))
    axis.set_xscale("log", base=2)
    axis.set_xlim(edges[max(0, occupied[0] - 1)], edges[occupied[-1] + 2])
    axis.xaxis.set_major_formatter(FuncFormatter(lambda length, _: f"{length:,.0f}"))
    axis.tick_params(axis="x", rotation=30)
    axis.set_xlabel("tokens in a document")


def _plot_bars(
    axis: Axes, parts: Sequence[PartStatistics], colors: Colors, values: list[float], title: str, form: str
) -> None:
    """A bar for each part, from the top, labelled with its value."""
    places = np.arange(len(parts))
    bars = axis.barh(places, values, color=[colors[part.source] for part in parts], height=0.7)
    axis.bar_label(bars, [form.format(value) for value in values], padding=4)
    axis.set_yticks(places, [f"{_shortened(part.source)} · {part.split}" for part in parts])
    # Room for the labels; and a few bars are not drawn as thick as the page.
    axis.set(title=title, xlim=(0, 1.3 * max(values) or 1), ylim=(max(len(parts), LEAST_ROWS) - 0.4, -0.6))
    axis.grid(axis="x", alpha=0.3)


def _shortened(name: str) -> str:
    return name if len(name) <= MAX_LABEL_CHARACTERS else f"{name[: MAX_LABEL_CHARACTERS - 1]}…"

"""A model's attention as a picture: the mask of every kind of layer, and how far a token sees through all of them.

Shapes: s slots, g global slots, c cells on a side.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb

from mdseq.report.attention import AttentionRow
from mdseq.report.masks import cells_of, pooled_mask
from mdseq.sparse import Pattern

COLOURS = ("#1f6fb4", "#2a9d6f", "#c2571a", "#8a4fb0", "#b8336a", "#6b7a1f", "#3a7f8f", "#7f5539")
GLOBAL_COLOUR = "#2b2b2b"
_ACROSS = 4  # masks side by side
_CELLS = 400  # on a side of a mask: about its pixels
_GLOBAL_BAND = 20  # cells that the global slots take at least, however few they are
_CLOSE_UP = 32  # tokens of the close-up
_CLOSE_UP_GLOBALS = 2  # global slots of each document there
_MOST_NAMES = 8  # numbers in the title of a mask
_PIXELS_ACROSS = 1200  # of the receptive field
_SMALL: dict[str, Any] = {"fontsize": 9, "color": "#444444"}


@dataclass(frozen=True)
class MaskPanel:
    """The mask of the heads of one dilation, in the layers that share a pattern."""

    title: str
    pattern: Pattern
    dilation: int
    colour: str


def plot_attention(row: AttentionRow, file: Path | IO[bytes]) -> None:
    """Write the PNG.

    Args:
        row: What to draw.
        file: Where it goes, a path or a file open for writing.
    """
    panels, layer_colours = _panels(row)
    lines = -(-len(panels) // _ACROSS)
    across = min(len(panels), _ACROSS)
    heights = [0.7, *[6.3] * lines, 1.2 + min(0.3 * _first_complete(row), 6.0)]
    figure = plt.figure(figsize=(max(3.5 * across, 10.5), sum(heights)), dpi=130)
    figure.set_layout_engine("constrained", h_pad=0.06, w_pad=0.06)
    heading, *parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    heading.text(0.5, 0.62, row.heading, ha="center", va="center", fontsize=15, weight="bold")
    heading.text(0.5, 0.18, _legend(row), ha="center", va="center", fontsize=9.5, color="#444444")
    for line, part in enumerate(parts[:-1]):
        axes = part.subplots(2, across, height_ratios=[3.3, 2.6], squeeze=False)
        for column in range(across):
            number = line * _ACROSS + column
            if number < len(panels):
                _draw_mask(axes[0, column], row, panels[number])
                _draw_close_up(axes[1, column], row, panels[number])
            else:
                axes[0, column].set_axis_off()
                axes[1, column].set_axis_off()
    _draw_receptive_field(parts[-1].subplots(), row, layer_colours)
    figure.savefig(file, format="png")
    plt.close(figure)


def _panels(row: AttentionRow) -> tuple[list[MaskPanel], list[str]]:
    """One panel for each dilation of each distinct pattern, and the colour of each layer."""
    panels, layer_colours = [], [""] * len(row.patterns)
    for number, (pattern, layers) in enumerate(row.layers_of_patterns().items()):
        colour = COLOURS[number % len(COLOURS)]
        for layer in layers:
            layer_colours[layer - 1] = colour
        name = _name_layers(layers)
        if pattern.window is None:
            panels.append(MaskPanel(f"{name}\nwhole document", pattern, 1, colour))
            continue
        for heads, dilation in pattern.groups(row.num_heads):
            which = "" if len(pattern.dilations) == 1 else f"heads {heads.start + 1} to {heads.stop}: "
            title = f"{name}\n{which}window {pattern.window}, dilation {dilation}"
            panels.append(MaskPanel(title, pattern, dilation, colour))
    return panels, layer_colours


def _draw_mask(axis: Axes, row: AttentionRow, panel: MaskPanel) -> None:
    """All slots, pooled to cells; the global ones magnified, so that they can be seen."""
    document_s, g = row.document_s, row.layout.num_global
    cell_s = cells_of(len(document_s), g, _CELLS)
    share_cc = pooled_mask(panel.pattern, panel.dilation, document_s, g, cell_s)
    global_cells = int(cell_s[g - 1]) + 1 if g else 0
    token_cells = len(share_cc) - global_cells
    repeat_c = np.ones(len(share_cc), dtype=int)
    repeat_c[:global_cells] = max(1, _GLOBAL_BAND * token_cells // (_CELLS * max(global_cells, 1)))
    band = int(repeat_c[:global_cells].sum())
    picture = _shaded(share_cc, global_cells, panel.colour).repeat(repeat_c, axis=0).repeat(repeat_c, axis=1)
    axis.imshow(picture, interpolation="hanning")  # cells and pixels differ in size: sampling them would make moire

    num_tokens = len(document_s) - g
    per_token = token_cells / max(num_tokens, 1)
    marks = [0, num_tokens // 2, num_tokens]
    _label(axis, [(band + mark * per_token - 0.5, f"{mark:,}") for mark in marks], band)
    for boundary in _boundaries(document_s[g:]):
        _rule(axis, band + boundary * per_token - 0.5, "#b0b0b0")
    axis.set_title(panel.title, color=panel.colour, fontsize=10.5, weight="bold")


def _draw_close_up(axis: Axes, row: AttentionRow, panel: MaskPanel) -> None:
    """A few dozen tokens, pair by pair: the first of the row, or those around the beginning of its second document."""
    document_s, g = row.document_s, row.layout.num_global
    boundaries = _boundaries(document_s[g:])
    first = max(0, boundaries[0] - _CLOSE_UP // 2) if boundaries else 0
    shown_s = document_s[g + first : g + first + _CLOSE_UP]
    owners = np.unique(shown_s) if len(shown_s) else document_s[:1]
    shown_of = [np.flatnonzero(document_s[:g] == document)[:_CLOSE_UP_GLOBALS] for document in owners]
    shown_g = np.concatenate(shown_of)
    band = len(shown_g)
    slots = np.concatenate([document_s[shown_g], shown_s])
    mask_ss = pooled_mask(panel.pattern, panel.dilation, slots, band, np.arange(len(slots)))
    axis.imshow(_shaded(mask_ss, band, panel.colour), interpolation="nearest")
    last = max(len(shown_s) - 1, 0)
    _label(axis, [(band, f"{first:,}"), (band + last, f"{first + last:,}")], band)
    edges = np.arange(len(slots) + 1) - 0.5
    axis.hlines(edges, -0.5, len(slots) - 0.5, colors="#e8e8e8", linewidth=0.5)
    axis.vlines(edges, -0.5, len(slots) - 0.5, colors="#e8e8e8", linewidth=0.5)
    for boundary in _boundaries(shown_s):
        _rule(axis, band + boundary - 0.5, "#b0b0b0")
    where = "where a document begins" if first else "the first tokens"
    axis.set_xlabel(f"close-up: {where}, pair by pair", **_SMALL)


def _draw_receptive_field(axis: Axes, row: AttentionRow, layer_colours: list[str]) -> None:
    """One line a layer: the tokens that the one in the middle has heard of, through windows alone."""
    length, depth = max(row.ordinary_tokens, 1), _first_complete(row)
    pixels = min(length, _PIXELS_ACROSS)
    pixel_n = np.arange(row.ordinary_tokens) * pixels // length
    size = np.bincount(pixel_n, minlength=pixels).clip(min=1)
    picture = np.ones((depth, pixels, 3))
    for layer, seen_n in enumerate(row.seen_through_windows[:depth]):
        share = np.bincount(pixel_n, weights=seen_n, minlength=pixels) / size
        picture[layer] = _mix(_shade(share), layer_colours[layer])
        count = int(seen_n.sum())
        axis.text(1.008 * length, layer + 1, f"{count:,} tokens, {count / length:.0%}", **_SMALL, va="center")
    axis.imshow(picture, aspect="auto", interpolation="nearest", extent=(0, length, depth + 0.5, 0.5))
    axis.hlines(np.arange(1, depth) + 0.5, 0, length, colors="white", linewidth=2)
    names = [f"after layer {layer + 1}" for layer in range(depth)]
    if depth < len(row.patterns):
        names[-1] = f"from layer {depth} on"
    axis.set_yticks(range(1, depth + 1), names, fontsize=9)
    for label, colour in zip(axis.get_yticklabels(), layer_colours, strict=False):
        label.set_color(colour)
    axis.set_xlim(0, length)
    axis.set_xlabel("token of the document", **_SMALL)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.tick_params(axis="x", labelsize=8.5)
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.set_title(_describe_field(row), fontsize=10.5)


def _first_complete(row: AttentionRow) -> int:
    """Layers until windows have brought the whole document together, or all of them."""
    complete = [bool(seen_n.all()) for seen_n in row.seen_through_windows]
    return complete.index(True) + 1 if True in complete else len(complete)


def _legend(row: AttentionRow) -> str:
    parts = ["queries down, keys across", "the paler, the fewer of a cell's pairs are visible"]
    if row.layout.num_global:
        parts.append("G: global slots, magnified")
    if len(row.lengths) > 1:
        parts.append("grey lines: where a document begins")
    return "  ·  ".join(parts)


def _describe_field(row: AttentionRow) -> str:
    text = "Receptive field of a token in the middle, through windows alone"
    if row.layout.num_global and len(row.patterns) > 1:
        text += "; through global slots, two layers reach everything"
    return text


def _name_layers(layers: list[int]) -> str:
    """`layers 1 to 3, 7 and 8`"""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    names: list[str] = []
    for run in runs:
        names += [f"{run[0]} to {run[-1]}"] if len(run) > 2 else map(str, run)
    if len(names) > _MOST_NAMES:
        names[_MOST_NAMES - 2 : -1] = ["..."]
    *others, last = names
    return f"{'layers' if len(layers) > 1 else 'layer'} {', '.join(others)}{' and ' if others else ''}{last}"


def _boundaries(document_s: np.ndarray) -> list[int]:
    """Where another document begins."""
    return (np.flatnonzero(np.diff(document_s)) + 1).tolist()


def _shaded(share_cc: np.ndarray, global_cells: int, colour: str) -> np.ndarray:
    """Windows in the pattern's colour, what has to do with global slots in their own: RGB [c, c, 3]."""
    shade_cc = _shade(share_cc)
    picture = _mix(shade_cc, colour)
    picture[:global_cells] = _mix(shade_cc[:global_cells], GLOBAL_COLOUR)
    picture[:, :global_cells] = _mix(shade_cc[:, :global_cells], GLOBAL_COLOUR)
    return picture


def _shade(share: np.ndarray) -> np.ndarray:
    """How dark a share is drawn: a single pair among many can still be seen."""
    return np.where(share > 0, 0.2 + 0.8 * np.sqrt(share), 0.0)


def _mix(shade: np.ndarray, colour: str) -> np.ndarray:
    return 1 - shade[..., None] * (1 - np.array(to_rgb(colour)))


def _label(axis: Axes, marks: list[tuple[float, str]], band: int) -> None:
    """Tokens by their place among the ordinary ones; the band of global slots by its letter."""
    places, texts = [place for place, _ in marks], [text for _, text in marks]
    if band:
        places, texts = [band / 2 - 0.5, *places], ["G", *texts]
        if marks[0][0] - places[0] < 0.08 * marks[-1][0]:  # no room for the letter beside the first number
            texts[1] = ""
        _rule(axis, band - 0.5, "#888888")
    axis.set_xticks(places, texts, fontsize=8)
    axis.set_yticks(places, texts, fontsize=8)
    axis.tick_params(length=2)
    axis.xaxis.tick_top()
    axis.spines[:].set_color("#888888")


def _rule(axis: Axes, place: float, colour: str) -> None:
    axis.axhline(place, color=colour, linewidth=0.8)
    axis.axvline(place, color=colour, linewidth=0.8)

"""Pictures of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes


def plot_run(metrics: list[dict[str, Any]], title: str, path: Path) -> None:
    """The loss curve, the loss by noise level and the expert load of a run, as one PNG.

    Args:
        metrics: Logged steps, at least one.
        title: Heading of the figure.
        path: Where the PNG goes.
    """
    has_experts = bool(metrics[-1]["expert_load"])
    figure, axes = plt.subplots(1, 3 if has_experts else 2, figsize=(15 if has_experts else 10, 4.2), dpi=120)
    figure.suptitle(title)
    _plot_loss(axes[0], metrics)
    _plot_noise_levels(axes[1], metrics)
    if has_experts:
        _plot_expert_load(axes[2], metrics)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _plot_loss(axis: Axes, metrics: list[dict[str, Any]]) -> None:
    steps = [line["step"] for line in metrics]
    for name, style in (("loss", "-"), ("denoising", "--"), ("anchor", "-."), ("rounding", ":")):
        if not any(line[name] for line in metrics):
            continue
        axis.plot(steps, [line[name] for line in metrics], style, label=name, linewidth=1.5)
    held_out = [(line["step"], line["valid_loss"]) for line in metrics if "valid_loss" in line]
    if held_out:
        axis.plot(*zip(*held_out, strict=True), "o", label="held-out loss", markersize=4)
    axis.set(xlabel="step", ylabel="per target token", title="loss", ylim=(0, None))
    axis.legend()
    axis.grid(alpha=0.3)


def _plot_noise_levels(axis: Axes, metrics: list[dict[str, Any]]) -> None:
    """The mean loss at each noise level over the first and the last tenth of the run."""
    tenth = max(1, len(metrics) // 10)
    for part, label in ((metrics[:tenth], "first tenth of the run"), (metrics[-tenth:], "last tenth")):
        levels = [i for i in range(10) if any(f"noise_level_{i}" in line for line in part)]
        means = [np.mean([line[f"noise_level_{i}"] for line in part if f"noise_level_{i}" in line]) for i in levels]
        axis.plot([(i + 0.5) / 10 for i in levels], means, "o-", label=label)
    axis.set(xlabel="noise level t / T", ylabel="loss", title="loss by noise level", xlim=(0, 1), ylim=(0, None))
    axis.legend()
    axis.grid(alpha=0.3)


def _plot_expert_load(axis: Axes, metrics: list[dict[str, Any]]) -> None:
    """Each expert's share of its layer's assignments over the last tenth, relative to an even share."""
    tenth = max(1, len(metrics) // 10)
    load_je = np.mean([line["expert_load"] for line in metrics[-tenth:]], axis=0)
    relative_je = load_je * load_je.shape[1]
    image = axis.imshow(relative_je, cmap="RdBu_r", vmin=0, vmax=2, aspect="auto")
    for (layer, expert), value in np.ndenumerate(relative_je):
        color = "white" if abs(value - 1) > 0.6 else "black"
        axis.text(expert, layer, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)
    axis.set(xlabel="expert", ylabel="layer", title="expert load, 1 = even share")
    axis.set_xticks(range(relative_je.shape[1]))
    axis.set_yticks(range(relative_je.shape[0]))
    axis.figure.colorbar(image, ax=axis)

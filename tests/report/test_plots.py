"""A run's picture holds what it should, with and without experts, for long runs and for the first line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.image
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure

from mdseq.report.plots import plot_run


def run_metrics(num_lines: int, num_layers: int = 0, num_experts: int = 4, anchor: float = 0.0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [
        {
            "step": 10 * (i + 1),
            "loss": 5.0 / (i + 1) + 0.1,
            "denoising": 3.0 / (i + 1),
            "anchor": anchor / (i + 1),
            "rounding": 2.0 / (i + 1),
            "expert_load": rng.dirichlet(np.ones(num_experts), num_layers).tolist(),
        }
        | {f"noise_level_{level}": float(level) for level in range(10) if (level + i) % 3}
        for i in range(num_lines)
    ]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved, still whole."""
    figures: list[Figure] = []
    monkeypatch.setattr(plt, "close", figures.append)
    return figures


@pytest.mark.parametrize("num_lines", [1, 2, 60])
@pytest.mark.parametrize("num_layers", [0, 3])
def test_a_png_of_plausible_size(tmp_path: Path, num_lines: int, num_layers: int) -> None:
    path = tmp_path / "report.png"
    plot_run(run_metrics(num_lines, num_layers), "a run", path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert 15_000 < path.stat().st_size < 500_000
    pixels = matplotlib.image.imread(path)
    height, width = pixels.shape[:2]
    assert 400 < height < 700
    assert width / height == pytest.approx((15 if num_layers else 10) / 4.2, rel=0.01)
    assert pixels[..., :3].std() > 0.05  # something is drawn


def test_the_panels_say_what_they_show(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_run(run_metrics(60, num_layers=3), "run quickstart, step 600", tmp_path / "report.png")
    (figure,) = drawn
    assert figure.get_suptitle() == "run quickstart, step 600"
    loss, noise, load = figure.axes[:3]
    assert [axis.get_title() for axis in (loss, noise, load)] == [
        "loss", "loss by noise level", "expert load, 1 = even share"
    ]  # fmt: skip
    assert all(axis.get_xlabel() and axis.get_ylabel() for axis in (loss, noise, load))
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["loss", "denoising", "rounding"]


def test_the_curves_are_the_metrics(tmp_path: Path, drawn: list[Figure]) -> None:
    metrics = run_metrics(60)
    plot_run(metrics, "a run", tmp_path / "report.png")
    loss, noise = drawn[0].axes
    for curve, name in zip(loss.get_lines(), ("loss", "denoising", "rounding"), strict=True):
        assert curve.get_xdata().tolist() == [line["step"] for line in metrics]
        assert curve.get_ydata().tolist() == [line[name] for line in metrics]
    for curve in noise.get_lines():  # the mean loss of each noise level over six lines
        assert curve.get_xdata().tolist() == pytest.approx([(level + 0.5) / 10 for level in range(10)])
        assert list(curve.get_ydata()) == list(range(10))


def test_parts_that_the_loss_lacks_are_not_drawn(tmp_path: Path, drawn: list[Figure]) -> None:
    metrics = [line | {"denoising": 0.0} for line in run_metrics(20, anchor=4.0)]
    plot_run(metrics, "a run", tmp_path / "report.png")
    loss, _ = drawn[0].axes
    assert [curve.get_label() for curve in loss.get_lines()] == ["loss", "anchor", "rounding"]
    assert loss.get_lines()[1].get_ydata().tolist() == [line["anchor"] for line in metrics]


def test_the_load_is_relative_to_an_even_share(tmp_path: Path, drawn: list[Figure]) -> None:
    metrics = run_metrics(10, num_layers=2)
    metrics[-1]["expert_load"] = [[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]]
    plot_run(metrics, "a run", tmp_path / "report.png")
    (image,) = drawn[0].axes[2].get_images()
    assert image.get_array().tolist() == [[1, 1, 1, 1], [4, 0, 0, 0]]
    assert [text.get_text() for text in drawn[0].axes[2].texts] == ["1.00"] * 4 + ["4.00"] + ["0.00"] * 3


def test_figures_are_not_kept(tmp_path: Path) -> None:
    before = plt.get_fignums()
    plot_run(run_metrics(3, num_layers=1), "a run", tmp_path / "report.png")
    assert plt.get_fignums() == before

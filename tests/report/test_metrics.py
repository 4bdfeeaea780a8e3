"""Metrics are whole lines, continue where a run resumed, and show in TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mdseq.diffusion.statistics import PARTS
from mdseq.report.metrics import METRICS_FILE, TENSORBOARD_DIR, MetricsWriter, read_metrics
from mdseq.report.spread import Spread


def line(step: int, loss: float = 2.0, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": loss, "denoising": 1.0, "learning_rate": 1e-3, "expert_load": []} | more


def write(run_dir: Path, first_step: int, *lines: dict[str, Any]) -> None:
    writer = MetricsWriter(run_dir, first_step)
    for metrics in lines:
        writer.write(metrics)
    writer.close()


def events(run_dir: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(run_dir / TENSORBOARD_DIR), size_guidance={"tensors": 0, "scalars": 0})
    return accumulator.Reload()


def scalars(run_dir: Path, tag: str) -> dict[int, float]:
    return {event.step: event.value for event in events(run_dir).Scalars(tag)}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    lines = [line(10), line(20, expert_load=[[0.25, 0.75]], noise_level_3=0.5)]
    write(tmp_path, 0, *lines)
    assert read_metrics(tmp_path) == lines
    assert [json.loads(text) for text in (tmp_path / METRICS_FILE).read_text().splitlines()] == lines


def test_a_run_without_metrics(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


def test_lines_are_there_at_once(tmp_path: Path) -> None:
    """A killed run keeps every line that it wrote."""
    writer = MetricsWriter(tmp_path, 0)
    writer.write(line(10))
    assert read_metrics(tmp_path) == [line(10)]
    writer.close()


def test_a_resumed_run_drops_what_will_come_again(tmp_path: Path) -> None:
    write(tmp_path, 0, line(10, 4.0), line(20, 3.0), line(30, 99.0), line(40, 99.0))
    write(tmp_path, 20, line(30, 2.0))
    assert [(entry["step"], entry["loss"]) for entry in read_metrics(tmp_path)] == [(10, 4.0), (20, 3.0), (30, 2.0)]
    assert scalars(tmp_path, "loss/loss") == {10: 4.0, 20: 3.0, 30: 2.0}


def test_a_run_from_the_start_drops_everything(tmp_path: Path) -> None:
    write(tmp_path, 0, line(10, 4.0))
    write(tmp_path, 0, line(10, 5.0))
    assert [entry["loss"] for entry in read_metrics(tmp_path)] == [5.0]


@pytest.mark.parametrize("cut", ["", "{", '{"step": 30, "lo', '{"step": 30, "loss": 1.0'])
def test_a_last_line_that_was_cut_short(tmp_path: Path, cut: str) -> None:
    write(tmp_path, 0, line(10), line(20))
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write(cut)
    assert read_metrics(tmp_path) == [line(10), line(20)]
    write(tmp_path, 20, line(30))
    assert read_metrics(tmp_path) == [line(10), line(20), line(30)]


def test_tensorboard_tags(tmp_path: Path) -> None:
    write(
        tmp_path,
        0,
        line(
            10, balance=1.5, router_z=0.1, rounding=0.2, anchor=0.3, tokens=512, tokens_per_second=99.0, grad_norm=0.7,
            peak_memory_gib=0.5,
            noise_level_0=0.1, noise_level_9=0.9, expert_load=[[0.25, 0.75], [0.5, 0.5]],
        ),
    )  # fmt: skip
    assert set(events(tmp_path).Tags()["scalars"]) == {
        "loss/loss", "loss/denoising", "loss/anchor", "loss/rounding", "loss/balance", "loss/router_z",
        "loss_by_noise_level/noise_level_0", "loss_by_noise_level/noise_level_9",
        "optimiser/grad_norm", "optimiser/learning_rate",
        "throughput/tokens", "throughput/tokens_per_second", "throughput/peak_memory_gib",
        "router_busiest_expert/layer_00", "router_busiest_expert/layer_01",
        "router_idlest_expert/layer_00", "router_idlest_expert/layer_01",
    }  # fmt: skip
    assert scalars(tmp_path, "loss/anchor") == {10: pytest.approx(0.3)}
    assert scalars(tmp_path, "router_busiest_expert/layer_00") == {10: 1.5}
    assert scalars(tmp_path, "router_idlest_expert/layer_00") == {10: 0.5}
    assert scalars(tmp_path, "router_busiest_expert/layer_01") == {10: 1.0}


def test_all_that_the_objective_reports_has_a_tag(tmp_path: Path) -> None:
    write(tmp_path, 0, {"step": 10, "expert_load": []} | dict.fromkeys(PARTS, 0.5))
    assert set(events(tmp_path).Tags()["scalars"]) == {f"loss/{part}" for part in PARTS}


def test_all_that_is_told_of_a_spread_has_a_tag(tmp_path: Path) -> None:
    write(tmp_path, 0, line(10) | Spread(0.2, 0.4, 0.1, 0.5, 1, "n2").metrics())
    assert scalars(tmp_path, "ranks/own_seconds_slowest") == {10: pytest.approx(0.4)}
    assert scalars(tmp_path, "ranks/slowest_rank") == {10: 1.0}


def test_text_keeps_its_line_breaks(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0)
    writer.write_text("samples/0", "def f():\n    return 1", step=10)
    writer.close()
    accumulator = events(tmp_path)
    (tag,) = accumulator.Tags()["tensors"]
    assert tag.startswith("samples/0")
    (event,) = accumulator.Tensors(tag)
    assert event.step == 10
    assert event.tensor_proto.string_val[0].decode() == "    def f():\n        return 1"

"""The run's metrics as files: one JSON object a logged step, and TensorBoard scalars.

`metrics.jsonl` keys: step; loss, denoising, anchor, rounding, balance, router_z (means since the last line, 0 for what
the loss lacks); noise_level_0 .. noise_level_9 (mean loss of the documents whose t fell into that tenth of [0, T);
absent where none did); valid_loss (of held-out rows, where it was computed); tokens (real ones since the start),
tokens_per_second, grad_norm, skipped_steps (so far), learning_rate, peak_memory_gib (of rank 0 so far);
own_seconds_median, own_seconds_slowest, data_seconds_slowest, step_seconds, slowest_rank (see Spread; where several
ranks were measured in this step); and expert_load (a list a layer of each expert's share of assignments; empty without
experts).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mdseq.files import write_whole

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_DIR = "tensorboard"
_SECTIONS = {
    **dict.fromkeys(("loss", "denoising", "anchor", "rounding", "balance", "router_z", "valid_loss"), "loss"),
    **dict.fromkeys(("grad_norm", "learning_rate", "skipped_steps"), "optimiser"),
    **dict.fromkeys(("tokens", "tokens_per_second", "peak_memory_gib"), "throughput"),
    **dict.fromkeys(
        ("own_seconds_median", "own_seconds_slowest", "data_seconds_slowest", "step_seconds", "slowest_rank"), "ranks"
    ),
}


class MetricsWriter:
    """Appends to a run's metrics; what a stopped run logged beyond `first_step` is dropped, for it will come again."""

    def __init__(self, run_dir: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        kept = [line for line in read_metrics(run_dir) if line["step"] <= first_step]
        write_whole(run_dir / METRICS_FILE, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = (run_dir / METRICS_FILE).open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(run_dir / TENSORBOARD_DIR), purge_step=first_step + 1)

    def write(self, metrics: dict[str, Any]) -> None:
        """Write one step's metrics, which must hold "step"."""
        self._write_line(metrics)
        step = metrics["step"]
        for tag, value in _scalars(metrics).items():
            self._tensorboard.add_scalar(tag, value, step)

    def write_text(self, tag: str, text: str, step: int) -> None:
        """Show text in TensorBoard, its line breaks kept."""
        indented = "\n".join("    " + line for line in text.splitlines())
        self._tensorboard.add_text(tag, indented, step)

    def close(self) -> None:
        self._file.close()
        self._tensorboard.close()

    def _write_line(self, metrics: dict[str, Any]) -> None:
        self._file.write(json.dumps(metrics) + "\n")
        self._file.flush()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The logged steps of a run; a last line that a crash cut short is left out."""
    path = run_dir / METRICS_FILE
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def _scalars(metrics: dict[str, Any]) -> dict[str, float]:
    """TensorBoard tags, in sections whose alphabetical order puts the loss first.

    Of the expert load, the busiest and the idlest expert of each layer are shown, relative to an even share.
    """
    tags: dict[str, float] = {}
    for key, value in metrics.items():
        if key == "expert_load":
            for layer, load_e in enumerate(value):
                tags[f"router_busiest_expert/layer_{layer:02d}"] = max(load_e) * len(load_e)
                tags[f"router_idlest_expert/layer_{layer:02d}"] = min(load_e) * len(load_e)
        elif key.startswith("noise_level_"):
            tags[f"loss_by_noise_level/{key}"] = value
        elif key != "step":
            tags[f"{_SECTIONS[key]}/{key}"] = value
    return tags

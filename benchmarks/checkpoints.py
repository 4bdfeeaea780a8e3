"""What a checkpoint costs: how long training waits for it, and how fast it is written, read and checked.

python -m benchmarks.checkpoints [--layers 8]

One process; `torch.save` and `torch.load` of the same bytes, in the same run, are what it is compared with.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mdseq.diffusion.objective import DiffusionObjective
from mdseq.engine.agreement import Agreement
from mdseq.engine.build import build_engine, start_processes, stop_processes
from mdseq.engine.checkpoint import CheckpointManifest, CheckpointWriter, damaged_files, load_checkpoint
from mdseq.engine.config import load_engine_config
from mdseq.engine.ema import WeightAverage
from mdseq.engine.partitions import MOMENTS, partitions_of
from mdseq.spec import load_spec
from tests.dist.test_engine import rows

VOCAB = 8192
DS_CONFIG = Path(__file__).parent.parent / "ds_configs" / "zero2.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    spec = load_spec(
        None,
        [
            "model.hidden_dim=512", "model.num_heads=8", f"model.num_layers={options.layers}",
            "model.feedforward_dim=1536", "experts.num_experts=0", "data.row_length=24", "data.batch_size=4",
            "data.micro_batch_size=4", "report.sample_interval_steps=0",
        ],
    ).spec  # fmt: skip
    start_processes()
    objective = DiffusionObjective(spec, VOCAB)
    shapes = {name: parameter.shape for name, parameter in objective.named_parameters()}
    engine = build_engine(objective, load_engine_config(DS_CONFIG, spec, 1, on_gpu=False))
    partitions, agreement = partitions_of(engine), Agreement()
    average = WeightAverage(partitions, 0.999)
    seconds: dict[str, list[float]] = {}

    def timed(name: str) -> Clock:
        return Clock(seconds.setdefault(name, []))

    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        writer = CheckpointWriter(Path(folder), partitions, average, shapes, agreement)
        for step in range(options.rounds + 1):  # the first is a warm-up
            with timed("a step of 96 tokens"):
                engine.backward(engine(rows(0, 4, step, micro_batches=1)))
                engine.step()
            state = {
                "weights": [partition.weights for partition in partitions],
                "average": average.values,
                **{moment: [partition.moment(moment) for partition in partitions] for moment in MOMENTS},
            }
            with timed("torch.save and fsync"), (Path(folder) / "state.pt").open("wb") as file:
                with timed("torch.save"):
                    torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            with timed("torch.load"):
                torch.load(Path(folder) / "state.pt", weights_only=True)
            trainer = {"optimiser_steps": step + 1}
            manifest = CheckpointManifest(step, 0.0, None, "", "", {})
            with timed("save, in all"):
                with timed("save, until training goes on"):
                    writer.start(manifest, trainer, {})
                path = writer.finish()
            assert path is not None
            with timed("check sha256"):
                damaged_files(path, CheckpointManifest.read(path) or manifest, agreement)
            with timed("load"):
                load_checkpoint(path, engine, partitions, average, shapes)
    stop_processes()
    num_bytes = sum(flat.nbytes for flats in state.values() for flat in flats)
    table = Table("", "seconds", "MB/s", "x", title=f"{num_bytes / 1e6:,.0f} MB of state, median of {options.rounds}")
    for name, compared in (
        ("torch.save", "torch.save"), ("torch.save and fsync", "torch.save"), ("save, in all", "torch.save"),
        ("save, until training goes on", "torch.save"),
        ("torch.load", "torch.load"), ("load", "torch.load"), ("check sha256", "torch.load"),
        ("a step of 96 tokens", "torch.save"),
    ):  # fmt: skip
        found, base = (statistics.median(seconds[key][1:]) for key in (name, compared))
        table.add_row(name, f"{found:.2f}", f"{num_bytes / 1e6 / found:,.0f}", f"{found / base:.2f}")
    for column in table.columns[1:]:
        column.justify = "right"
    Console(width=100).print(table)


class Clock:
    """Adds the seconds that its block takes to a list."""

    def __init__(self, seconds: list[float]) -> None:
        self.seconds = seconds

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds.append(time.perf_counter() - self.started)


if __name__ == "__main__":
    main()

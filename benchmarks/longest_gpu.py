"""The longest document that one GPU can be trained on, and how fast it writes a long one.

    python -m benchmarks.longest_gpu [--lengths 65536,262144] [--modes offload] [--seconds 200] [--dry_run]

A document fills the row; the engine, the optimiser and the average of the weights are those of a real run. Each figure
comes from a process of its own, so that one without memory ends alone, and what holds no longer document is not asked
for one. Nothing new is started after --seconds.

Shapes: b batch (1), l length, m documents in a row (1).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.gpu import Bench
from mdseq.cli.arguments import at_least, lengths
from mdseq.data.batch import Batch, StepTotals
from mdseq.data.tokenizer import SpecialToken
from mdseq.diffusion.denoising import DiffusionModel
from mdseq.diffusion.objective import DiffusionObjective
from mdseq.engine.build import build_engine, start_processes, stop_processes
from mdseq.engine.config import load_engine_config
from mdseq.engine.ema import WeightAverage
from mdseq.engine.partitions import partitions_of
from mdseq.errors import exit_status
from mdseq.generate.documents import Blocks, Draft, write_blocks
from mdseq.generate.sampler import SamplerOptions
from mdseq.spec import RunSpec, load_spec
from mdseq.train.memory import is_out_of_memory

ROOT = Path(__file__).parent.parent
MODES = ("none", "recompute", "offload")
LENGTHS = [2**16, 2**18, 2**19, 2**20, 2**21, 2**22]
WRITTEN, ROW_LENGTH = 2**16, 8192
CALLS = {"bf16": (10, 20), "fp32": (10,)}  # twice the calls take twice the time, and fp32 takes long
# Enough for the second step to be like all that follow; where one takes longer, a single one is timed.
LONG_STEP_SECONDS = 5.0


@dataclass(frozen=True)
class Trained:
    """Steps of one length in one mode; rate in tokens a second, memory in GiB, None where it ran out."""

    length: int
    mode: str
    rate: float | None = None
    gpu: float | None = None
    host: float | None = None
    pinned: float | None = None


@dataclass(frozen=True)
class Written:
    """A text, in tokens a second and GiB."""

    length: int
    way: str
    precision: str
    calls: int
    rate: float
    gpu: float


def spec_of(length: int, mode: str, dry: bool) -> RunSpec:
    model = [
        "model.hidden_dim=1024", "model.num_layers=12", "model.num_heads=16", "experts.num_experts=8",
        "experts.top_k=2", "experts.feedforward_dim=2048", "attention.window=256", "attention.dilation=[1,1,2,4]",
        "attention.num_global=8", "optimiser.precision=bf16",
    ]  # fmt: skip
    tiny = [
        "model.embedding_dim=8", "model.hidden_dim=16", "model.num_layers=2", "model.num_heads=2",
        "experts.feedforward_dim=8", "attention.window=4", "optimiser.precision=fp32",
    ]  # fmt: skip
    row = [f"data.row_length={length}", "data.batch_size=1", "data.micro_batch_size=1"]
    return load_spec(None, [*model, *(tiny if dry else []), *row, f"model.activation_checkpointing={mode}"]).spec


def vocabulary_of(dry: bool) -> int:
    return 64 if dry else 16_384


def one_document(length: int, vocab_size: int, step: int) -> Batch:
    """A row of random tokens, all but the first to be denoised."""
    position_bl = torch.arange(length)[None]
    return Batch(
        tokens_bl=torch.randint(len(SpecialToken), vocab_size, (1, length)),
        document_bl=torch.zeros_like(position_bl),
        position_bl=position_bl,
        target_bl=position_bl > 0,
        row_b=torch.zeros(1, dtype=torch.long),
        first_document_b=torch.zeros(1, dtype=torch.long),
        source_length_bm=torch.ones(1, 1, dtype=torch.long),
        num_documents=1,
        step=step,
        totals=StepTotals(1, length, length - 1, 1, 1),
    )


def train(length: int, mode: str, dry: bool) -> Trained:
    """A step to warm up, then one or two that are timed."""
    spec, vocab_size = spec_of(length, mode, dry), vocabulary_of(dry)
    device = start_processes()
    try:
        torch.manual_seed(0)
        objective = DiffusionObjective(spec, vocab_size, device)
        config = load_engine_config(ROOT / "ds_configs" / "zero2.json", spec, 1, on_gpu=device.type == "cuda")
        engine = build_engine(objective, config)
        average = WeightAverage(partitions_of(engine), spec.optimiser.ema_decay)
        seconds: list[float] = []
        while len(seconds) < 2 or (len(seconds) < 3 and seconds[-1] < LONG_STEP_SECONDS):
            batch = one_document(length, vocab_size, step=len(seconds)).to(device)
            started = time.perf_counter()
            engine.backward(engine(batch))
            engine.step()
            average.update(len(seconds))
            _wait()
            seconds.append(time.perf_counter() - started)
        return Trained(length, mode, length / min(seconds[1:]), *_peaks())
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return Trained(length, mode)
    finally:
        stop_processes()


def write(dry: bool) -> list[Written]:
    """One text in each precision, way and number of calls, by a model with random weights."""
    length, row_length = (64, 32) if dry else (WRITTEN, ROW_LENGTH)
    device = torch.device("cuda" if torch.cuda.is_available() and not dry else "cpu")
    results = []
    for precision, numbers in CALLS.items():
        torch.manual_seed(0)
        objective = DiffusionObjective(spec_of(row_length, "none", dry), vocabulary_of(dry)).to(device).eval()
        if precision == "bf16":
            objective.denoiser.cast_layers(torch.bfloat16)
        model = objective.model()
        for way, blocks in (
            (f"in blocks of {row_length // 2:,}", Blocks.of(row_length)),
            ("in one piece", Blocks(length, length, length)),
        ):
            write_one(model, length, blocks, calls=1)  # what is compiled on first use
            for calls in numbers:
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                started = time.perf_counter()
                write_one(model, length, blocks, calls)
                _wait()
                rate = length / (time.perf_counter() - started)
                results.append(Written(length, way, precision, calls, rate, _peaks()[0]))
    return results


def write_one(model: DiffusionModel, length: int, blocks: Blocks, calls: int) -> None:
    draft = Draft(np.array([SpecialToken.BOS]), length, 0, False, blocks)
    for _ in write_blocks(model, [draft], SamplerOptions(calls), min_length=length):
        pass


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peaks() -> tuple[float, float, float]:
    """GiB at the peak: of the GPU; of the process in CPU memory; of that, or beside it, what is pinned."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
    gpu = pinned = 0
    if torch.cuda.is_available():
        gpu, pinned = torch.cuda.max_memory_allocated(), torch.cuda.host_memory_stats()["allocated_bytes.peak"]
    return gpu / 2**30, host / 2**30, pinned / 2**30


def in_child(name: str, *arguments: object, dry: bool) -> list[dict[str, Any]]:
    """Results of `name` in a process of its own; none if that was killed, as for lack of memory."""
    environment = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        child = json.dumps([name, [*arguments, dry], str(answer)])
        command = [sys.executable, "-m", "benchmarks.longest_gpu", "--child", child]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode < 0:
            return []
        if done.returncode:
            raise RuntimeError(f"{name}{arguments} failed:\n{done.stderr[-4000:]}")
        return json.loads(answer.read_text())


def be_child(child: str) -> None:
    name, arguments, answer = json.loads(child)
    results = [train(*arguments)] if name == "train" else write(*arguments)
    Path(answer).write_text(json.dumps([asdict(one) for one in results]))


def longest(chosen: Sequence[int], modes: Sequence[str], dry: bool, deadline: float) -> Iterator[Trained]:
    """Length by length, in every mode that still fits."""
    fitting = list(modes)
    for length in sorted(chosen):
        for mode in modes:
            if mode in fitting and time.monotonic() < deadline:
                result = next(
                    (Trained(**one) for one in in_child("train", length, mode, dry=dry)), Trained(length, mode)
                )
                if result.rate is None:
                    fitting.remove(mode)
                yield result


def training_table(results: Sequence[Trained], title: str) -> Table:
    caption = (
        "fast: tokens a second. Memory in GiB: GPU, peak of what tensors hold; host, peak of the process; pinned, of "
        "torch's allocator. -: does not fit."
    )
    table = Table("tokens", title=title, caption=caption, title_justify="left", caption_justify="left")
    for mode in MODES:
        for name in (f"{mode}: fast", "GPU", "host", "pinned"):
            table.add_column(name, justify="right")
    for length in sorted({result.length for result in results}):
        of_mode = {result.mode: result for result in results if result.length == length}
        cells = [cell for mode in MODES for cell in _cells(of_mode.get(mode))]
        table.add_row(f"{length:,}", *cells)
    return table


def _cells(result: Trained | None) -> list[str]:
    if result is None or result.rate is None:
        return ["" if result is None else "-", "", "", ""]
    return [f"{result.rate:,.0f}", *(f"{size:.1f}" for size in (result.gpu, result.host, result.pinned))]


def writing_table(results: Sequence[Written]) -> Table:
    table = Table("writing", "precision", title_justify="left")
    for name in ("tokens", "calls", "tokens a second", "GPU, GiB"):
        table.add_column(name, justify="right")
    for one in results:
        table.add_row(one.way, one.precision, f"{one.length:,}", str(one.calls), f"{one.rate:,.0f}", f"{one.gpu:.1f}")
    return table


def measure(options: argparse.Namespace) -> None:
    deadline = time.monotonic() + options.seconds
    name = str(Bench.of(options.dry_run))
    keep = partial(_append, options.json, name)
    console = Console() if Console().is_terminal else Console(width=160)

    written = [Written(**one) for one in in_child("write", dry=options.dry_run)]
    for one in written:
        keep(one)
    trained: list[Trained] = []
    try:
        chosen = options.lengths or ([64] if options.dry_run else LENGTHS)
        for result in longest(chosen, options.modes, options.dry_run, deadline):
            trained.append(result)
            keep(result)
            print(f"{len(trained)}: {result}", file=sys.stderr)
    finally:
        console.print(training_table(trained, f"{name}; 12 layers of 1,024, 8 experts, one document"))
        console.print(writing_table(written))


def _append(path: Path | None, device: str, result: Trained | Written) -> None:
    """At once: a run that is cut short keeps what it has."""
    if path:
        with path.open("a") as file:
            file.write(json.dumps({"device": device, **asdict(result)}) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=lengths, metavar="N,N,...", help=f"default: {','.join(map(str, LENGTHS))}")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="of activation checkpointing")
    parser.add_argument("--seconds", type=at_least(0), default=200, metavar="N", help="when to stop; default 200")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append one object a result")
    parser.add_argument("--dry_run", action="store_true", help="every path on the CPU, tiny")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child is not None:
        be_child(options.child)
        return 0
    return exit_status(lambda: measure(options), "stopped")


if __name__ == "__main__":
    raise SystemExit(main())

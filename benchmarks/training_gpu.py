"""A training step on one GPU or two: tokens a second, share of the GPU's peak, memory, and what the time goes to.

    python -m benchmarks.training_gpu [--gpus 2] [--only BEGINNING] [--json FILE] [--dry_run] [section.key=value ...]

Each case has processes of its own, one a GPU, that take whole steps of the trainer (forward, backward, DeepSpeed,
average) on rows of random tokens that one document fills. All start at once, so that they import together, and measure
one after the other. Useful operations are counted: 2 a weight that a token meets, visible pairs of attention only,
three times for forward and backward (2.5 for the backward pass of attention); what is computed again is not counted.
Share of peak is that rate over 989 TFLOP/s, the bf16 peak of an H100 or H200 without sparsity, and over a large product
in the same run. Exposed is the time in which nothing runs but communication.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from multiprocessing.context import BaseContext
from multiprocessing.synchronize import Barrier, Event, Lock
from pathlib import Path
from queue import Queue
from threading import BrokenBarrierError
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.gpu import Bench, Ceilings
from mdseq.data.batch import Batch, StepTotals
from mdseq.diffusion.objective import DiffusionObjective
from mdseq.errors import UserError, exit_status
from mdseq.model.cost import count_parameters
from mdseq.model.denoiser import DenoiserConfig
from mdseq.sparse import Documents
from mdseq.sparse.count import BACKWARD_TO_FORWARD, forward_flops, visible_pairs
from mdseq.spec import RunSpec, load_spec

ROOT = Path(__file__).parent.parent
PEAK_TFLOPS = 989
VOCAB_SIZE = 16_384
SPEC = [
    "model.num_layers=12", "attention.window=256", "attention.dilation=[1, 1, 2, 4]", "attention.num_global=8",
    "optimiser.precision=bf16", "data.max_prefix=0", "data.max_suffix=0", "guard.spike_factor=0",
]  # fmt: skip
# What a kernel is, by the first of these that its name holds.
KINDS: dict[str, tuple[str, ...]] = {
    "communication": ("nccl",),
    "attention": ("forward_kernel", "query_gradient", "key_gradient", "merge_kernel", "sum_kernel", "flash", "fmha"),
    "grouped products": ("grouped", "Grouped", "GemmUniversal", "group_gemm"),
    "optimiser and average": ("multi_tensor", "adam", "lerp"),
    "float32 products": ("sgemm", "s1688gemm", "f32f32_f32f32", "tf32"),
    "products": ("gemm", "nvjet", "cutlass", "xmma", "splitK", "cublas"),
    "copies and fills": ("Memcpy", "Memset", "copy", "fill"),
}


@dataclass(frozen=True)
class Case:
    """One model and one length of rows.

    Attributes:
        name: Of the variant.
        hidden: Width; experts are twice as wide inside, a dense feed-forward layer four times: as two experts.
        row_length: Tokens of a row.
        rows: Of a step, on each GPU.
        overrides: Of the spec.
        layers: 12, or fewer where the state of more would not fit.
        ds_config: How the run is spread.
        gpus: Over so many.
        experts_over: Over how many of them experts are spread.
    """

    name: str
    hidden: int
    row_length: int
    rows: int
    overrides: tuple[str, ...] = ()
    layers: int = 12
    ds_config: str = "zero2"
    gpus: int = 1
    experts_over: int = 1

    def __str__(self) -> str:
        return f"{self.name} {self.hidden} {self.row_length}"

    def spec(self, more: Sequence[str]) -> RunSpec:
        return load_spec(
            None,
            [
                *SPEC, f"model.hidden_dim={self.hidden}", f"model.num_heads={self.hidden // 64}",
                f"experts.feedforward_dim={2 * self.hidden}", f"model.feedforward_dim={4 * self.hidden}",
                f"data.row_length={self.row_length}", f"data.batch_size={self.rows * self.gpus}",
                f"data.micro_batch_size={self.rows}", f"model.num_layers={self.layers}", *self.overrides, *more,
            ],
        ).spec  # fmt: skip


DENSE_ATTENTION, DENSE_FFN = ("attention.kind=full",), ("experts.num_experts=0",)


def cases(gpus: int) -> list[Case]:
    if gpus > 1:
        spread = [("zero3", gpus), ("zero2", gpus), ("zero3", 1), ("zero2", 1)]
        return [
            Case("one GPU", 1024, 16_384, 2),
            *(
                Case(f"ZeRO-{ds_config[-1]}, EP {over}", 1024, 16_384, 2, (), 12, ds_config, gpus, over)
                for ds_config, over in spread
            ),
        ]
    of_lengths = [
        Case("moe", hidden, length, max(1, tokens // length), layers=layers)
        for hidden, layers, tokens in ((1024, 12, 131_072), (2048, 8, 98_304))
        for length in (4096, 16_384, 65_536)
    ]
    return [
        *of_lengths,
        Case("dense FFN", 1024, 16_384, 8, DENSE_FFN),
        Case("dense FFN", 2048, 16_384, 6, DENSE_FFN, layers=8),
        Case("dense attention", 1024, 16_384, 4, DENSE_ATTENTION),
        Case("dense attention", 1024, 65_536, 1, DENSE_ATTENTION),
    ]


@dataclass(frozen=True)
class Result:
    """One case, measured.

    Attributes:
        useful: TFLOP/s of useful operations, of one GPU.
        peak_gib: Most memory held, by the first GPU.
        split: Milliseconds of a step by kind of kernel, "idle" for none.
        exposed_ms: Of a step, in which nothing runs but communication.
        top: The kernels that take most, in milliseconds and launches.
    """

    case: Case
    device: str
    ceiling: float
    step_ms: float
    tokens_per_second: float
    useful: float
    peak_gib: float
    split: dict[str, float]
    exposed_ms: float
    top: list[tuple[str, float, int]]
    launches: int


class FixedRows:
    """A loader of the same rows at every step, each filled by one document."""

    def __init__(self, spec: RunSpec, rank: int, device: torch.device) -> None:
        rows, length, in_all = spec.data.micro_batch_size, spec.data.row_length, spec.data.batch_size
        generator = torch.Generator().manual_seed(rank)
        tokens_bl = torch.randint(5, VOCAB_SIZE, (rows, length), generator=generator)
        documents = Documents.whole(torch.full((rows,), length), length)
        target_bl = torch.ones_like(tokens_bl, dtype=torch.bool)
        totals = StepTotals(in_all, in_all * length, in_all * length, in_all, in_all // rows)
        row_b = rank * rows + torch.arange(rows)
        zero_b1 = torch.zeros(rows, 1, dtype=torch.int64)
        self._batch = Batch(
            tokens_bl, documents.document_bl, documents.position_bl, target_bl, row_b, row_b, zero_b1,
             num_documents=1, step=0, totals=totals,
        ).to(device)  # fmt: skip

    def micro_batches(self, step: int) -> list[Batch]:
        return [replace(self._batch, step=step)]

    def close(self) -> None:
        """Nothing to release."""


def useful_flops(spec: RunSpec, config: DenoiserConfig) -> float:
    """Of a step of one GPU: forward and backward."""
    rows, length = spec.data.micro_batch_size, spec.data.row_length
    tokens = rows * length
    logits = config.vocab_size * (config.embedding_dim + 1)
    met = count_parameters(config, spec.diffusion.absorbing).active - config.vocab_size * (config.embedding_dim + 1)
    layout = Documents.whole(torch.tensor([length]), length).layout(config.num_global)
    pairs = rows * sum(int(visible_pairs(pattern, layout, config.num_heads)) for pattern in config.patterns)
    attention = forward_flops(pairs, config.hidden_dim // config.num_heads)
    return 3 * 2 * tokens * (met + logits) + (1 + BACKWARD_TO_FORWARD) * attention


def trainer_of(case: Case, spec: RunSpec, rank: int, device: torch.device) -> Any:
    """A trainer on fixed rows, as `mdseq/train/start.py` builds one on a corpus."""
    from mdseq.engine.agreement import Agreement
    from mdseq.engine.build import build_engine
    from mdseq.engine.config import load_engine_config
    from mdseq.engine.ema import WeightAverage
    from mdseq.engine.partitions import partitions_of
    from mdseq.train.loop import Trainer

    torch.manual_seed(0)
    values = json.loads((ROOT / "ds_configs" / f"{case.ds_config}.json").read_text())
    if spec.experts.num_experts:
        values["expert_parallel"] = {"autoep_size": case.experts_over}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(values, file)
        file.flush()
        engine_config = load_engine_config(Path(file.name), spec, case.gpus, device.type == "cuda")
    engine = build_engine(DiffusionObjective(spec, VOCAB_SIZE, device), engine_config)
    partitions = partitions_of(engine)
    average = WeightAverage(partitions, spec.optimiser.ema_decay)
    return Trainer(spec, engine, FixedRows(spec, rank, device), partitions, average, Agreement(), device)


def measure(case: Case, rank: int, options: argparse.Namespace) -> Result:
    """In a process that has its GPU to itself."""
    from mdseq.engine.build import start_processes, stop_processes

    device = start_processes()
    spec = case.spec(options.overrides)
    trainer = trainer_of(case, spec, rank, device)
    trainer.objective.train()
    timed_steps(trainer, device, options.warmups)
    step = timed_steps(trainer, device, options.steps) / options.steps
    split, exposed, top, launches = profiled(trainer, device, step) if device.type == "cuda" else ({}, 0.0, [], 0)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    flops = useful_flops(spec, trainer.objective.config)
    del trainer
    result = Result(
        case=case,
        device=str(Bench.of(options.dry_run)),
        ceiling=Ceilings.measured(Bench.of(options.dry_run, repeats=10)).product_flops / 1e12,
        step_ms=1e3 * step,
        tokens_per_second=spec.data.batch_size * spec.data.row_length / step,
        useful=flops / step / 1e12,
        peak_gib=peak,
        split=split,
        exposed_ms=exposed,
        top=top,
        launches=launches,
    )
    stop_processes()
    return result


def timed_steps(trainer: Any, device: torch.device, count: int) -> float:
    """Seconds of some steps; as in training, one may begin before the GPU is done with the one before."""
    started = time.perf_counter()
    for _ in range(count):
        trainer._take_step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def profiled(
    trainer: Any, device: torch.device, step: float
) -> tuple[dict[str, float], float, list[tuple[str, float, int]], int]:
    """Where the time of a step goes; what is left of `step`, which was taken without the profiler, is idle."""
    steps = 2
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        timed_steps(trainer, device, steps)
    events = [event for event in profile.key_averages() if event.self_device_time_total > 0]
    kinds: Counter[str] = Counter()
    for event in events:
        kinds[kind_of(event.key)] += event.self_device_time_total / 1e3 / steps
    spans = [
        (event.time_range.start, event.time_range.end, kind_of(event.name) == "communication")
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    busy = covered([span[:2] for span in spans]) / 1e3 / steps
    exposed = busy - covered([span[:2] for span in spans if not span[2]]) / 1e3 / steps
    kinds["idle"] = max(0.0, 1e3 * step - busy)
    longest = sorted(events, key=lambda event: -event.self_device_time_total)[:25]
    top = [(event.key, event.self_device_time_total / 1e3 / steps, event.count // steps) for event in longest]
    return dict(kinds), exposed, top, sum(event.count for event in events) // steps


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union."""
    total, end = 0.0, float("-inf")
    for first, last in sorted(spans):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total


def kind_of(kernel: str) -> str:
    for kind, names in KINDS.items():
        if any(name in kernel for name in names):
            return kind
    return "element by element"


@dataclass(frozen=True)
class Turn:
    """What the processes of a case share: only one case measures at a time."""

    free: Lock
    begun: Event
    ended: Barrier
    port: Any  # a shared integer

    @classmethod
    def of(cls, case: Case, free: Lock, context: BaseContext) -> Turn:
        return cls(free, context.Event(), context.Barrier(case.gpus), context.Value("i", 0))


def run_rank(case: Case, rank: int, options: argparse.Namespace, turn: Turn, results: Queue[Result | str]) -> None:
    """The first rank measures and answers; the others take part."""
    import deepspeed  # noqa: F401  while others measure

    if rank == 0:
        turn.free.acquire()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            turn.port.value = probe.getsockname()[1]
        turn.begun.set()
    turn.begun.wait()
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": case.gpus, "LOCAL_SIZE": case.gpus}
    os.environ |= {name: str(value) for name, value in ranks.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(turn.port.value)}
    found: Result | str
    try:
        found = measure(case, rank, options)
    except torch.OutOfMemoryError:
        found = f"{case}: does not fit into memory"
    except Exception:
        found = f"{case}: {traceback.format_exc()}"
    if rank == 0:
        results.put(found)
    with suppress(BrokenBarrierError):
        turn.ended.wait(60)
    if rank == 0:
        turn.free.release()


def tiny(case: Case) -> Case:
    return replace(case, hidden=case.hidden // 8, row_length=case.row_length // 64, rows=1, layers=2)


def tables_of(results: Sequence[Result]) -> Iterator[Table]:
    device, ceiling = results[0].device, max(result.ceiling for result in results)
    speed = Table(title=f"{device}; product {ceiling:.0f} TFLOP/s", title_justify="left")
    names = ["", "width", "row", "rows", "ms", "tokens/s", "TFLOP/s", "of 989", "of product", "GiB", "kernels"]
    split = Table(title="share of a step", title_justify="left")
    kinds = [*KINDS, "element by element", "idle"]
    for table, columns in ((speed, [*names, "exposed, ms"]), (split, ["", "width", "row", *kinds])):
        for name in columns:
            table.add_column(name, justify="right" if name else "left")
    for result in results:
        case = result.case
        title = (case.name, f"{case.hidden:,}", f"{case.row_length:,}")
        speed.add_row(
            *title, str(case.rows), f"{result.step_ms:.1f}", f"{result.tokens_per_second:,.0f}", f"{result.useful:.0f}",
            f"{result.useful / PEAK_TFLOPS:.1%}", f"{result.useful / ceiling:.1%}", f"{result.peak_gib:.1f}",
            f"{result.launches:,}", f"{result.exposed_ms:.1f}",
        )  # fmt: skip
        split.add_row(*title, *(f"{result.split.get(kind, 0) / result.step_ms:.0%}" for kind in kinds))
    yield speed
    yield split


def run(options: argparse.Namespace) -> None:
    Bench.of(options.dry_run)  # or there is no GPU
    beginnings = tuple(options.only or [""])
    known = cases(options.gpus)
    chosen = [case for case in known if str(case).startswith(beginnings)]
    if not chosen:
        raise UserError(f"--only {' '.join(options.only)}: none of {', '.join(map(str, known))} begins so")
    if options.dry_run:
        chosen = [tiny(case) for case in chosen]
        options.warmups, options.steps = 1, 1
        options.overrides += ["optimiser.precision=fp32", "attention.window=8", "attention.num_global=1"]
    context = multiprocessing.get_context("spawn")
    free, queue = context.Lock(), context.Queue()
    turns = [Turn.of(case, free, context) for case in chosen]  # held: others could not open what is gone
    processes = [
        context.Process(target=run_rank, args=(case, rank, options, turn, queue))
        for case, turn in zip(chosen, turns, strict=True)
        for rank in range(case.gpus)
    ]
    for process in processes:
        process.start()
    results: list[Result] = []
    for _ in chosen:
        found = queue.get()
        if isinstance(found, str):
            print(found, file=sys.stderr, flush=True)
            continue
        results.append(found)
        print(f"{found.case}: {found.step_ms:.1f} ms", flush=True)
        if options.json:
            with options.json.open("a") as file:
                file.write(json.dumps(asdict(found)) + "\n")
    for process in processes:
        process.join()
    order: Mapping[Case, int] = {case: i for i, case in enumerate(chosen)}
    results.sort(key=lambda result: order[result.case])
    if not results:
        raise UserError("no case could be measured")
    console = Console() if Console().is_terminal else Console(width=200)
    console.print(*tables_of(results))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", metavar="BEGINNING", help='of a case, such as "moe 1024"')
    parser.add_argument("--gpus", type=int, default=1, choices=(1, 2), help="default 1")
    parser.add_argument("--warmups", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--json", type=Path, metavar="FILE", help="append one object a case")
    parser.add_argument("--dry_run", action="store_true", help="every path on the CPU, tiny")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the spec")
    options = parser.parse_intermixed_args(arguments)
    return exit_status(lambda: run(options), "stopped")


if __name__ == "__main__":
    raise SystemExit(main())

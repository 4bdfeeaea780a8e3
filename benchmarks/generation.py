"""Memory and speed of writing long texts: block after block, and in one piece.

    python -m benchmarks.generation [--run RUN] [--lengths 8192,16384,32768] [--steps 4]

Every text is written in a process of its own. Memory is what writing it took at its peak, above what the process held
with the model loaded. Without a run, the model is that of the quickstart with random weights and longer rows: what it
writes is nonsense, at the same cost.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.measure import peak_bytes
from mdseq.cli.arguments import at_least, lengths
from mdseq.data.tokenizer import SpecialToken
from mdseq.diffusion.absorbing import Absorption
from mdseq.diffusion.denoising import DiffusionModel
from mdseq.diffusion.schedule import NoiseSchedule
from mdseq.engine.checkpoint import find_model
from mdseq.generate.documents import Blocks, Draft, write_blocks
from mdseq.generate.sampler import SamplerOptions
from mdseq.model.denoiser import Denoiser, DenoiserConfig
from mdseq.model.saved import load_model
from mdseq.spec import load_spec

VOCAB, ROW_LENGTH = 4096, 4096
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    options = _options()
    if options.child is not None:
        length, blockwise = json.loads(options.child)
        print(json.dumps(_measure(options, length, blockwise)))
        return
    of_run = ["--run", str(options.run)] if options.run else []
    model = options.run or "random weights"
    table = Table("tokens", title=f"{model}, {options.steps} calls a row, {DEVICE}", title_justify="left")
    for name in ("in blocks: MiB", "ratio", "tokens/s", "in one piece: MiB", "ratio", "tokens/s"):
        table.add_column(name, justify="right")
    first: dict[bool, float] = {}
    for length in options.lengths:
        cells = []
        for blockwise in (True, False):
            child = ["--child", json.dumps([length, blockwise]), "--steps", str(options.steps), *of_run]
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.generation", *child], stdout=subprocess.PIPE, text=True, check=False
            )
            if done.returncode:  # most likely, it did not fit
                cells += ["failed", "", ""]
                continue
            num_bytes, rate = json.loads(done.stdout)
            ratio = num_bytes / first.setdefault(blockwise, num_bytes)
            cells += [f"{num_bytes / 2**20:,.0f}", f"{ratio:.2f}", f"{rate:,.0f}"]
        table.add_row(f"{length:,}", *cells)
    Console().print(table)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generation", description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, metavar="RUN", help="default: a small model with random weights")
    parser.add_argument("--lengths", type=lengths, default=[8192, 16_384, 32_768], metavar="N,N,...")
    parser.add_argument("--steps", type=at_least(1), default=4, metavar="N", help="denoiser calls; default 4")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def _measure(options: argparse.Namespace, length: int, blockwise: bool) -> tuple[float, float]:
    """Bytes at the peak, and tokens per second."""
    model, row_length = _model(options.run)

    def write(length: int, blocks: Blocks) -> None:
        draft = Draft(np.array([SpecialToken.BOS]), length, 0, False, blocks)
        for _ in write_blocks(model, [draft], SamplerOptions(options.steps), min_length=length):
            pass

    write(64, Blocks.of(row_length))  # what is loaded or compiled on first use is no part of it
    seconds = []

    def timed() -> None:
        started = time.perf_counter()
        write(length, Blocks.of(row_length) if blockwise else Blocks(length, length, length))
        seconds.append(time.perf_counter() - started)

    return _peak_bytes(timed), length / seconds[0]


def _peak_bytes(run) -> int:
    if DEVICE == "cpu":
        return peak_bytes(run)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before


def _model(run: Path | None) -> tuple[DiffusionModel, int]:
    if run is not None:
        saved = load_model(find_model(run), DEVICE)
        return DiffusionModel.of(saved), saved.config.row_length
    torch.manual_seed(0)
    spec = load_spec(Path("quickstart")).spec
    denoiser = Denoiser(DenoiserConfig.of(spec, VOCAB)).to(DEVICE).eval()
    m_z = torch.zeros(spec.model.embedding_dim, device=DEVICE)
    schedule = NoiseSchedule(spec.diffusion.noise_schedule, spec.diffusion.num_timesteps)
    absorption = Absorption(spec.diffusion.gamma, spec.diffusion.absorbing_schedule)
    return DiffusionModel(denoiser, m_z, schedule, absorption, spec.diffusion.estimate), ROW_LENGTH


if __name__ == "__main__":
    main()

"""What the estimate of memory is worth: the most that ranks hold while they train, beside what it says.

python -m benchmarks.planning [--sizes 5 20 80]

Whole runs of `launcher/run.py` on CPU ranks in fp32: steps before and after a checkpoint. What a process holds besides,
such as libraries that it loads on its way, is taken from the same run with a model of next to nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.measure import memory_fields
from mdseq.engine.config import DS_CONFIG_DIR, load_engine_config
from mdseq.engine.memory import Memory, estimate_memory
from mdseq.model.cost import count_parameters
from mdseq.model.denoiser import DenoiserConfig
from mdseq.spec import RunSpec, load_spec
from tests.conftest import WORDS
from tests.dist.ranks import run_ranks, train

VOCAB = 600
MIB = 2**20
# The ds_config, how many ranks.
SPREADS = (("cpu", 1), ("zero3", 1), ("cpu", 2), ("zero2", 2), ("zero3", 2), ("zero3_experts", 2))


@dataclass(frozen=True)
class Size:
    """A model of four routed experts a layer, two a token, and the rows that it is trained on, one a rank."""

    hidden_dim: int
    num_layers: int
    feedforward_dim: int
    row_length: int

    def overrides(self, num_ranks: int) -> list[str]:
        return [
            f"model.hidden_dim={self.hidden_dim}", f"model.num_layers={self.num_layers}",
            f"experts.feedforward_dim={self.feedforward_dim}", f"data.row_length={self.row_length}",
            f"data.batch_size={num_ranks}", "data.micro_batch_size=1", "schedule.steps=3", "schedule.warmup_steps=1",
            "checkpoint.interval_steps=2", "report.sample_interval_steps=0",
        ]  # fmt: skip

    def spec(self, num_ranks: int) -> RunSpec:
        return load_spec(Path("quickstart"), self.overrides(num_ranks)).spec


NOTHING = Size(32, 1, 32, 64)
# By millions of parameters; most of the memory is activations in the first, and state in the last.
SIZES = {5: Size(256, 4, 256, 2048), 20: Size(512, 4, 512, 1024), 80: Size(768, 6, 1024, 512)}


def estimated(size: Size, ds_config: str, num_ranks: int, vocab_size: int = VOCAB) -> Memory:
    spec = size.spec(num_ranks)
    engine = load_engine_config(DS_CONFIG_DIR / f"{ds_config}.json", spec, num_ranks, on_gpu=False)
    return estimate_memory(DenoiserConfig.of(spec, vocab_size), spec, engine, on_gpu=False)


def measured_bytes(size: Size, ds_config: str, num_ranks: int, data: Path, folder: Path) -> int:
    """The most that a rank held, over what the ranks of `NOTHING` did, which the estimate is told of."""
    nothing = estimated(NOTHING, ds_config, num_ranks).total
    runs = [_peaks(one, ds_config, num_ranks, data, folder) for one in (size, NOTHING)]
    return max(peak - besides for peak, besides in zip(*runs, strict=True)) + nothing


def _peaks(size: Size, ds_config: str, num_ranks: int, data: Path, folder: Path) -> list[int]:
    with tempfile.TemporaryDirectory(dir=folder) as output:
        config = DS_CONFIG_DIR / f"{ds_config}.json"
        arguments = ["--ds_config", config, "--spec", "quickstart", "--data", data, "--output", f"{output}/run"]
        return run_ranks(num_ranks, _peak, [*map(str, arguments), *size.overrides(num_ranks)])


def _peak(arguments: list[str]) -> int:
    """The most memory of its own that this process holds while it trains, over what it held before."""
    import torch

    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    # Memory that is freed goes back at once: what is measured is what is held, not what an allocator has put by.
    libc, mmap_threshold = ctypes.CDLL(None), -3
    libc.mallopt(mmap_threshold, 2**16)
    gc.collect()
    libc.malloc_trim(0)
    before = memory_fields()
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present
    assert train(*arguments) == 0
    after = memory_fields()
    # Without pages of files: the dataset is one, and so is code that has run for the first time.
    return after["VmHWM"] - after["RssFile"] - after["RssShmem"] - before["RssAnon"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), choices=list(SIZES))
    options = parser.parse_args()
    table = Table("parameters", "row", "ds_config", "ranks", "MiB, measured", "estimated", "ratio")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = _dataset(folder)
        for millions in options.sizes:
            size = SIZES[millions]
            config = DenoiserConfig.of(size.spec(1), VOCAB)
            parameters = f"{count_parameters(config, absorbing=True).total / 1e6:.1f} M"
            for ds_config, num_ranks in SPREADS:
                found = measured_bytes(size, ds_config, num_ranks, data, folder)
                told = estimated(size, ds_config, num_ranks).total
                table.add_row(
                    parameters, f"{size.row_length:,}", ds_config, f"{num_ranks}", f"{found / MIB:,.0f}",
                    f"{told / MIB:,.0f}", f"{told / found:.2f}",
                )  # fmt: skip
    Console(width=None if Console().is_terminal else 100).print(table)


def _dataset(folder: Path) -> Path:
    """A few hundred texts of few words."""
    from data_prep.run import Where, build
    from data_prep.spec import load_prep_spec

    texts = [" ".join(WORDS[(n * k) % len(WORDS)] for k in range(1, 200)) for n in range(1, 300)]
    (folder / "in.txt").write_text("\n\n".join(texts), encoding="utf-8")
    spec = load_prep_spec([str(folder / "in.txt")], {}, {}, [f"vocabulary.size={VOCAB}"])
    build(spec, folder / "data", Where(workers=1))
    return folder / "data"


if __name__ == "__main__":
    main()

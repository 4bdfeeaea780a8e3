"""Reading a dataset, against numpy.memmap over a flat file of the same tokens: rates, start-up, loader, padding.

    python -m benchmarks.reading [--tokens 200_000_000] [--folder DIR]

The dataset is made of random tokens in 1,000 shards. Both are read from the page cache, in turn, so ratios are of the
code and not of the disk; absolute times are of this machine alone.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from mdseq.data.batch import Batch
from mdseq.data.best_fit import fewest_rows, next_fit
from mdseq.data.corpus import Corpus
from mdseq.data.loader import Loader
from mdseq.data.order import RowOrder
from mdseq.data.packing import SplitPacking
from mdseq.data.prefix import CleanPrefix
from tests.data.datasets import Shard, write_dataset

NUM_SHARDS, ROW_LENGTH, REPEATS = 1000, 4096, 9
BATCH_SIZE, NUM_STEPS, STEP_SECONDS = 16, 20, 0.25
MEDIAN_DOCUMENT = 2000  # tokens

# Run in a process of its own, where no shard has been mapped before.
OPENING = """
import sys, time
from pathlib import Path
from mdseq.data.corpus import Corpus
def resident(): return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
before, started = resident(), time.perf_counter()
corpus = Corpus.open(Path(sys.argv[1]), "train")
seconds, opened = time.perf_counter() - started, resident()
corpus.lengths()
print(seconds, opened - before, time.perf_counter() - started, resident() - before)
"""


def make_dataset(folder: Path, num_tokens: int) -> None:
    """`folder`/data, and the same tokens one after another in `folder`/flat.bin."""
    rng, shards = np.random.default_rng(0), []
    for _ in range(NUM_SHARDS):
        tokens = rng.integers(5, 2**16, num_tokens // NUM_SHARDS, dtype=np.uint16)
        cuts = rng.choice(np.arange(2, len(tokens) - 2, 2), max(1, len(tokens) // MEDIAN_DOCUMENT), replace=False)
        shards.append(Shard(tokens, np.diff([0, *np.sort(cuts), len(tokens)]).tolist()))
    np.concatenate([shard.tokens for shard in shards]).tofile(folder / "flat.bin")
    write_dataset(folder / "data", {"train": {"random": shards}})


def opening(folder: Path) -> Table:
    """Milliseconds and memory to open all shards, and to have mapped each of them."""
    done = subprocess.run(
        [sys.executable, "-c", OPENING, str(folder / "data")], capture_output=True, text=True, check=True
    )
    seconds, memory, all_seconds, all_memory = map(float, done.stdout.split())
    table = Table("", "ms", "MB resident", title=f"opening {NUM_SHARDS:,} shards")
    table.add_row("Corpus.open", f"{seconds * 1e3:.1f}", f"{memory / 1e6:.1f}")
    table.add_row("and every shard mapped and checked", f"{all_seconds * 1e3:.1f}", f"{all_memory / 1e6:.1f}")
    return table


def fastest(passes: list[Callable[[], None]]) -> list[float]:
    """Seconds of the fastest of a few runs of each pass, in turn, after one to fill the caches."""
    seconds: list[list[float]] = [[] for _ in passes]
    for _ in range(REPEATS + 1):
        for index, run in enumerate(passes):
            started = time.perf_counter()
            run()
            seconds[index].append(time.perf_counter() - started)
    return [min(times[1:]) for times in seconds]


def rates(folder: Path) -> Table:
    """Rows and documents copied into an array, one by one."""
    corpus, flat = Corpus.open(folder / "data", "train"), np.memmap(folder / "flat.bin", dtype=np.uint16, mode="r")
    plain = np.asarray(flat)  # without memmap's own slicing, which is slow
    row = np.empty(ROW_LENGTH, dtype=np.uint16)
    in_sequence = np.arange(0, corpus.num_tokens - ROW_LENGTH, ROW_LENGTH).tolist()
    shuffled = np.random.default_rng(1).permutation(in_sequence).tolist()
    edges = np.concatenate([[0], np.cumsum(corpus.lengths())])
    documents = np.random.default_rng(2).permutation(corpus.num_documents)[:20_000].tolist()

    def read_flat(source: np.ndarray, starts: list[int]) -> None:
        for start in starts:
            row[:] = source[start : start + ROW_LENGTH]

    def read_corpus(starts: list[int]) -> None:
        for start in starts:
            corpus.read(start, row)

    def documents_of_flat(source: np.ndarray) -> None:
        for document in documents:
            source[edges[document] : edges[document + 1]].copy()

    def documents_of_corpus() -> None:
        for document in documents:
            corpus.tokens(document).copy()

    table = Table("", "corpus, us", "memmap, us", "ndarray, us", "corpus / memmap", "corpus / ndarray", title="reading")
    for name, starts in (("rows in sequence", in_sequence), ("rows at random", shuffled)):
        passes = [
            lambda starts=starts: read_corpus(starts),
            lambda starts=starts: read_flat(flat, starts),
            lambda starts=starts: read_flat(plain, starts),
        ]
        _add(table, name, len(starts), fastest(passes))
    passes = [documents_of_corpus, lambda: documents_of_flat(flat), lambda: documents_of_flat(plain)]
    _add(table, "documents at random", len(documents), fastest(passes))
    table.caption = f"rows of {ROW_LENGTH:,}; ratios are of rates: above 100 %, the corpus is faster"
    return table


def _add(table: Table, name: str, count: int, seconds: list[float]) -> None:
    ours, memmap, plain = seconds
    times = [f"{time / count * 1e6:.2f}" for time in seconds]
    table.add_row(name, *times, f"{memmap / ours:.0%}", f"{plain / ours:.0%}")


def loading(folder: Path) -> Table:
    """Time that a training loop waits for its batches, where the host waits for a GPU or computes itself."""
    corpus = Corpus.open(folder / "data", "train")
    packing = SplitPacking(corpus, ROW_LENGTH)
    a_ll = torch.randn(512, 512)

    def sleep(_: list[Batch]) -> None:
        time.sleep(STEP_SECONDS)

    def compute(_: list[Batch]) -> None:
        end = time.perf_counter() + STEP_SECONDS
        while time.perf_counter() < end:
            a_ll @ a_ll

    table = Table("step", "ms", "waited, us", "share", "CPU to read, ms", title="loader, behind a simulated step")
    for name, step in (("sleeps", sleep), ("multiplies matrices", compute)):
        order, prefix = RowOrder(packing.num_rows, seed=0), CleanPrefix(0, 0.5)
        loader = Loader(corpus, packing, order, ROW_LENGTH, BATCH_SIZE, 1, 0, 1, prefix)
        for index in range(2 * NUM_STEPS):  # the first half maps shards
            if index == NUM_STEPS:
                started = time.thread_time()
            loader._read(index)
        reading = (time.thread_time() - started) / NUM_STEPS
        batches = loader.micro_batches(0)  # nothing hides the first one
        waited, started = 0.0, time.perf_counter()
        for index in range(1, NUM_STEPS + 1):
            step(batches)
            asked = time.perf_counter()
            following = loader.micro_batches(index)
            waited += time.perf_counter() - asked
            batches = following  # which frees those of the step before, as the training loop does
        total = time.perf_counter() - started
        loader.close()
        table.add_row(
            name, f"{total / NUM_STEPS * 1e3:.1f}", f"{waited / NUM_STEPS * 1e6:.0f}", f"{waited / total:.2%}",
            f"{reading * 1e3:.2f}",
        )  # fmt: skip
    table.caption = f"{BATCH_SIZE} rows of {ROW_LENGTH:,} tokens a step, in random order"
    return table


def padding(num_documents: int = 200_000, most: int = 64) -> Table:
    """Padding of whole documents, by best fit and by next fit (a new row for each document that does not fit)."""
    rng = np.random.default_rng(0)
    table = Table("documents", "row", "next fit", "best fit", "us a document", title="padding of whole documents")
    for name, median, spread, row_length in (
        ("a sentence or two", 70, 0.45, 512),
        ("many of them", 65, 0.45, 4096),
        ("a paragraph", 250, 0.6, 1024),
        ("a page", 1200, 0.35, 4096),
        ("a long page", 1900, 0.35, 4096),
    ):
        lengths = np.clip(rng.lognormal(np.log(median), spread, num_documents).astype(np.int64), 4, row_length)
        started = time.perf_counter()
        num_rows = 0
        for first in range(0, num_documents, 2**16):
            num_rows += len(fewest_rows(lengths[first : first + 2**16], row_length, most)[1])
        seconds = time.perf_counter() - started
        rows_needed = lengths.sum() / row_length
        best, following = 1 - rows_needed / num_rows, 1 - rows_needed / len(next_fit(lengths, row_length, most)[1])
        table.add_row(
            f"{name}, median {median:,}", f"{row_length:,}", f"{following:.1%}", f"{best:.1%}",
            f"{seconds / num_documents * 1e6:.2f}",
        )  # fmt: skip
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=200_000_000, help="of the dataset; two bytes each, twice")
    parser.add_argument("--folder", type=Path, help="where the dataset is made for a while; default: the system's")
    options = parser.parse_args(arguments)
    console = Console()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        make_dataset(Path(name), options.tokens)
        for measure in (opening, rates, loading):
            console.print(measure(Path(name)))
    console.print(padding())


if __name__ == "__main__":
    main()

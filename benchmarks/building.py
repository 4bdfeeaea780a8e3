"""Building a dataset against encoding alone, and against the ways of others, with one SentencePiece model.

    python -m benchmarks.building [--data PATH] [--copies 1] [--model unigram] [--workers 2] [--repeats 3]

PATH is JSON Lines with a `text` each, or a folder of such files; by default Python's standard library, a file a record.
All rows encode the same documents with the same model on the same cores, in turn; ratios are within the run. But for
the first, each is a whole command, from the files to what can be trained on, the interpreter's start included. With
--copies, every file is read that many times under other names, which shows the rate without the start.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import sentencepiece
from rich.console import Console
from rich.table import Table

from data_prep.documents import Document
from data_prep.readers.base import ReadOptions, Stretch
from data_prep.readers.registry import reader_of
from data_prep.run import train_tokenizer
from data_prep.sources import find_files
from data_prep.spec import PrepSpec, SourceSpec, VocabularySpec
from data_prep.vocabulary import train_vocabulary

ROOT = Path(__file__).parent.parent
MOST_MEMORY_MB = 500
ALONE = "SentencePiece alone, texts in memory"


def documents_of(data: Path) -> Iterator[str]:
    source = SourceSpec(name="all", path=(str(data),), text="text")
    options = ReadOptions(source.record_template(), "", 32_000_000)
    for file in find_files(source):
        for record in reader_of(file.format).read(file.path, file.name, Stretch(0, sys.maxsize), options):
            if isinstance(record, Document):
                yield "".join(record.parts[0])


def standard_library(folder: Path) -> Path:
    """Python's own sources as JSON Lines."""
    path = folder / "stdlib.jsonl"
    with path.open("w") as file:
        for source in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
            text = source.read_text(encoding="utf-8", errors="replace")
            if text.strip() and "site-packages" not in source.parts:
                file.write(json.dumps({"text": text}) + "\n")
    return path


def encoding_alone(texts: list[str], model: Path, workers: int) -> float:
    """Seconds in which `workers` processes encode the texts, and do nothing else, not even keep the tokens."""
    context = multiprocessing.get_context("fork")
    barrier, shares = context.Barrier(workers + 1), [texts[worker::workers] for worker in range(workers)]

    def encode(share: list[str]) -> None:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
        barrier.wait()
        for text in share:
            processor.encode(text)
        barrier.wait()

    processes = [context.Process(target=encode, args=(share,)) for share in shares]
    for process in processes:
        process.start()
    barrier.wait()
    started = time.perf_counter()
    barrier.wait()
    seconds = time.perf_counter() - started
    for process in processes:
        process.join()
    return seconds


HUGGING_FACE = """
import sys, datasets, sentencepiece
data, model, workers, out, way = sys.argv[1:]
datasets.disable_progress_bars()
files = f"{data}/*.jsonl*"
loaded = datasets.load_dataset("json", data_files=files, split="train", cache_dir=out, num_proc=int(workers))
processor = sentencepiece.SentencePieceProcessor(model_file=model)
encode = lambda record: {"tokens": processor.encode(record["text"])}
tuned = dict(batched=True, batch_size=100) if way == "tuned" else {}
tuned |= dict(features=datasets.Features(tokens=datasets.Sequence(datasets.Value("uint16")))) if tuned else {}
loaded.map(encode, remove_columns=loaded.column_names, num_proc=int(workers), **tuned)
"""
MEGATRON = """
import glob, gzip, json, multiprocessing, sys, numpy, sentencepiece
data, model, workers, out = sys.argv[1:]
def start():
    global processor
    processor = sentencepiece.SentencePieceProcessor(model_file=model)
def encode(line):
    return processor.encode(json.loads(line)["text"])
def lines():
    for path in sorted(glob.glob(f"{data}/*.jsonl*")):
        yield from gzip.open(path) if path.endswith(".gz") else open(path, "rb")
lengths = []
with multiprocessing.get_context("fork").Pool(int(workers), start) as pool, open(out + ".bin", "wb") as file:
    for ids in pool.imap(encode, lines(), chunksize=32):
        file.write(numpy.array(ids, dtype=numpy.uint16).tobytes())
        lengths.append(len(ids))
numpy.array(lengths).tofile(out + ".idx")
"""


def seconds_of(*command: object) -> float:
    """Seconds of a whole command, the interpreter's start included."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - started


def copied(data: Path, copies: int, folder: Path) -> Path:
    """A folder in which each file of `data` stands several times."""
    folder.mkdir()
    for path in sorted(data.glob("*.jsonl*")) if data.is_dir() else [data]:
        for copy in range(copies):
            shutil.copy(path, folder / f"{copy}-{path.name}")
    return folder


def building_table(
    data: Path | None, copies: int, kind: Literal["unigram", "bpe"], workers: int, repeats: int
) -> Table:
    """Each way `repeats` times, in turn; the fastest of each."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = copied(data or standard_library(folder), copies, folder / "data")
        texts = list(documents_of(data))
        megabytes = sum(len(text.encode()) for text in texts) / 1e6
        model = folder / "tokenizer.model"
        source = SourceSpec(name="all", path=(str(data),), text="text")
        train_tokenizer(PrepSpec(sources=(source,), vocabulary=VocabularySpec(model=kind)), model, workers)
        ours = ("-m", "data_prep", "build", data, "--tokenizer", model, "--text", "text", "--workers", workers, "--out")
        ways: dict[str, Callable[[Path], float]] = {
            ALONE: lambda out: encoding_alone(texts, model, workers),
            "`python -m data_prep build`": lambda out: seconds_of(*ours, out),
            "Megatron's way: imap, flat ids": lambda out: seconds_of("-c", MEGATRON, data, model, workers, out),
        }
        if importlib.util.find_spec("datasets"):
            for way in ("a record at a time", "tuned"):
                ways[f"HF `datasets.map`, {way}"] = lambda out, way=way: seconds_of(  # type: ignore[misc]
                    "-c", HUGGING_FACE, data, model, workers, out, way
                )
        else:
            print("Hugging Face datasets is left out: pip install -e '.[bench]'", file=sys.stderr)
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(repeats):
            for way, run in ways.items():
                out = folder / "out"
                seconds[way].append(run(out))
                shutil.rmtree(out, ignore_errors=True)
    alone = min(seconds[ALONE])
    title = f"{len(texts):,} documents, {megabytes:,.1f} MB of text, {kind} vocabulary, {workers} processes"
    table = Table("way", title=title)
    for column in ("seconds", "MB/s", "of encoding alone"):
        table.add_column(column, justify="right")
    for way, times in seconds.items():
        best = min(times)
        table.add_row(way, f"{best:.2f}", f"{megabytes / best:.2f}", f"{alone / best:.2f}")
    return table


@dataclass(frozen=True)
class Peak:
    """A build whose input is one document: its size, the most memory it held, and how long it took."""

    document_mb: int
    resident_mb: float
    seconds: float


def peaks_of(sizes_mb: list[int]) -> Iterator[Peak]:
    sentence = b"The river runs past an old mill where seven grey cats watch silver fish and dream of snow.\n"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tokenizer.model").write_bytes(train_vocabulary([sentence.decode() + "0123456789"] * 50, 512))
        for size in sizes_mb:
            path = folder / f"{size}.txt"
            with path.open("wb") as file:
                for _ in range(size):
                    file.write(sentence * (1_000_000 // len(sentence)))
            command = [sys.executable, "-m", "data_prep", "build", path, "--out", folder / "out"]
            command += ["--tokenizer", folder / "tokenizer.model", "--workers", "1"]
            started = time.perf_counter()
            process = subprocess.Popen(
                [*map(str, command)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            _, status, usage = os.wait4(process.pid, 0)
            assert status == 0
            yield Peak(size, usage.ru_maxrss / 1024, time.perf_counter() - started)
            path.unlink()
            shutil.rmtree(folder / "out")


def memory_table(peaks: list[Peak]) -> Table:
    table = Table("one document of", title="peak memory of a build, 1 process")
    for column in ("resident MB", "seconds"):
        table.add_column(column, justify="right")
    for peak in peaks:
        table.add_row(f"{peak.document_mb:,} MB", f"{peak.resident_mb:,.0f}", f"{peak.seconds:.1f}")
    return table


def plot_memory(peaks: list[Peak], path: Path) -> None:
    import matplotlib.pyplot as plt

    sizes = [peak.document_mb for peak in peaks]
    figure, axes = plt.subplots(figsize=(6.4, 2.8), layout="constrained")
    axes.plot(sizes, [peak.resident_mb for peak in peaks], "o-")
    axes.axhline(MOST_MEMORY_MB, color="tab:red", linestyle="--", linewidth=1)
    axes.text(sizes[0], MOST_MEMORY_MB + 5, f"limit: {MOST_MEMORY_MB} MB", color="tab:red", va="bottom", fontsize=9)
    axes.set_xscale("log")
    axes.set_ylim(0, MOST_MEMORY_MB + 80)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel("size of the document, MB")
    axes.set_ylabel("peak resident memory, MB")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, metavar="PATH")
    parser.add_argument("--copies", type=int, default=1)
    parser.add_argument("--model", choices=("unigram", "bpe"), default="unigram")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", type=int, nargs="*", metavar="MB", help="document sizes; instead of the rates")
    parser.add_argument("--png", type=Path, help="draw the memory")
    options = parser.parse_args(arguments)
    if options.memory is not None:
        peaks = list(peaks_of(options.memory or [10, 50, 250]))
        Console().print(memory_table(peaks))
        if options.png:
            plot_memory(peaks, options.png)
    else:
        Console().print(building_table(options.data, options.copies, options.model, options.workers, options.repeats))


if __name__ == "__main__":
    main()

"""Building a dataset against encoding alone, and against the ways of others, with one SentencePiece model.

    python -m benchmarks.building [--data PATH] [--workers 2] [--repeats 3]

PATH is JSON Lines with a `text` each, or a folder of such files; by default Python's standard library, a file a record.
All rows encode the same documents with the same model on the same cores, in turn; ratios are within the run.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import sentencepiece
from rich.console import Console
from rich.table import Table

from data_prep.documents import Document
from data_prep.readers import ReadOptions, Stretch, reader_of
from data_prep.run import train_tokenizer
from data_prep.sources import find_files
from data_prep.spec import PrepSpec, SourceSpec

ROOT = Path(__file__).parent.parent


def documents_of(data: Path) -> Iterator[str]:
    source = SourceSpec(name="all", path=str(data), text="text")
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


def encoding_alone(texts: list[str], model: Path, workers: int, rounds: int = 1) -> float:
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


def our_build(data: Path, model: Path, workers: int, out: Path) -> float:
    """Seconds of the whole command, the interpreter's start included."""
    command = [sys.executable, "-m", "data_prep", "build", data, "--out", out, "--tokenizer", model, "--text", "text"]
    started = time.perf_counter()
    subprocess.run([*map(str, command), "--workers", str(workers)], cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - started


def hugging_face(data: Path, model: Path, workers: int, out: Path) -> float:
    """Seconds of loading the JSON and mapping a SentencePiece encoder over it, in batches; imports not included."""
    import datasets

    datasets.disable_progress_bars()
    files = [str(path) for path in sorted(data.rglob("*.jsonl*"))] if data.is_dir() else [str(data)]
    started = time.perf_counter()
    loaded = datasets.load_dataset("json", data_files=files, split="train", cache_dir=str(out), num_proc=workers)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"tokens": processor.encode(batch["text"], num_threads=1)}

    features = datasets.Features({"tokens": datasets.Sequence(datasets.Value("uint16"))})
    loaded.map(
        encode, batched=True, batch_size=100, remove_columns=loaded.column_names, num_proc=workers, features=features
    )
    return time.perf_counter() - started


_megatron: sentencepiece.SentencePieceProcessor


def _start_megatron(model: str) -> None:
    global _megatron
    _megatron = sentencepiece.SentencePieceProcessor(model_file=model)


def _encode_megatron(line: str) -> list[int]:
    return _megatron.encode(json.loads(line)["text"])


def megatron_style(texts: list[str], model: Path, workers: int, out: Path) -> float:
    """Seconds of Megatron's way: `pool.imap` over JSON lines, ids into one flat .bin, lengths into an .idx."""
    lines = [json.dumps({"text": text}) for text in texts]
    started = time.perf_counter()
    lengths = []
    with (
        multiprocessing.get_context("fork").Pool(workers, _start_megatron, (str(model),)) as pool,
        out.with_suffix(".bin").open("wb") as file,
    ):
        for ids in pool.imap(_encode_megatron, lines, chunksize=32):
            tokens = np.array(ids, dtype=np.uint16)
            file.write(tokens.tobytes())
            lengths.append(len(tokens))
    np.array(lengths, dtype=np.int64).tofile(out.with_suffix(".idx"))
    return time.perf_counter() - started


def building_table(data: Path | None, workers: int, repeats: int) -> Table:
    """Each way `repeats` times, in turn; the fastest of each."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = data or standard_library(folder)
        texts = list(documents_of(data))
        megabytes = sum(len(text.encode()) for text in texts) / 1e6
        model = folder / "tokenizer.model"
        train_tokenizer(PrepSpec(sources=(SourceSpec(name="all", path=str(data), text="text"),)), model, workers)
        ways: dict[str, Callable[[Path], float]] = {
            "SentencePiece alone, texts in memory": lambda out: encoding_alone(texts, model, workers),
            "`data_prep build`, the whole command": lambda out: our_build(data, model, workers, out),
            "Megatron's way": lambda out: megatron_style(texts, model, workers, out),
        }
        try:
            import datasets  # noqa: F401

            ways["Hugging Face `datasets.map`"] = lambda out: hugging_face(data, model, workers, out)
        except ImportError:
            print("Hugging Face datasets is left out: pip install -e '.[bench]'", file=sys.stderr)
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(repeats):
            for way, run in ways.items():
                out = folder / "out"
                seconds[way].append(run(out))
                shutil.rmtree(out, ignore_errors=True)
    alone = min(seconds["SentencePiece alone, texts in memory"])
    table = Table("way", title=f"{len(texts):,} documents, {megabytes:,.1f} MB of text, {workers} processes")
    for column in ("seconds", "MB/s", "of encoding alone"):
        table.add_column(column, justify="right")
    for way, times in seconds.items():
        best = min(times)
        table.add_row(way, f"{best:.2f}", f"{megabytes / best:.2f}", f"{alone / best:.2f}")
    return table


def memory_table(sizes_mb: list[int]) -> Table:
    """Peak memory of a build whose input is one document, by its size."""
    table = Table("one document of", title="peak memory of a build, 1 process")
    for column in ("resident MB", "seconds"):
        table.add_column(column, justify="right")
    sentence = b"The river runs past an old mill where seven grey cats watch silver fish and dream of snow.\n"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        windows = (
            "The river runs past an old mill where seven grey cats watch silver fish and dream of snow. 0123456789"
        )
        from data_prep.vocabulary import train_vocabulary

        (folder / "tokenizer.model").write_bytes(train_vocabulary([windows] * 50, 512))
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
            table.add_row(f"{size:,} MB", f"{usage.ru_maxrss / 1024:,.0f}", f"{time.perf_counter() - started:.1f}")
            path.unlink()
            shutil.rmtree(folder / "out")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, metavar="PATH")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", type=int, nargs="*", metavar="MB", help="document sizes; instead of the rates")
    options = parser.parse_args()
    if options.memory is not None:
        Console().print(memory_table(options.memory or [10, 50, 250]))
    else:
        Console().print(building_table(options.data, options.workers, options.repeats))


if __name__ == "__main__":
    main()

"""A build from end to end: find, plan, train the vocabulary, encode, and only then make the dataset appear.

Everything is written into a hidden folder beside the destination, which is renamed when complete: a dataset
exists whole or not at all.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from data_prep.encode import encode_in_order
from data_prep.plan import Plan, make_plan, read_all
from data_prep.progress import Stage
from data_prep.shards import SplitWriter
from data_prep.sources import Document, Rejection, SourceFile, find_sources
from data_prep.vocabulary import WindowSample, train_vocabulary
from mdseq.data.format import (
    MANIFEST_FILE,
    REJECTED_FILE,
    TOKENIZER_FILE,
    Manifest,
    Split,
    SplitEntry,
    shard_schema,
    special_token_ids,
    token_dtype,
)
from mdseq.data.tokenizer import Tokenizer
from mdseq.errors import UserError

FORMATS = ("auto", "text", "jsonl", "code")


@dataclass(frozen=True)
class BuildOptions:
    """What to build. `vocab` is the size to train, unused when `tokenizer` names a model to take as it is."""

    data: Path
    out: Path
    format: str = "auto"
    vocab: int = 16384
    tokenizer: Path | None = None
    text_key: str = "text"
    exclude: tuple[str, ...] = ()
    valid_fraction: float = 0.01
    max_rejected_fraction: float = 0.1
    max_shard_tokens: int = 256_000_000
    workers: int = os.cpu_count() or 1

    def recorded(self) -> dict[str, Any]:
        """The options that shape the content, for the manifest and its fingerprint."""
        names = ("format", "text_key", "exclude", "valid_fraction", "max_shard_tokens")
        recorded = {name: asdict(self)[name] for name in names} | {"exclude": list(self.exclude)}
        return recorded if self.tokenizer else recorded | {"vocab": self.vocab}


def build(options: BuildOptions) -> Manifest:
    """Build the dataset `options.out`. Raises UserError, and then leaves nothing behind."""
    _check(options)
    sources = find_sources(options.data, options.format, options.exclude)
    with _appearing_whole(options.out) as folder:
        given = Tokenizer.load(options.tokenizer) if options.tokenizer else None
        sample = None if given else WindowSample.for_vocabulary(options.vocab)
        with Stage("reading") as stage:
            plan = make_plan(sources, options.text_key, options.max_rejected_fraction, sample, stage.advance)
        if options.tokenizer:
            model = options.tokenizer.read_bytes()
        else:
            assert sample is not None
            with Stage("training the vocabulary"):
                model = train_vocabulary(sample, options.vocab)
        _write(folder / TOKENIZER_FILE, model)
        tokenizer = Tokenizer(model)
        splits = _write_splits(folder, sources, plan, model, tokenizer, options)
        manifest = Manifest(
            kind=plan.kind,
            tokenizer_fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            dtype=token_dtype(tokenizer.vocab_size),
            special_tokens=special_token_ids(),
            splits=splits,
            rejected=plan.rejected,
            options=options.recorded(),
        ).signed()
        _write(folder / MANIFEST_FILE, manifest.to_json().encode())
    return manifest


def _write_splits(
    folder: Path,
    sources: list[SourceFile],
    plan: Plan,
    model: bytes,
    tokenizer: Tokenizer,
    options: BuildOptions,
) -> dict[Split, SplitEntry]:
    schema = shard_schema(token_dtype(tokenizer.vocab_size), tokenizer.fingerprint)
    writers: dict[Split, SplitWriter] = {
        split: SplitWriter(folder, split, schema, plan.sources, options.max_shard_tokens)
        for split in ("train", "valid")
    }
    records = read_all(sources, options.text_key)
    with _RejectedFile(folder / REJECTED_FILE) as rejected, Stage("encoding", plan.text_bytes) as stage:
        documents = rejected.set_aside(records)
        with closing(encode_in_order(documents, model, options.workers)) as encoded_documents:
            for encoded in encoded_documents:
                writers[plan.split_of(encoded.document_id, options.valid_fraction)].add(encoded)
                stage.advance(encoded.text_bytes)
    splits = {split: writer.close() for split, writer in writers.items()}
    if sum(split.documents for split in splits.values()) != plan.num_documents:
        raise UserError(f"{options.data} changed while it was read; build again when nothing writes to it")
    return splits


class _RejectedFile:
    """Keeps rejections in a file, which exists only if there are any."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[str] | None = None

    def __enter__(self) -> _RejectedFile:
        return self

    def set_aside(self, records: Iterator[Document | Rejection]) -> Iterator[Document]:
        """The documents among `records`; rejections are written as they pass."""
        for record in records:
            if isinstance(record, Document):
                yield record
                continue
            if self._file is None:
                self._file = self._path.open("x", encoding="utf-8")
            self._file.write(json.dumps(asdict(record)) + "\n")

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


def _check(options: BuildOptions) -> None:
    if options.format not in FORMATS:
        raise UserError(f"FORMAT={options.format} is unknown; allowed: {', '.join(FORMATS)}")
    if options.workers < 1:
        raise UserError(f"WORKERS={options.workers} is not allowed; give 1 or more")
    if options.vocab < 512:
        raise UserError(f"VOCAB={options.vocab} is too small: 256 bytes and an alphabet must fit; give 512 or more")
    if not 0 <= options.valid_fraction < 1:
        raise UserError(f"--valid_fraction={options.valid_fraction} is not allowed; give 0 or more, below 1")
    if not 0 <= options.max_rejected_fraction <= 1:
        raise UserError(f"--max_rejected_fraction={options.max_rejected_fraction} is not allowed; give 0 to 1")
    if options.out.exists():
        raise UserError(f"OUT {options.out} exists and is never overwritten; remove it, or choose another OUT")


@contextmanager
def _appearing_whole(out: Path) -> Iterator[Path]:
    """A folder to write in that becomes `out` at the end, or vanishes if anything goes wrong.

    Turns the system's refusals into UserErrors: an unwritable place, a full disk, an unreadable input.
    """
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as error:
        raise UserError(
            f"cannot write OUT {out}: {error.strerror} ({error.filename}); choose an OUT in a writable folder"
        ) from None
    try:
        yield partial
        _sync_folder(partial)
        partial.rename(out)
        _sync_folder(out.parent)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(
                f"no space left for OUT {out}, nothing was kept; make room, or choose another OUT"
            ) from None
        raise UserError(f"cannot build {out}: {error.strerror or error} ({error.filename})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

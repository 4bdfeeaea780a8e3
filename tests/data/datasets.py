"""Datasets on disk whose every token is known, written by the format's definition and without the builder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from mdseq.data.format import (
    DOCUMENT_ID_BYTES,
    MANIFEST_FILE,
    Kind,
    Manifest,
    ShardEntry,
    SourceEntry,
    Split,
    SplitEntry,
    SplitOfSource,
    Totals,
    file_sha256,
    shard_schema,
    special_token_ids,
)

FINGERPRINT = "none"  # of the tokenizer that these tokens never saw
ORIGIN = "made.txt"


@dataclass(frozen=True)
class Shard:
    """What a shard shall hold.

    Attributes:
        tokens: uint16 or uint32, all documents one after another.
        lengths: Tokens of each document.
        target_starts: 1 for each by default.
    """

    tokens: np.ndarray
    lengths: Sequence[int]
    target_starts: Sequence[int] | None = None


def write_dataset(
    folder: Path,
    splits: Mapping[Split, Mapping[str, Sequence[Shard]]],
    kind: Kind = "text",
    weights: Mapping[str, float] | None = None,
    documents_per_batch: int = 4096,
) -> Path:
    """Write shards and manifest for the shards of each source of each split; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    entries, dtype = {}, "uint16"
    for split, sources in splits.items():
        parts = {}
        for source, shards in sources.items():
            written = []
            for index, shard in enumerate(shards):
                dtype = shard.tokens.dtype.name
                path = folder / f"{split}-{source}-{index:05d}.arrow"
                written.append(write_shard(path, shard, source, documents_per_batch))
            totals = Totals(
                documents=sum(entry.documents for entry in written), tokens=sum(entry.tokens for entry in written)
            )
            parts[source] = SplitOfSource(shards=tuple(written), **totals.model_dump())
        entries[split] = SplitEntry.combine(parts)
    names = dict.fromkeys(source for sources in splits.values() for source in sources)
    manifest = Manifest(
        kind=kind,
        tokenizer_fingerprint=FINGERPRINT,
        vocab_size=np.iinfo(dtype).max + 1,
        dtype=dtype,
        special_tokens=special_token_ids(),
        sources={
            name: SourceEntry(weight=(weights or {}).get(name), path_header="", read=0, rejected={}) for name in names
        },
        splits=entries,
    )
    (folder / MANIFEST_FILE).write_text(manifest.signed().to_json())
    return folder


def write_shard(path: Path, shard: Shard, source: str, documents_per_batch: int = 4096) -> ShardEntry:
    """Write one file; returns its entry in the manifest."""
    schema = shard_schema(shard.tokens.dtype.name, FINGERPRINT)
    edges = np.concatenate([[0], np.cumsum(shard.lengths, dtype=np.int64)])
    starts = np.ones(len(shard.lengths), dtype=np.int64) if shard.target_starts is None else shard.target_starts
    with pa.ipc.new_file(str(path), schema) as writer:
        for first in range(0, len(shard.lengths), documents_per_batch):
            stop = min(first + documents_per_batch, len(shard.lengths))
            documents = np.arange(first, stop)
            offsets = pa.array(edges[first : stop + 1] - edges[first])
            values = pa.array(shard.tokens[edges[first] : edges[stop]])
            columns = [
                pa.LargeListArray.from_arrays(offsets, values, type=schema.field("tokens").type),
                pa.array(starts[first:stop], type=pa.int64()),
                pa.array([document_id(path, d) for d in documents.tolist()], type=pa.binary(DOCUMENT_ID_BYTES)),
                pa.array([source] * len(documents)).dictionary_encode(),
                pa.array([ORIGIN] * len(documents)).dictionary_encode(),
                pa.array(documents),
            ]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
    return ShardEntry(
        file=path.name,
        documents=len(shard.lengths),
        tokens=len(shard.tokens),
        bytes=path.stat().st_size,
        sha256=file_sha256(path),
    )


def document_id(path: Path, row: int) -> bytes:
    """Made up, and different for each document of a dataset."""
    return f"{path.stem[-8:]}{row:08x}".encode()[-DOCUMENT_ID_BYTES:].rjust(DOCUMENT_ID_BYTES, b"-")

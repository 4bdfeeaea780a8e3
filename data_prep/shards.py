"""Encoded documents to Arrow shards: bounded memory, hashed while written, on the disk before they count."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_prep.encode import EncodedDocument
from mdseq.data.format import DOCUMENT_ID_BYTES, ShardEntry, Split, SplitEntry

MAX_BATCH_DOCUMENTS = 4096
MAX_BATCH_TOKENS = 16_000_000


class SplitWriter:
    """Writes one split. A shard is closed before the document that would take it past `max_shard_tokens`."""

    def __init__(
        self, folder: Path, split: Split, schema: pa.Schema, sources: tuple[str, ...], max_shard_tokens: int
    ) -> None:
        self._folder = folder
        self._split = split
        self._schema = schema
        # Arrow files cannot replace a dictionary between batches, so each shard carries all the names.
        self._source_names = pa.array(sources, type=pa.string())
        self._source_index = {name: index for index, name in enumerate(sources)}
        self._max_shard_tokens = max_shard_tokens
        self._shard: _OpenShard | None = None
        self._pending: list[EncodedDocument] = []
        self._pending_tokens = 0
        self._closed_shards: list[ShardEntry] = []
        self._text_bytes = 0

    def add(self, document: EncodedDocument) -> None:
        num_tokens = len(document.tokens)
        shard_tokens = self._pending_tokens + (self._shard.tokens if self._shard else 0)
        if shard_tokens and shard_tokens + num_tokens > self._max_shard_tokens:
            self._close_shard()
        elif len(self._pending) == MAX_BATCH_DOCUMENTS or self._pending_tokens + num_tokens > MAX_BATCH_TOKENS:
            self._write_batch()
        self._pending.append(document)
        self._pending_tokens += num_tokens
        self._text_bytes += document.text_bytes

    def close(self) -> SplitEntry:
        """Write what is left; returns the manifest's entry of the split."""
        self._close_shard()
        return SplitEntry(
            shards=tuple(self._closed_shards),
            documents=sum(shard.documents for shard in self._closed_shards),
            tokens=sum(shard.tokens for shard in self._closed_shards),
            text_bytes=self._text_bytes,
        )

    def _write_batch(self) -> None:
        if not self._pending:
            return
        if self._shard is None:
            name = f"{self._split}-{len(self._closed_shards):05d}.arrow"
            self._shard = _OpenShard(self._folder / name, self._schema)
        self._shard.write(self._to_arrow(self._pending), self._pending_tokens)
        self._pending, self._pending_tokens = [], 0

    def _close_shard(self) -> None:
        self._write_batch()
        if self._shard is not None:
            self._closed_shards.append(self._shard.close())
            self._shard = None

    def _to_arrow(self, documents: list[EncodedDocument]) -> pa.RecordBatch:
        ends = np.cumsum([0, *(len(document.tokens) for document in documents)], dtype=np.int64)
        values = np.concatenate([document.tokens for document in documents])
        indices = pa.array([self._source_index[document.source] for document in documents], type=pa.int32())
        ids = [document.document_id for document in documents]
        columns = [
            pa.LargeListArray.from_arrays(pa.array(ends), pa.array(values), type=self._schema.field("tokens").type),
            pa.array([document.target_start for document in documents], type=pa.int64()),
            pa.array(ids, type=pa.binary(DOCUMENT_ID_BYTES)),
            pa.DictionaryArray.from_arrays(indices, self._source_names),
        ]
        return pa.RecordBatch.from_arrays(columns, schema=self._schema)


class _OpenShard:
    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.tokens = 0
        self._documents = 0
        self._path = path
        self._file = _HashedFile(path)
        self._writer = pa.ipc.new_file(pa.PythonFile(self._file, mode="w"), schema)

    def write(self, batch: pa.RecordBatch, num_tokens: int) -> None:
        self._writer.write_batch(batch)
        self._documents += batch.num_rows
        self.tokens += num_tokens

    def close(self) -> ShardEntry:
        self._writer.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return ShardEntry(
            file=self._path.name,
            documents=self._documents,
            tokens=self.tokens,
            bytes=self._path.stat().st_size,
            sha256=self._file.sha256.hexdigest(),
        )


class _HashedFile(io.BufferedWriter):
    """A new file that hashes what is written, so that no second read is needed."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "x"))
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self.sha256.update(data)
        return super().write(data)

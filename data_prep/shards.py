"""Tokens to Arrow shards, in constant memory however long a document is, and on the disk before they count."""

from __future__ import annotations

import mmap
import tempfile
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa

from data_prep.files import put_in_place, temporary_name
from mdseq.data.format import DOCUMENT_ID_BYTES, ShardEntry, Split, TokenDtype, file_sha256, shard_schema

MAX_BATCH_DOCUMENTS = 4096
MAX_BATCH_TOKENS = 4_000_000
COPY_BYTES = 8 << 20


class ShardWriter:
    """One shard, written under a temporary name beside its own until it is closed.

    A document is given as `append`, once or more, and `end_document`.
    """

    def __init__(
        self, path: Path, dtype: TokenDtype, tokenizer_fingerprint: str, source: str, origins: tuple[str, ...]
    ) -> None:
        self._path = path
        self._temporary = temporary_name(path)
        self._dtype = np.dtype(dtype)
        self._schema = shard_schema(dtype, tokenizer_fingerprint)
        self._sources = pa.array([source], type=pa.string())
        # Arrow files cannot replace a dictionary between batches, so all files of the shard are named at once.
        self._origins = pa.array(origins, type=pa.string())
        self._origin_index = {name: index for index, name in enumerate(origins)}
        self._writer = pa.ipc.new_file(pa.OSFile(str(self._temporary), "wb"), self._schema)
        self._num_batches = 0
        self._batch = _Batch()
        self._document = _Tokens(self._dtype, path.parent)
        self._spilled: list[tuple[int, _Tokens]] = []
        self._documents = self._tokens = self._text_bytes = 0

    def append(self, tokens: np.ndarray) -> None:
        """Add tokens, of any integer type, to the present document."""
        self._document.append(tokens)

    def end_document(self, target_start: int, document_id: bytes, origin: str, row: int, text_bytes: int) -> None:
        """End the present document."""
        document, self._document = self._document, _Tokens(self._dtype, self._path.parent)
        if self._batch.documents and self._batch.tokens + document.length > MAX_BATCH_TOKENS:
            self._write_batch()
        self._batch.add(document, target_start, document_id, self._origin_index[origin], row)
        self._documents += 1
        self._tokens += document.length
        self._text_bytes += text_bytes
        if self._batch.tokens > MAX_BATCH_TOKENS or len(self._batch.documents) == MAX_BATCH_DOCUMENTS:
            self._write_batch()

    def close(self) -> tuple[ShardEntry, int]:
        """Finish the shard and give it its name; returns its entry and the bytes of its text."""
        self._write_batch()
        self._writer.close()
        self._fill_spilled()
        entry = ShardEntry(
            file=self._path.name,
            documents=self._documents,
            tokens=self._tokens,
            bytes=self._temporary.stat().st_size,
            sha256=file_sha256(self._temporary),
        )
        put_in_place(self._temporary, self._path)
        return entry, self._text_bytes

    def _write_batch(self) -> None:
        batch, self._batch = self._batch, _Batch()
        if not batch.documents:
            return
        if batch.documents[-1].is_spilled:
            # Its frame is written with zeros and filled in when all frames stand: the pages of a private mapping that
            # is only read are all one page of zeros, and take no memory.
            (document,) = batch.documents
            private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            values = pa.py_buffer(mmap.mmap(-1, document.num_bytes, flags=private, prot=mmap.PROT_READ))
            array = pa.Array.from_buffers(pa.type_for_alias(self._dtype.name), document.length, [None, values])
            self._spilled.append((self._num_batches, document))
        else:
            chunks = [chunk for document in batch.documents for chunk in document.chunks]
            array = pa.array(np.concatenate([np.empty(0, self._dtype), *chunks]))
        offsets = np.cumsum([0, *(document.length for document in batch.documents)], dtype=np.int64)
        zeros = pa.array(np.zeros(len(batch.documents), dtype=np.int32))
        columns = [
            pa.LargeListArray.from_arrays(pa.array(offsets), array, type=self._schema.field("tokens").type),
            pa.array(batch.target_starts, type=pa.int64()),
            pa.array(batch.document_ids, type=pa.binary(DOCUMENT_ID_BYTES)),
            pa.DictionaryArray.from_arrays(zeros, self._sources),
            pa.DictionaryArray.from_arrays(pa.array(batch.origins, type=pa.int32()), self._origins),
            pa.array(batch.rows, type=pa.int64()),
        ]
        self._writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=self._schema))
        self._num_batches += 1

    def _fill_spilled(self) -> None:
        if not self._spilled:
            return
        places = []
        with pa.memory_map(str(self._temporary)) as mapped:
            start = mapped.read_buffer(1).address
            reader = pa.ipc.open_file(mapped)
            for batch, _ in self._spilled:
                places.append(reader.get_batch(batch).column("tokens").values.buffers()[1].address - start)
        with self._temporary.open("rb+") as file:
            for place, (_, document) in zip(places, self._spilled, strict=True):
                file.seek(place)
                document.copy_to(file)


class _Batch:
    """Documents that will share a record batch; one that is spilled has a batch of its own."""

    def __init__(self) -> None:
        self.tokens = 0
        self.documents: list[_Tokens] = []
        self.target_starts: list[int] = []
        self.document_ids: list[bytes] = []
        self.origins: list[int] = []
        self.rows: list[int] = []

    def add(self, document: _Tokens, target_start: int, document_id: bytes, origin: int, row: int) -> None:
        self.tokens += document.length
        self.documents.append(document)
        self.target_starts.append(target_start)
        self.document_ids.append(document_id)
        self.origins.append(origin)
        self.rows.append(row)


class _Tokens:
    """Tokens of one document: in memory, or beyond MAX_BATCH_TOKENS in a nameless file."""

    def __init__(self, dtype: np.dtype, folder: Path) -> None:
        self._dtype = dtype
        self._folder = folder
        self.chunks: list[np.ndarray] = []
        self.length = 0
        self._file: IO[bytes] | None = None

    @property
    def is_spilled(self) -> bool:
        return self._file is not None

    @property
    def num_bytes(self) -> int:
        return self.length * self._dtype.itemsize

    def append(self, tokens: np.ndarray) -> None:
        self.length += len(tokens)
        self.chunks.append(tokens.astype(self._dtype))
        if self._file is not None or self.length > MAX_BATCH_TOKENS:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 (it lives as long as the document)
            for chunk in self.chunks:
                self._file.write(chunk.data)
            self.chunks = []

    def copy_to(self, file: IO[bytes]) -> None:
        assert self._file is not None
        self._file.seek(0)
        while block := self._file.read(COPY_BYTES):
            file.write(block)
        self._file.close()


def shard_name(split: Split, shard: int) -> str:
    return f"{split}-{shard:05d}.arrow"

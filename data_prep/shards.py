"""Tokens to Arrow shards, in constant memory however long a document is, and on the disk before they count."""

from __future__ import annotations

import mmap
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa

from mdseq.data.format import DOCUMENT_ID_BYTES, ShardEntry, Split, TokenDtype, file_sha256, shard_schema
from mdseq.files import put_in_place, temporary_name

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
        self._schema = shard_schema(dtype, tokenizer_fingerprint)
        self._sources = pa.array([source], type=pa.string())
        # Arrow files cannot replace a dictionary between batches, so all files of the shard are named at once.
        self._origins = pa.array(origins, type=pa.string())
        self._origin_index = {name: index for index, name in enumerate(origins)}
        self._writer = pa.ipc.new_file(pa.OSFile(str(self._temporary), "wb"), self._schema)
        self._num_batches = 0
        # The tokens of the present batch, and after those of its documents, the ones of the present document; unless
        # that has outgrown the buffer and its tokens are in a nameless file.
        self._buffer = np.empty(MAX_BATCH_TOKENS, dtype)
        self._filled = 0
        self._spilled: _SpilledTokens | None = None
        self._batch = _Documents()
        self._frames: list[tuple[int, _SpilledTokens]] = []
        self._documents = self._tokens = self._text_bytes = 0

    def append(self, tokens: np.ndarray) -> None:
        """Add tokens, of any integer type, to the present document."""
        if self._spilled is None and self._filled + len(tokens) > len(self._buffer):
            self._make_room(len(tokens))
        if self._spilled is not None:
            self._spilled.append(tokens.astype(self._buffer.dtype))
        else:
            self._buffer[self._filled : self._filled + len(tokens)] = tokens
            self._filled += len(tokens)

    def end_document(self, target_start: int, document_id: bytes, origin: str, row: int, text_bytes: int) -> None:
        """End the present document."""
        length = self._spilled.length if self._spilled is not None else self._filled - self._batch.num_tokens
        self._batch.add(length, target_start, document_id, self._origin_index[origin], row)
        self._documents += 1
        self._tokens += length
        self._text_bytes += text_bytes
        if self._spilled is not None or len(self._batch.rows) == MAX_BATCH_DOCUMENTS:
            self._write_batch()

    def close(self) -> tuple[ShardEntry, int]:
        """Finish the shard and give it its name; returns its entry and the bytes of its text."""
        self._write_batch()
        self._writer.close()
        self._fill_frames()
        entry = ShardEntry(
            file=self._path.name,
            documents=self._documents,
            tokens=self._tokens,
            bytes=self._temporary.stat().st_size,
            sha256=file_sha256(self._temporary),
        )
        put_in_place(self._temporary, self._path)
        return entry, self._text_bytes

    def _make_room(self, num_tokens: int) -> None:
        """Write the documents that are in the present one's way; if that is not enough, put it into a file."""
        self._write_batch()
        if self._filled + num_tokens > len(self._buffer):
            self._spilled = _SpilledTokens(self._path.parent)
            self._spilled.append(self._buffer[: self._filled])
            self._filled = 0

    def _write_batch(self) -> None:
        """Write the documents that have ended; tokens of one that has not move to the front."""
        batch, self._batch = self._batch, _Documents()
        if not batch.rows:
            return
        if self._spilled is not None:
            # Its frame is written with zeros and filled in when all frames stand: the pages of a private mapping that
            # is only read are all one page of zeros, and take no memory.
            private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            num_bytes = self._spilled.length * self._buffer.itemsize
            zeros = pa.py_buffer(mmap.mmap(-1, num_bytes, flags=private, prot=mmap.PROT_READ))
            kind = self._schema.field("tokens").type.value_type
            values = pa.Array.from_buffers(kind, self._spilled.length, [None, zeros])
            self._frames.append((self._num_batches, self._spilled))
            self._spilled = None
        else:
            values = pa.array(self._buffer[: batch.num_tokens])
        self._writer.write_batch(self._to_arrow(batch, values))
        self._num_batches += 1
        rest = self._buffer[batch.num_tokens : self._filled]
        self._buffer[: len(rest)] = rest.copy()
        self._filled = len(rest)

    def _to_arrow(self, batch: _Documents, values: pa.Array) -> pa.RecordBatch:
        offsets = np.cumsum([0, *batch.lengths], dtype=np.int64)
        only_source = pa.array(np.zeros(len(batch.rows), dtype=np.int32))
        columns = [
            pa.LargeListArray.from_arrays(pa.array(offsets), values, type=self._schema.field("tokens").type),
            pa.array(batch.target_starts, type=pa.int64()),
            pa.array(batch.document_ids, type=pa.binary(DOCUMENT_ID_BYTES)),
            pa.DictionaryArray.from_arrays(only_source, self._sources),
            pa.DictionaryArray.from_arrays(pa.array(batch.origins, type=pa.int32()), self._origins),
            pa.array(batch.rows, type=pa.int64()),
        ]
        return pa.RecordBatch.from_arrays(columns, schema=self._schema)

    def _fill_frames(self) -> None:
        if not self._frames:
            return
        places = []
        with pa.memory_map(str(self._temporary)) as mapped:
            start = mapped.read_buffer(1).address
            reader = pa.ipc.open_file(mapped)
            for batch, _ in self._frames:
                places.append(reader.get_batch(batch).column("tokens").values.buffers()[1].address - start)
        with self._temporary.open("rb+") as file:
            for place, (_, tokens) in zip(places, self._frames, strict=True):
                file.seek(place)
                tokens.move_to(file)


@dataclass
class _Documents:
    """All but the tokens of the documents of a batch."""

    num_tokens: int = 0
    lengths: list[int] = field(default_factory=list)
    target_starts: list[int] = field(default_factory=list)
    document_ids: list[bytes] = field(default_factory=list)
    origins: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)

    def add(self, length: int, target_start: int, document_id: bytes, origin: int, row: int) -> None:
        self.num_tokens += length
        self.lengths.append(length)
        self.target_starts.append(target_start)
        self.document_ids.append(document_id)
        self.origins.append(origin)
        self.rows.append(row)


class _SpilledTokens:
    """Tokens of one long document, in a file without a name that ends with this object."""

    def __init__(self, folder: Path) -> None:
        self.length = 0
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (it is closed by `move_to`)

    def append(self, tokens: np.ndarray) -> None:
        self._file.write(tokens.data)
        self.length += len(tokens)

    def move_to(self, file: IO[bytes]) -> None:
        self._file.seek(0)
        shutil.copyfileobj(self._file, file, COPY_BYTES)
        self._file.close()


def shard_name(split: Split, shard: int) -> str:
    return f"{split}-{shard:05d}.arrow"

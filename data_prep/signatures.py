"""What is kept of a document to find its duplicates: its id and, for near duplicates, a MinHash of its word 5-grams.

A MinHash (Broder, "On the resemblance and containment of documents", 1997) is a row of numbers, of which two documents
have as large a share in common as their sets of n-grams have, J = |A & B| / |A | B|, in expectation. Ours is rensa's
variant of Fast Similarity Sketching (Dahlgaard et al., 2017). For locality-sensitive hashing the row is cut into bands:
documents that agree in all of a band are compared, so a pair is found with probability 1 - (1 - J^rows)^bands.

A shard's signatures are one Arrow file, a row a document, in their order; those of 4,096 documents form a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_prep.documents import Document, Screened
from data_prep.ngrams import Hashes, NgramHasher, mixed, word_hashes
from mdseq.data.format import DOCUMENT_ID_BYTES
from mdseq.errors import UserError
from mdseq.files import put_in_place, temporary_name

SHINGLE_WORDS = 5
NUM_PERMUTATIONS = 128
LEAST_RECALL = 0.95  # of pairs just at the threshold; those above it are found more surely
BATCH_DOCUMENTS = 4096
_SEED = 42
_BAND_MULTIPLIER = np.uint64(0xD1342543DE82EF95)

MinHash = NDArray[np.uint32]


def min_hash(document: Document) -> MinHash | None:
    """[NUM_PERMUTATIONS]; None for a document of fewer than SHINGLE_WORDS words. Source and target are one text.

    Memory does not grow with the document, as the MinHash of a text is the smallest of those of its stretches.
    """
    from rensa import RMinHash  # type: ignore[import-untyped]

    hasher = NgramHasher(SHINGLE_WORDS)
    smallest = None
    for part in document.parts:
        for words in word_hashes(part):
            shingles = hasher.add(words)
            if len(shingles):
                matrix = RMinHash.digest_matrix_from_flat_token_hashes(
                    shingles, [0, len(shingles)], NUM_PERMUTATIONS, _SEED
                )
                values = np.array(matrix.to_rows()[0], np.uint32)
                smallest = values if smallest is None else np.minimum(smallest, values)
    return smallest


def bands_for(threshold: float) -> tuple[int, int]:
    """Number of bands and of rows in each: the most rows, so the fewest needless comparisons, with LEAST_RECALL."""
    for rows in range(NUM_PERMUTATIONS, 1, -1):
        bands = NUM_PERMUTATIONS // rows
        if 1 - (1 - threshold**rows) ** bands >= LEAST_RECALL:
            return bands, rows
    return NUM_PERMUTATIONS, 1


class SignatureWriter:
    """Writes the signatures of a shard's documents; the file appears, whole, when the `with` block ends well.

    A near_threshold of 0 asks for exact duplicates only.
    """

    def __init__(self, path: Path, near_threshold: float) -> None:
        self._path = path
        self._near_threshold = near_threshold
        self._ids: list[bytes] = []
        self._min_hashes: list[MinHash | None] = []
        self._schema = _schema(near_threshold)
        self._writer = pa.ipc.new_file(temporary_name(path), self._schema)

    def __enter__(self) -> Self:
        return self

    def add(self, screened: Screened) -> None:
        self._ids.append(screened.document_id)
        if self._near_threshold:
            self._min_hashes.append(min_hash(screened.document))
        if len(self._ids) == BATCH_DOCUMENTS:
            self._write_batch()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        temporary = temporary_name(self._path)
        try:
            if kind is None and self._ids:
                self._write_batch()
            self._writer.close()
            if kind is None:
                put_in_place(temporary, self._path)
        finally:
            temporary.unlink(missing_ok=True)

    def _write_batch(self) -> None:
        columns = [pa.array(self._ids, pa.binary(DOCUMENT_ID_BYTES))]
        if self._near_threshold:
            nothing = np.zeros(NUM_PERMUTATIONS, np.uint32)
            rows = np.stack([nothing if row is None else row for row in self._min_hashes])
            columns.append(pa.array([row is not None for row in self._min_hashes]))
            columns.append(
                pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), type=self._schema.field(2).type)
            )
            columns += [pa.array(hashes) for hashes in _band_hashes(rows, self._near_threshold)]
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
        self._ids, self._min_hashes = [], []


def _schema(near_threshold: float) -> pa.Schema:
    fields = [pa.field("document_id", pa.binary(DOCUMENT_ID_BYTES), nullable=False)]
    metadata = {"near_threshold": str(near_threshold)}
    if near_threshold:
        from rensa import RMinHash

        values = pa.list_(pa.field("item", pa.uint32(), nullable=False), NUM_PERMUTATIONS)
        fields += [pa.field("has_shingles", pa.bool_(), nullable=False), pa.field("min_hash", values, nullable=False)]
        fields += [
            pa.field(band_name(band), pa.uint64(), nullable=False) for band in range(bands_for(near_threshold)[0])
        ]
        metadata["min_hash"] = f"rensa.RMinHash {RMinHash.ALGORITHM_VERSION}"
    return pa.schema(fields, metadata=metadata)


def band_name(band: int) -> str:
    return f"band_{band:03d}"


def _band_hashes(rows: MinHash, near_threshold: float) -> list[Hashes]:
    """A hash of each band of each row: bands x [len(rows)]."""
    num_bands, width = bands_for(near_threshold)
    bands = []
    for band in range(num_bands):
        hashes = np.full(len(rows), band, np.uint64)
        for column in range(band * width, (band + 1) * width):
            hashes = mixed(hashes * _BAND_MULTIPLIER + rows[:, column])
        bands.append(hashes)
    return bands


class Signatures:
    """The signatures of all shards, read where they are needed; documents are numbered in the order of the shards."""

    def __init__(self, paths: Sequence[Path], near_threshold: float) -> None:
        """Raises UserError where a file was made with another threshold, or by another kind of MinHash."""
        self._paths = paths
        self._reader = lru_cache(maxsize=256)(lambda path: pa.ipc.open_file(pa.memory_map(str(path))))
        self._batches: list[tuple[int, int]] = []  # shard, number of the batch in its file
        batch_sizes = [0]
        shard_sizes = [0]
        expected = _schema(near_threshold)
        for shard, path in enumerate(paths):
            reader = self._reader(path)
            if not reader.schema.equals(expected, check_metadata=True):
                raise UserError(
                    f"{path} was written with other settings or another release of rensa; remove it and build again"
                )
            sizes = [reader.get_batch(number).num_rows for number in range(reader.num_record_batches)]
            self._batches += [(shard, number) for number in range(len(sizes))]
            batch_sizes += sizes
            shard_sizes.append(sum(sizes))
        self._batch_starts = np.cumsum(batch_sizes)
        self.shard_starts = np.cumsum(shard_sizes)
        """Number of each shard's first document, and that of all documents: [shards + 1]."""

    def __len__(self) -> int:
        return int(self.shard_starts[-1])

    def column(self, name: str) -> NDArray[Any]:
        """A column of plain values, of all documents."""
        columns = [self._column(batch, name).to_numpy(zero_copy_only=False) for batch in range(len(self._batches))]
        return np.concatenate([np.empty(0, columns[0].dtype if columns else np.uint64), *columns])

    def id_halves(self, half: int) -> Hashes:
        """The first (0) or last (1) eight bytes of all document ids."""
        halves = [np.empty(0, np.uint64)]
        for batch in range(len(self._batches)):
            ids = self._column(batch, "document_id")
            halves.append(np.frombuffer(ids.buffers()[1], np.uint64, 2 * len(ids))[half::2])
        return np.concatenate(halves)

    def min_hashes(self, documents: NDArray[np.int64]) -> MinHash:
        """Rows of some documents: [len(documents), NUM_PERMUTATIONS]."""
        rows = np.empty((len(documents), NUM_PERMUTATIONS), np.uint32)
        batches = np.searchsorted(self._batch_starts, documents, side="right") - 1
        order = np.argsort(batches, kind="stable")
        present, firsts = np.unique(batches[order], return_index=True)
        for batch, places in zip(present, np.split(order, firsts[1:]), strict=True):
            values = self._column(int(batch), "min_hash").flatten().to_numpy().reshape(-1, NUM_PERMUTATIONS)
            rows[places] = values[documents[places] - self._batch_starts[batch]]
        return rows

    def _column(self, batch: int, name: str) -> pa.Array:
        shard, number = self._batches[batch]
        return self._reader(self._paths[shard]).get_batch(number)[name]

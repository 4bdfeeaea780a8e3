"""Read access to one split of a dataset: zero-copy views of its documents' tokens.

Opening maps the shards into memory and reads two int64 a document; tokens stay on disk until they are
touched, and no Python object exists per token. Documents are numbered 0..num_documents-1 in shard order.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from mdseq.data.format import Manifest, ShardEntry, Split, file_sha256, shard_schema
from mdseq.errors import UserError


class Corpus:
    """One split, memory mapped.

    offsets: int64 [num_documents + 1], tokens before each document over the whole split.
    target_starts: int64 [num_documents], index within each document of the first token that may be noised.
    """

    def __init__(self, manifest: Manifest, batches: list[pa.RecordBatch]) -> None:
        self.manifest = manifest
        self._batches = batches
        self._batch_values = [batch.column("tokens").values.to_numpy(zero_copy_only=True) for batch in batches]
        self._batch_first_document = np.cumsum([0] + [batch.num_rows for batch in batches])
        lengths = [np.diff(batch.column("tokens").offsets.to_numpy()) for batch in batches]
        self.offsets: np.ndarray = np.concatenate([[0], *lengths], dtype=np.int64).cumsum()
        self.target_starts: np.ndarray = np.concatenate(
            [batch.column("target_start").to_numpy() for batch in batches], dtype=np.int64
        )
        self.num_documents = len(self.target_starts)
        self.num_tokens = int(self.offsets[-1])

    @classmethod
    def open(cls, data_dir: Path, split: Split, verify: bool = False) -> Corpus:
        """Map the shards of `split`; `verify` also hashes them (reads every byte).

        Raises UserError: no dataset, an empty split, or a shard that is missing, truncated or corrupt.
        """
        manifest = Manifest.load(data_dir)
        entry = manifest.splits.get(split)
        if entry is None or entry.documents == 0:
            raise UserError(
                f"{data_dir} has no documents in its {split!r} split; "
                "build it again from more documents, or with another --valid_fraction"
            )
        batches = [batch for shard in entry.shards for batch in _open_shard(data_dir, shard, manifest, verify)]
        return cls(manifest, batches)

    def length(self, document: int) -> int:
        """Tokens in `document`."""
        return int(self.offsets[document + 1] - self.offsets[document])

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens start..stop of `document` (to its end by default): a read-only view into the mapped file."""
        batch = self._batch_of(document)
        batch_start = self.offsets[self._batch_first_document[batch]]
        first = self.offsets[document] - batch_start
        last = self.offsets[document + 1] - batch_start
        view: np.ndarray = self._batch_values[batch][first:last][start:stop]
        return view

    def source(self, document: int) -> str:
        """Path, relative to what was built, of the file that `document` came from."""
        name: str = self._cell("source", document).as_py()
        return name

    def document_id(self, document: int) -> bytes:
        """Content hash of `document`."""
        identity: bytes = self._cell("document_id", document).as_py()
        return identity

    def _cell(self, column: str, document: int) -> pa.Scalar:
        batch = self._batch_of(document)
        return self._batches[batch].column(column)[document - int(self._batch_first_document[batch])]

    def _batch_of(self, document: int) -> int:
        return int(np.searchsorted(self._batch_first_document, document, side="right")) - 1


def _open_shard(data_dir: Path, shard: ShardEntry, manifest: Manifest, verify: bool) -> list[pa.RecordBatch]:
    path = data_dir / shard.file
    try:
        size = path.stat().st_size
        if size != shard.bytes:
            raise _damaged(path, f"it has {size:,} bytes and the manifest says {shard.bytes:,}")
        if verify and file_sha256(path) != shard.sha256:
            raise _damaged(path, "its sha256 differs from the manifest's")
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
    except (OSError, pa.ArrowInvalid) as error:
        raise _damaged(path, str(error)) from None
    if not reader.schema.equals(shard_schema(manifest.dtype, manifest.tokenizer_fingerprint), check_metadata=True):
        raise _damaged(path, "its columns or its tokenizer are not those of the manifest")
    _check_layout(path, shard, batches)
    return batches


def _check_layout(path: Path, shard: ShardEntry, batches: list[pa.RecordBatch]) -> None:
    """Offsets inside the file must be usable as they are: they are followed without further checks."""
    documents = tokens = 0
    for batch in batches:
        column = batch.column("tokens")
        offsets = column.offsets.to_numpy()
        if offsets[0] != 0 or offsets[-1] != len(column.values) or np.any(np.diff(offsets) < 0):
            raise _damaged(path, "its document offsets are not in order")
        documents += batch.num_rows
        tokens += len(column.values)
    if (documents, tokens) != (shard.documents, shard.tokens):
        raise _damaged(
            path,
            f"it holds {documents:,} documents and {tokens:,} tokens; "
            f"the manifest says {shard.documents:,} and {shard.tokens:,}",
        )


def _damaged(path: Path, finding: str) -> UserError:
    return UserError(
        f"{path} is damaged: {finding}; copy it again from where it was built, or build the dataset again "
        f"(`python -m data_prep verify {path.parent}` checks every shard)"
    )

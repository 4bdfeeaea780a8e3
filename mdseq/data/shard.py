"""One shard file, mapped into memory and checked: the columns of its record batches as views into the file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from mdseq.data.format import Manifest, ShardEntry, file_sha256, shard_schema
from mdseq.errors import UserError


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive documents of a corpus that one record batch holds.

    Attributes:
        first_document, end_document: Numbers of its first document within the corpus, and of the one after its last.
        first_token, end_token: Likewise for positions in the corpus' stream of tokens.
        offsets: int64 [documents + 1], tokens of the block before each document.
        tokens: uint16 or uint32 [tokens], read-only.
        target_starts: int64 [documents].
        batch: The record batch itself, for the columns that training does not read.
    """

    first_document: int
    end_document: int
    first_token: int
    end_token: int
    offsets: np.ndarray
    tokens: np.ndarray
    target_starts: np.ndarray
    batch: pa.RecordBatch


def check_size(path: Path, entry: ShardEntry) -> None:
    """Raise UserError unless the file is there with the size that the manifest states; opens nothing."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise damaged(path, str(error)) from None
    if size != entry.bytes:
        raise damaged(path, f"it has {size:,} bytes and the manifest says {entry.bytes:,}")


def check_hash(path: Path, entry: ShardEntry) -> None:
    """Raise UserError unless every byte of the file is as it was built."""
    try:
        sha256 = file_sha256(path)
    except OSError as error:
        raise damaged(path, str(error)) from None
    if sha256 != entry.sha256:
        raise damaged(path, "its sha256 differs from the manifest's")


def map_shard(
    path: Path, entry: ShardEntry, manifest: Manifest, first_document: int, first_token: int
) -> tuple[Block, ...]:
    """Map a shard whose first document and token have these numbers in the corpus.

    Reads its footer and its document offsets; tokens stay on the disk until they are touched. Arrow closes the file
    once it is mapped, so thousands of shards need no file descriptors.

    Raises:
        UserError: It cannot be mapped, or does not hold what the manifest says.
    """
    try:
        with pa.memory_map(str(path)) as file:
            reader = pa.ipc.open_file(file)
            batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
    except (OSError, pa.ArrowInvalid) as error:
        raise damaged(path, str(error)) from None
    if not reader.schema.equals(shard_schema(manifest.dtype, manifest.tokenizer_fingerprint), check_metadata=True):
        raise damaged(path, "its columns or its tokenizer are not those of the manifest")
    documents = tokens = 0
    blocks = []
    for batch in batches:
        block = _block(path, batch, first_document + documents, first_token + tokens)
        documents += batch.num_rows
        tokens += len(block.tokens)
        if batch.num_rows:
            blocks.append(block)
    if (documents, tokens) != (entry.documents, entry.tokens):
        raise damaged(
            path,
            f"it holds {documents:,} documents and {tokens:,} tokens; "
            f"the manifest says {entry.documents:,} and {entry.tokens:,}",
        )
    return tuple(blocks)


def _block(path: Path, batch: pa.RecordBatch, first_document: int, first_token: int) -> Block:
    """Views of a batch. Its offsets must be usable as they are: they are followed without further checks."""
    column = batch.column("tokens")
    offsets = column.offsets.to_numpy()
    tokens = column.values.to_numpy(zero_copy_only=True)
    if offsets[0] != 0 or offsets[-1] != len(tokens) or np.any(offsets[1:] < offsets[:-1]):
        raise damaged(path, "its document offsets are not in order")
    return Block(
        first_document=first_document,
        end_document=first_document + batch.num_rows,
        first_token=first_token,
        end_token=first_token + len(tokens),
        offsets=offsets,
        tokens=tokens,
        target_starts=batch.column("target_start").to_numpy(),
        batch=batch,
    )


def damaged(path: Path, finding: str) -> UserError:
    return UserError(
        f"{path} is damaged: {finding}; copy it again from where it was built, or build the dataset again "
        f"(`python -m data_prep verify {path.parent}` checks every shard)"
    )

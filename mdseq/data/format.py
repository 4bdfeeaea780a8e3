"""The dataset on disk, the contract between builder and trainer; `docs/data_format.md` is its prose.

A dataset is a folder: `manifest.json`, `tokenizer.model`, `plan.json` (what it was built from) and shards
`train-00000.arrow`, `valid-00000.arrow`, ... A shard is an uncompressed Arrow IPC *file* (it has a footer, so it can be
memory mapped and opened in milliseconds), one row a document, all of one source.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError

from mdseq.data.tokenizer import SpecialToken
from mdseq.errors import UserError

FORMAT_VERSION = 2
MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.model"
REJECTED_FILE = "rejected.jsonl"
PLAN_FILE = "plan.json"
DOCUMENT_ID_BYTES = 16

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
Kind = Literal["text", "pair"]
TokenDtype = Literal["uint16", "uint32"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ShardEntry(_Record):
    """One shard file, as it must be found."""

    file: str
    documents: int
    tokens: int
    bytes: int
    sha256: str


class Totals(_Record):
    """`text_bytes` counts the UTF-8 text that the tokens decode to."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0

    @classmethod
    def of(cls, parts: Iterable[Totals]) -> Totals:
        """Their sums."""
        parts = tuple(parts)
        return Totals(
            documents=sum(part.documents for part in parts),
            tokens=sum(part.tokens for part in parts),
            text_bytes=sum(part.text_bytes for part in parts),
        )


class SplitOfSource(Totals):
    """One source's part of a split: its shards, in order."""

    shards: tuple[ShardEntry, ...]


class SplitEntry(Totals):
    """A split: the parts of the sources that have documents in it, in the order of the manifest's sources."""

    sources: dict[str, SplitOfSource]

    @classmethod
    def combine(cls, sources: dict[str, SplitOfSource]) -> SplitEntry:
        return cls(sources=sources, **Totals.of(sources.values()).model_dump())


class SourceEntry(_Record):
    """A source as a whole.

    `read` = what was rejected, by reason, + the documents held out + (those of the training split + `merged`) / `copies`;
    `merged` counts documents, copies included, that are part of the one before.
    """

    weight: float | None
    path_header: str
    copies: int = 1
    merged: int = 0
    read: int
    rejected: dict[str, int]


class Manifest(_Record):
    """What a dataset is. `fingerprint` identifies the content, not the place or the time."""

    format_version: int = FORMAT_VERSION
    fingerprint: str = ""
    kind: Kind
    tokenizer_fingerprint: str
    vocab_size: int
    dtype: TokenDtype
    special_tokens: dict[str, int]
    sources: dict[str, SourceEntry]
    splits: dict[Split, SplitEntry]

    def content_fingerprint(self) -> str:
        """Hash of format version, tokenizer, kind, the sources' weights, and the ordered hashes of the shards."""
        weights = {name: source.weight for name, source in self.sources.items()}
        shards = {
            split: {name: [shard.sha256 for shard in part.shards] for name, part in entry.sources.items()}
            for split, entry in self.splits.items()
        }
        identity = [self.format_version, self.tokenizer_fingerprint, self.kind, weights, shards]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def signed(self) -> Manifest:
        """The same manifest with its fingerprint filled in."""
        return self.model_copy(update={"fingerprint": self.content_fingerprint()})

    def accounts_for(self, source: str) -> bool:
        """Whether every record of a source that was read is a document, or rejected."""
        whole = self.sources[source]
        parts = {split: entry.sources[source] for split, entry in self.splits.items() if source in entry.sources}
        in_training = parts["train"].documents if "train" in parts else 0
        held_out = sum(part.documents for split, part in parts.items() if split != "train")
        return (whole.read - sum(whole.rejected.values()) - held_out) * whole.copies == in_training + whole.merged

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def load(cls, data_dir: Path) -> Manifest:
        """Read `data_dir/manifest.json`. Raises UserError: no folder, no manifest, not ours, edited."""
        path = data_dir / MANIFEST_FILE
        if not data_dir.is_dir():
            raise UserError(f"no dataset folder {data_dir}; build one with: make prep DATA=PATH OUT={data_dir}")
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise UserError(
                f"{data_dir} is not a dataset: it has no {MANIFEST_FILE}; "
                "give the folder that `make prep` wrote (its OUT)"
            ) from None
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        except ValueError as error:
            raise UserError(f"{path} is not valid JSON ({error}); build the dataset again") from None
        version = content.get("format_version") if isinstance(content, dict) else None
        if version != FORMAT_VERSION:
            raise UserError(
                f"{path} has format version {version!r}; this code reads version {FORMAT_VERSION}: "
                "build the dataset again, or use the release that built it"
            )
        try:
            manifest = cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise UserError(f"{path}: {where}: {first['msg']}; build the dataset again") from None
        if manifest.fingerprint != manifest.content_fingerprint():
            raise UserError(f"{path} was changed after the build: its fingerprint differs; build the dataset again")
        return manifest


def special_token_ids() -> dict[str, int]:
    """The special ids as the manifest records them."""
    return {token.name.lower(): int(token) for token in SpecialToken}


def token_dtype(vocab_size: int) -> TokenDtype:
    """The narrowest type that holds every id of the vocabulary."""
    return "uint16" if vocab_size <= np.iinfo(np.uint16).max + 1 else "uint32"


def shard_schema(dtype: TokenDtype, tokenizer_fingerprint: str) -> pa.Schema:
    """Columns of a shard. 64-bit offsets, because a batch of long documents outgrows 32-bit ones."""
    return pa.schema(
        [
            pa.field("tokens", pa.large_list(pa.field("item", pa.type_for_alias(dtype), nullable=False)), False),
            pa.field("target_start", pa.int64(), nullable=False),
            pa.field("document_id", pa.binary(DOCUMENT_ID_BYTES), nullable=False),
            pa.field("source", pa.dictionary(pa.int32(), pa.string()), nullable=False),
            pa.field("origin", pa.dictionary(pa.int32(), pa.string()), nullable=False),
            pa.field("row", pa.int64(), nullable=False),
        ],
        metadata={"format_version": str(FORMAT_VERSION), "tokenizer_fingerprint": tokenizer_fingerprint},
    )


class DocumentHash:
    """Content hash of a document, fed piece by piece; the same wherever the document is found."""

    def __init__(self) -> None:
        self._digest = hashlib.blake2b(digest_size=DOCUMENT_ID_BYTES)
        self._part_bytes = 0

    def update(self, content: bytes) -> None:
        """Add UTF-8 text of the present part."""
        self._digest.update(content)
        self._part_bytes += len(content)

    def end_part(self) -> None:
        """End the text, or the source or target of a pair."""
        # The length keeps the pair ("ab", "c") apart from ("a", "bc").
        self._digest.update(self._part_bytes.to_bytes(8, "little"))
        self._part_bytes = 0

    def document_id(self) -> bytes:
        return self._digest.digest()


def document_id(*parts: str) -> bytes:
    """`DocumentHash` of a text, or of a source and its target."""
    digest = DocumentHash()
    for part in parts:
        digest.update(part.encode())
        digest.end_part()
    return digest.document_id()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

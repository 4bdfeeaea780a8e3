"""Looking at a dataset that exists: is it intact, and what does a document of it read like?"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from mdseq.data.corpus import Corpus
from mdseq.data.format import (
    MANIFEST_FILE,
    TOKENIZER_FILE,
    DocumentHash,
    Manifest,
    ShardEntry,
    Split,
    SplitEntry,
    Totals,
    special_token_ids,
    token_dtype,
)
from mdseq.data.shard import Block, check_hash, check_size, map_shard
from mdseq.data.tokenizer import SpecialToken, Tokenizer
from mdseq.errors import UserError

ROUND_TRIP_DOCUMENTS = 200
STRETCH_TOKENS = 1 << 20
MAX_THREADS = 8
FIRST_TEXT_TOKEN = max(SpecialToken) + 1


def verify(data_dir: Path, advance: Callable[[int], None] = lambda _: None) -> int:
    """Check a dataset whole, in constant memory however large its shards and documents are.

    That is: the manifest against itself and the tokenizer; of each shard size, hash and schema; of each document
    offsets, special tokens, `target_start` and the range of its ids; the bytes of text against the manifest; and of
    ROUND_TRIP_DOCUMENTS of each split, that decoding gives back the text that was hashed at the build.

    Args:
        data_dir: The dataset.
        advance: Told the bytes of each shard that is done.

    Returns:
        The number of documents.

    Raises:
        UserError: Naming the first fault, its file and its document.
    """
    manifest = Manifest.load(data_dir)
    tokenizer = Tokenizer.load(data_dir / TOKENIZER_FILE)
    _check_manifest(data_dir, manifest, tokenizer)
    text_bytes: dict[tuple[Split, str], int] = {}
    # Hashing and most of numpy run without the interpreter's lock.
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        checks = list(_shard_checks(data_dir, manifest, tokenizer))
        for check, found in zip(checks, pool.map(_ShardCheck.run, checks), strict=True):
            part = (check.split, check.source)
            text_bytes[part] = text_bytes.get(part, 0) + found
            advance(check.entry.bytes)
    for (split, source), found in text_bytes.items():
        stated = manifest.splits[split].sources[source].text_bytes
        if found != stated:
            raise _untrue(data_dir, f"{source} has {found:,} bytes of text in {split}, not text_bytes = {stated:,}")
    return Totals.of(manifest.splits.values()).documents


def show(data_dir: Path, split: Split, document: int) -> str:
    """One document as text, with its boundaries visible. Raises UserError when there is no such document."""
    corpus = Corpus.open(data_dir, split)
    if not 0 <= document < corpus.num_documents:
        raise UserError(f"{data_dir} has no {split} document {document}; allowed: 0 to {corpus.num_documents - 1}")
    tokenizer = Tokenizer.load(data_dir / TOKENIZER_FILE)
    target_start = corpus.target_start(document)
    given, target = (tokenizer.decode(corpus.tokens(document, *part)) for part in ((0, target_start), (target_start,)))
    header = (
        f"{split} document {document} of {corpus.num_documents:,}: {corpus.source(document)}, "
        f"{corpus.origin(document)}, row {corpus.row(document):,}; {corpus.length(document):,} tokens, "
        f"target from {target_start:,}; id {corpus.document_id(document).hex()}"
    )
    body = f"{given}<SEP>{target}" if corpus.manifest.kind == "pair" else f"{given}{target}"
    return f"{header}\n<BOS>{body}<EOS>"


def _check_manifest(data_dir: Path, manifest: Manifest, tokenizer: Tokenizer) -> None:
    if tokenizer.fingerprint != manifest.tokenizer_fingerprint:
        raise UserError(f"{data_dir / TOKENIZER_FILE} is not the tokenizer of the manifest; build the dataset again")
    vocabulary = (tokenizer.vocab_size, token_dtype(tokenizer.vocab_size), special_token_ids())
    if (manifest.vocab_size, manifest.dtype, manifest.special_tokens) != vocabulary:
        raise _untrue(data_dir, "vocab_size, dtype or special_tokens are not those of the tokenizer")
    for split, entry in manifest.splits.items():
        for source, part in entry.sources.items():
            if source not in manifest.sources:
                raise _untrue(data_dir, f"{split} has a source {source} that is not among the sources")
            sums = tuple(sum(getattr(shard, name) for shard in part.shards) for name in ("documents", "tokens"))
            if sums != (part.documents, part.tokens):
                raise _untrue(data_dir, f"the shards of {source} in {split} do not add up to its totals")
        if entry != SplitEntry.combine(entry.sources):
            raise _untrue(data_dir, f"the sources of {split} do not add up to its totals")
    for name, whole in manifest.sources.items():
        if not manifest.accounts_for(name):
            raise _untrue(data_dir, f"of the {whole.read:,} records of {name} some are neither kept nor rejected")


def _untrue(data_dir: Path, finding: str) -> UserError:
    return UserError(f"{data_dir / MANIFEST_FILE}: {finding}; build the dataset again")


def _shard_checks(data_dir: Path, manifest: Manifest, tokenizer: Tokenizer) -> Iterator[_ShardCheck]:
    for split, entry in manifest.splits.items():
        first_document = 0
        sample_step = max(1, -(-entry.documents // ROUND_TRIP_DOCUMENTS))
        for source, part in entry.sources.items():
            for shard in part.shards:
                yield _ShardCheck(data_dir, manifest, tokenizer, split, source, shard, first_document, sample_step)
                first_document += shard.documents


@dataclass(frozen=True)
class _ShardCheck:
    """What is checked of one shard; `first_document` is its first document's number in the split."""

    data_dir: Path
    manifest: Manifest
    tokenizer: Tokenizer
    split: Split
    source: str
    entry: ShardEntry
    first_document: int
    sample_step: int

    def run(self) -> int:
        """Bytes of text in the shard. Raises UserError at the first fault."""
        path = self.data_dir / self.entry.file
        check_size(path, self.entry)
        check_hash(path, self.entry)
        counts = np.zeros(self.tokenizer.vocab_size, dtype=np.int64)
        for block in map_shard(path, self.entry, self.manifest, self.first_document, 0):
            self._check_columns(block)
            positions, values = self._special_tokens(block)
            for start in range(0, len(block.tokens), STRETCH_TOKENS):
                self._check_stretch(block, start, positions, values)
                counts += np.bincount(block.tokens[start : start + STRETCH_TOKENS], minlength=len(counts))
            first_sampled = -block.first_document % self.sample_step
            for index in range(first_sampled, len(block.target_starts), self.sample_step):
                self._check_text(block, index)
        return int(counts @ self.tokenizer.text_bytes)

    def _check_columns(self, block: Block) -> None:
        try:
            block.batch.validate(full=True)
        except pa.ArrowInvalid as error:
            raise self._fault(f"record batch of document {block.first_document}: {error}") from None
        for name in block.batch.schema.names:
            if block.batch.column(name).null_count:
                raise self._fault(f"column {name} has nulls")
        sources = block.batch.column("source").unique().to_pylist()
        if sources != [self.source]:
            raise self._fault(f"it has documents of {', '.join(sources)}")
        self._require(block, block.batch.column("row").to_numpy() >= 0, "its row is negative")

    def _special_tokens(self, block: Block) -> tuple[np.ndarray, np.ndarray]:
        """Where special tokens must be, as positions in the block, and which."""
        starts, ends = block.offsets[:-1], block.offsets[1:]
        lengths, target_starts = ends - starts, block.target_starts
        if self.manifest.kind == "text":
            self._require(block, lengths >= 2, "it has less than BOS and EOS")
            self._require(block, target_starts == 1, "its target_start is not 1")
            positions, values = [starts, ends - 1], [SpecialToken.BOS, SpecialToken.EOS]
        else:
            self._require(block, lengths >= 3, "it has less than BOS, SEP and EOS")
            inside = (target_starts >= 2) & (target_starts < lengths)
            self._require(block, inside, "its target_start lies outside of it")
            positions = [starts, starts + target_starts - 1, ends - 1]
            values = [SpecialToken.BOS, SpecialToken.SEP, SpecialToken.EOS]
        return np.stack(positions, axis=1).ravel(), np.tile(np.array(values), len(starts))

    def _check_stretch(self, block: Block, start: int, positions: np.ndarray, values: np.ndarray) -> None:
        """Special tokens stand where they must and nowhere else, and all others are in the vocabulary."""
        tokens = block.tokens[start : start + STRETCH_TOKENS]
        first, last = np.searchsorted(positions, (start, start + len(tokens)))
        expected = np.full(len(tokens), FIRST_TEXT_TOKEN, dtype=tokens.dtype)
        expected[positions[first:last] - start] = values[first:last]
        is_wrong = np.minimum(tokens, tokens.dtype.type(FIRST_TEXT_TOKEN)) != expected
        is_wrong |= tokens >= self.tokenizer.vocab_size
        if is_wrong.any():
            position = int(np.argmax(is_wrong))
            document = int(np.searchsorted(block.offsets, start + position, side="right")) - 1
            index = start + position - int(block.offsets[document])
            raise self._fault_in(block, document, f"its token {index:,} is {tokens[position]}, which cannot be there")

    def _check_text(self, block: Block, document: int) -> None:
        """The decoded text, without the header that the source's files were given, has the document's id."""
        origin, identity = (block.batch.column(name)[document].as_py() for name in ("origin", "document_id"))
        header = self.manifest.sources[self.source].path_header.replace("{path}", origin).encode()
        tokens = block.tokens[block.offsets[document] : block.offsets[document + 1]]
        target_start = int(block.target_starts[document])
        parts = [tokens] if self.manifest.kind == "text" else [tokens[:target_start], tokens[target_start:]]
        # A token spells a byte or more, but for BOS.
        if not self.tokenizer.decode_bytes(tokens[: len(header) + 1]).startswith(header):
            raise self._fault_in(block, document, f"its text does not begin with {header.decode()!r}")
        digest, to_skip = DocumentHash(), len(header)
        for part in parts:
            for start in range(0, len(part), STRETCH_TOKENS):
                content = self.tokenizer.decode_bytes(part[start : start + STRETCH_TOKENS])
                digest.update(content[to_skip:])
                to_skip = max(0, to_skip - len(content))
            digest.end_part()
        if digest.document_id() != identity:
            raise self._fault_in(block, document, "its text is not the text that was hashed at the build")

    def _require(self, block: Block, is_right: np.ndarray, otherwise: str) -> None:
        if not is_right.all():
            raise self._fault_in(block, int(np.argmin(is_right)), otherwise)

    def _fault_in(self, block: Block, index: int, finding: str) -> UserError:
        origin, row = (block.batch.column(name)[index].as_py() for name in ("origin", "row"))
        return self._fault(f"{self.split} document {block.first_document + index} ({origin}, row {row}): {finding}")

    def _fault(self, finding: str) -> UserError:
        return UserError(f"{self.data_dir / self.entry.file}: {finding}; build the dataset again")

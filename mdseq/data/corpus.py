"""Read access to one split of a dataset: a stream of tokens, cut into documents, over any number of shards.

Opening reads the manifest and the sizes of the files. A shard is mapped when something in it is first asked for; its
tokens stay on disk until they are touched, and no Python object exists per document or token. Documents are numbered
0..num_documents-1, and tokens 0..num_tokens-1, in the order of the manifest's sources and of their shards.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import accumulate
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from mdseq.data.format import Manifest, ShardEntry, Split
from mdseq.data.shard import Block, check_hash, check_size, map_shard
from mdseq.errors import UserError

_FIRST_DOCUMENT, _END_DOCUMENT = attrgetter("first_document"), attrgetter("end_document")
_FIRST_TOKEN, _END_TOKEN = attrgetter("first_token"), attrgetter("end_token")


class Corpus:
    """One split, or one source's part of it. May be read by several threads at once.

    Attributes:
        num_documents, num_tokens: Of all shards, from the manifest.
        sources: The documents of each source that has any, in the manifest's order.
    """

    def __init__(self, data_dir: Path, manifest: Manifest, shards: dict[str, tuple[ShardEntry, ...]]) -> None:
        self.manifest = manifest
        # An empty shard would share its first document with the next one.
        self._entries = [entry for part in shards.values() for entry in part if entry.documents]
        self._paths = [data_dir / entry.file for entry in self._entries]
        self._first_documents = [0, *accumulate(entry.documents for entry in self._entries)]
        self._first_tokens = [0, *accumulate(entry.tokens for entry in self._entries)]
        self._blocks: list[tuple[Block, ...] | None] = [None] * len(self._entries)  # of the shards touched so far
        self.num_documents: int = self._first_documents[-1]
        self.num_tokens: int = self._first_tokens[-1]
        ends = list(accumulate(sum(entry.documents for entry in part) for part in shards.values()))
        sources = {name: range(first, end) for name, first, end in zip(shards, [0, *ends], ends, strict=False)}
        self.sources = {name: documents for name, documents in sources.items() if documents}

    @classmethod
    def open(cls, data_dir: Path, split: Split, source: str | None = None, verify: bool = False) -> Corpus:
        """Open `split`, or what `source` has in it; `verify` also hashes and maps every shard.

        Raises:
            UserError: No dataset, nothing in the split, or a shard that is missing or truncated. One that is damaged
                otherwise raises it when it is first touched.
        """
        manifest = Manifest.load(data_dir)
        entry = manifest.splits.get(split)
        if entry is None or entry.documents == 0:
            raise UserError(
                f"{data_dir} has no documents in its {split!r} split; "
                "build it again from more documents, or with other fractions for its splits"
            )
        parts = entry.sources
        if source is not None:
            if source not in parts:
                raise UserError(
                    f"{data_dir} has no source {source!r} in its {split!r} split; allowed: {', '.join(parts)}"
                )
            parts = {source: parts[source]}
        for shard in (shard for part in parts.values() for shard in part.shards):
            check_size(data_dir / shard.file, shard)
            if verify:
                check_hash(data_dir / shard.file, shard)
        corpus = cls(data_dir, manifest, {name: part.shards for name, part in parts.items()})
        if verify:
            for index in range(len(corpus._entries)):
                corpus._map(index)
        return corpus

    # One document

    def length(self, document: int) -> int:
        """Tokens in `document`."""
        block, index = self._find(document)
        return int(block.offsets[index + 1] - block.offsets[index])

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens start..stop of `document` (to its end by default): a read-only view into the mapped file."""
        block, index = self._find(document)
        view: np.ndarray = block.tokens[block.offsets[index] : block.offsets[index + 1]][start:stop]
        return view

    def target_start(self, document: int) -> int:
        """Index within `document` of the first token that may be noised."""
        block, index = self._find(document)
        return int(block.target_starts[index])

    def source(self, document: int) -> str:
        """Name of the source that `document` belongs to."""
        name: str = self._cell("source", document)
        return name

    def origin(self, document: int) -> str:
        """File that `document` came from, relative to its source."""
        path: str = self._cell("origin", document)
        return path

    def row(self, document: int) -> int:
        """Index of its record in that file."""
        index: int = self._cell("row", document)
        return index

    def document_id(self, document: int) -> bytes:
        """Content hash of `document`."""
        identity: bytes = self._cell("document_id", document)
        return identity

    # Many documents, many tokens

    def lengths(self) -> np.ndarray:
        """Tokens in every document, int64 [num_documents]; maps all shards."""
        shards = (blocks or self._map(index) for index, blocks in enumerate(self._blocks))
        return np.concatenate([np.diff(block.offsets) for blocks in shards for block in blocks])

    def extents(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where documents begin and end in the stream of tokens: two int64 arrays of their shape [n]."""
        begins, ends = np.empty((2, len(documents)), dtype=np.int64)
        for block, chosen in self._by_block(documents, self._block_of_document, _END_DOCUMENT):
            index = documents[chosen] - block.first_document
            begins[chosen] = block.offsets[index] + block.first_token
            ends[chosen] = block.offsets[index + 1] + block.first_token
        return begins, ends

    def target_starts(self, documents: np.ndarray) -> np.ndarray:
        """`target_start` of each document, int64 [n]."""
        starts = np.empty(len(documents), dtype=np.int64)
        for block, chosen in self._by_block(documents, self._block_of_document, _END_DOCUMENT):
            starts[chosen] = block.target_starts[documents[chosen] - block.first_document]
        return starts

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which document each token of the stream belongs to, and its index in there: two int64 arrays [n]."""
        documents, indices = np.empty((2, len(positions)), dtype=np.int64)
        for block, chosen in self._by_block(positions, self._block_of_token, _END_TOKEN):
            inside = positions[chosen] - block.first_token
            document = np.searchsorted(block.offsets, inside, side="right") - 1
            documents[chosen] = document + block.first_document
            indices[chosen] = inside - block.offsets[document]
        return documents, indices

    def read(self, position: int, out: np.ndarray) -> None:
        """Copy the stretch of the stream that starts at `position` into all of `out`, over documents and shards."""
        assert 0 <= position <= self.num_tokens - len(out)
        while len(out):
            block = self._block_of_token(position)
            inside = position - block.first_token
            part = block.tokens[inside : inside + len(out)]
            if len(part) == len(out):
                out[:] = part
                return
            out[: len(part)] = part
            position, out = position + len(part), out[len(part) :]

    # Blocks

    def _cell(self, column: str, document: int) -> Any:
        block, index = self._find(document)
        return block.batch.column(column)[index].as_py()

    def _find(self, document: int) -> tuple[Block, int]:
        block = self._block_of_document(document)
        return block, document - block.first_document

    def _block_of_document(self, document: int) -> Block:
        assert 0 <= document < self.num_documents
        index = bisect_right(self._first_documents, document) - 1
        blocks = self._blocks[index] or self._map(index)
        return blocks[0] if len(blocks) == 1 else blocks[bisect_right(blocks, document, key=_FIRST_DOCUMENT) - 1]

    def _block_of_token(self, position: int) -> Block:
        index = bisect_right(self._first_tokens, position) - 1
        blocks = self._blocks[index] or self._map(index)
        return blocks[0] if len(blocks) == 1 else blocks[bisect_right(blocks, position, key=_FIRST_TOKEN) - 1]

    def _by_block(
        self, numbers: np.ndarray, block_of: Callable[[int], Block], end_of: Callable[[Block], int]
    ) -> Iterator[tuple[Block, np.ndarray]]:
        """Each block that holds some of `numbers` (documents or positions), and the indices of those."""
        order = np.argsort(numbers, kind="stable")
        ascending = numbers[order]
        done = 0
        while done < len(order):
            block = block_of(int(ascending[done]))
            stop = int(np.searchsorted(ascending, end_of(block), side="left"))
            yield block, order[done:stop]
            done = stop

    def _map(self, index: int) -> tuple[Block, ...]:
        """Blocks of a shard. Two threads may both map it: they get the same views, and one of them is kept."""
        first_document, first_token = self._first_documents[index], self._first_tokens[index]
        blocks = map_shard(self._paths[index], self._entries[index], self.manifest, first_document, first_token)
        self._blocks[index] = blocks
        return blocks

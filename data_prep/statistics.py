"""What is in a dataset: sizes, lengths and how well the vocabulary fits, for each source of each split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mdseq.data.format import TOKENIZER_FILE, Manifest, Split, SplitOfSource
from mdseq.data.shard import check_size, map_shard
from mdseq.data.tokenizer import Tokenizer

STRETCH_TOKENS = 1 << 20
LENGTH_QUANTILES = {"shortest": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "longest": 1.0}
LENGTH_BINS_PER_DOUBLING = 2
LENGTH_DOUBLINGS = 40


@dataclass(frozen=True)
class PartStatistics:
    """One source's part of a split.

    Attributes:
        text_bytes: UTF-8 bytes that the tokens decode to.
        byte_tokens: Tokens that spell single bytes, of characters that are in no piece of the vocabulary.
        length_quantiles: Tokens a document, by the names of LENGTH_QUANTILES.
        length_histogram: Documents whose length falls between neighbours of `length_edges()`.
    """

    split: Split
    source: str
    documents: int
    tokens: int
    text_bytes: int
    byte_tokens: int
    length_quantiles: dict[str, int]
    length_histogram: tuple[int, ...]

    @property
    def tokens_per_byte(self) -> float:
        return self.tokens / max(1, self.text_bytes)

    @property
    def byte_fallback(self) -> float:
        """Share of the tokens that spell single bytes."""
        return self.byte_tokens / max(1, self.tokens)


def length_edges() -> np.ndarray:
    """Edges of the bins of `length_histogram`, evenly spaced on a logarithmic axis."""
    return 2.0 ** (np.arange(LENGTH_DOUBLINGS * LENGTH_BINS_PER_DOUBLING + 1) / LENGTH_BINS_PER_DOUBLING)


def stats(data_dir: Path, advance: Callable[[int], None] = lambda _: None) -> list[PartStatistics]:
    """Read every token once. Memory: 8 bytes a document of the largest part.

    Args:
        data_dir: The dataset.
        advance: Told the bytes of each shard that is done.

    Raises:
        UserError: There is no dataset, or a shard is damaged.
    """
    manifest = Manifest.load(data_dir)
    tokenizer = Tokenizer.load(data_dir / TOKENIZER_FILE)
    return [
        _part_statistics(data_dir, manifest, tokenizer, split, source, part, advance)
        for split, entry in manifest.splits.items()
        for source, part in entry.sources.items()
        if part.documents
    ]


def _part_statistics(
    data_dir: Path,
    manifest: Manifest,
    tokenizer: Tokenizer,
    split: Split,
    source: str,
    part: SplitOfSource,
    advance: Callable[[int], None],
) -> PartStatistics:
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    lengths: list[np.ndarray] = []
    for entry in part.shards:
        check_size(data_dir / entry.file, entry)
        for block in map_shard(data_dir / entry.file, entry, manifest, 0, 0):
            lengths.append(np.diff(block.offsets))
            for start in range(0, len(block.tokens), STRETCH_TOKENS):
                counts += np.bincount(block.tokens[start : start + STRETCH_TOKENS], minlength=len(counts))
        advance(entry.bytes)
    all_lengths = np.concatenate(lengths)
    quantiles = np.quantile(all_lengths, list(LENGTH_QUANTILES.values()), method="nearest")
    return PartStatistics(
        split=split,
        source=source,
        documents=len(all_lengths),
        tokens=int(counts.sum()),
        text_bytes=int(counts @ tokenizer.text_bytes),
        byte_tokens=int(counts[tokenizer.is_byte].sum()),
        length_quantiles=dict(zip(LENGTH_QUANTILES, quantiles.astype(int).tolist(), strict=True)),
        length_histogram=tuple(np.histogram(all_lengths, length_edges())[0].tolist()),
    )

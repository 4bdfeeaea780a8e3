"""Corpora whose every token is known, and a small vocabulary."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from data_prep.vocabulary import train_vocabulary
from mdseq.data.corpus import Corpus
from mdseq.data.format import Kind
from mdseq.data.tokenizer import Tokenizer
from tests.data.datasets import Shard, write_dataset

CorpusOf = Callable[..., Corpus]
TEXTS = [
    f"The river number {number} runs past the old mill, and the miller's wife sings.\n"
    f"def mill_{number}(river):\n    if river:\n        return river + {number}\n\n"
    for number in range(60)
]


@pytest.fixture(scope="session")
def corpus_of(tmp_path_factory: pytest.TempPathFactory) -> CorpusOf:
    """Makes a corpus of documents of given lengths: every token's value is its position in the stream.

    It is spread over shards and record batches of a few documents each, so that what is read crosses their borders.
    """
    folder, numbers = tmp_path_factory.mktemp("corpora"), itertools.count()

    def make(
        lengths: Sequence[int],
        target_starts: Sequence[int] | None = None,
        documents_per_shard: int = 5,
        documents_per_batch: int = 3,
        weights: dict[str, float] | None = None,
        documents_per_source: int | None = None,
        kind: Kind = "text",
    ) -> Corpus:
        starts = [1] * len(lengths) if target_starts is None else list(target_starts)
        sources: dict[str, list[Shard]] = {}
        per_source = documents_per_source or len(lengths)
        for source, begin in enumerate(range(0, len(lengths), per_source)):
            end = min(begin + per_source, len(lengths))
            shards = []
            for first in range(begin, end, documents_per_shard):
                stop = min(first + documents_per_shard, end)
                tokens = np.arange(sum(lengths[:first]), sum(lengths[:stop]), dtype=np.uint16)
                shards.append(Shard(tokens, lengths[first:stop], starts[first:stop]))
            sources["abcdefgh"[source]] = shards
        path = write_dataset(
            folder / str(next(numbers)),
            {"train": sources},
            kind=kind,
            weights=weights,
            documents_per_batch=documents_per_batch,
        )
        return Corpus.open(path, "train")

    return make


@pytest.fixture(scope="session")
def tokenizer_model() -> bytes:
    """A vocabulary of some words and of indented code."""
    return train_vocabulary(TEXTS, 1000)


@pytest.fixture(scope="session")
def tokenizer(tokenizer_model: bytes) -> Tokenizer:
    return Tokenizer(tokenizer_model)


@pytest.fixture(scope="session")
def tokenizer_path(tokenizer_model: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(tokenizer_model)
    return path

"""Corpora whose every token is known: token value = FIRST_TOKEN + its index in the whole corpus."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from data_prep.vocabulary import WindowSample, train_vocabulary
from mdseq.data.corpus import Corpus
from mdseq.data.format import Manifest, SplitEntry, shard_schema, special_token_ids
from mdseq.data.tokenizer import Tokenizer

FIRST_TOKEN = 5
CorpusOf = Callable[..., Corpus]


def _corpus_of(
    lengths: Sequence[int], target_starts: Sequence[int] | None = None, documents_per_batch: int = 3
) -> Corpus:
    schema = shard_schema("uint16", "none")
    starts = [1] * len(lengths) if target_starts is None else list(target_starts)
    batches, next_token = [], FIRST_TOKEN
    for first in range(0, len(lengths), documents_per_batch):
        part = lengths[first : first + documents_per_batch]
        offsets = np.cumsum([0, *part])
        values = pa.array(np.arange(next_token, next_token + sum(part)), type=pa.uint16())
        next_token += sum(part)
        columns = [
            pa.LargeListArray.from_arrays(pa.array(offsets), values, type=schema.field("tokens").type),
            pa.array(starts[first : first + documents_per_batch], type=pa.int64()),
            pa.array([bytes(16)] * len(part), type=pa.binary(16)),
            pa.array(["made.txt"] * len(part)).dictionary_encode(),
        ]
        batches.append(pa.RecordBatch.from_arrays(columns, schema=schema))
    split = SplitEntry(shards=(), documents=len(lengths), tokens=sum(lengths), text_bytes=0)
    manifest = Manifest(
        kind="text",
        tokenizer_fingerprint="none",
        vocab_size=65536,
        dtype="uint16",
        special_tokens=special_token_ids(),
        splits={"train": split},
        rejected={},
        options={},
    )
    return Corpus(manifest, batches)


@pytest.fixture(scope="session")
def corpus_of() -> CorpusOf:
    return _corpus_of


@pytest.fixture(scope="session")
def tokenizer_model() -> bytes:
    """A vocabulary of the words below and of indented code."""
    sample = WindowSample.for_vocabulary(1000)
    for number in range(60):
        sample.add(f"The river number {number} runs past the old mill, and the miller's wife sings.\n")
        sample.add(f"def mill_{number}(river):\n    if river:\n        return river + {number}\n\n")
    return train_vocabulary(sample, 1000)


@pytest.fixture(scope="session")
def tokenizer(tokenizer_model: bytes) -> Tokenizer:
    return Tokenizer(tokenizer_model)


@pytest.fixture(scope="session")
def tokenizer_path(tokenizer_model: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(tokenizer_model)
    return path

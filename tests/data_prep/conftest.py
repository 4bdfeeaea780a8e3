"""A small vocabulary, so that most builds need not train one; records to build from; a look at what was built."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest

from data_prep.run import Where, build
from data_prep.spec import load_prep_spec
from data_prep.vocabulary import train_vocabulary
from mdseq.data.corpus import Corpus
from mdseq.data.format import Manifest
from mdseq.data.tokenizer import Tokenizer

Build = Callable[..., Manifest]


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    windows = [f"def mill_{number}(river):\n    return river + {number}  # past the old mill\n" for number in range(60)]
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_vocabulary(windows, 512))
    return path


@pytest.fixture
def build_dataset(tokenizer_path: Path) -> Build:
    """Build a dataset from what a command line would say, with the small vocabulary unless another is asked for."""

    def build_it(
        data: Path | str | Iterable[str], out: Path, *overrides: str, workers: int = 1, **of_sources: object
    ) -> Manifest:
        paths = [str(data)] if isinstance(data, Path | str) else list(data)
        if not any(override.startswith("vocabulary.") for override in overrides):
            overrides = (f"vocabulary.tokenizer={tokenizer_path}", *overrides)
        return build(load_prep_spec(paths, dict(of_sources), {}, overrides), out, Where(workers)).manifest

    return build_it


def write_jsonl(path: Path, records: Iterable[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_files(folder: Path, records: Sequence[object]) -> Path:
    """Eight files, which small shards hold one by one."""
    folder.mkdir()
    for number in range(8):
        write_jsonl(folder / f"{number}.jsonl", records[number::8])
    return folder


def texts(count: int) -> list[dict[str, str]]:
    return [{"text": f"def mill_{number}(river):\n" + "    river += 1\n" * (number % 9)} for number in range(count)]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def decoded(folder: Path, split: str | None = None) -> list[tuple[str, ...]]:
    """The parts of every document, decoded, headers included."""
    tokenizer = Tokenizer.load(folder / "tokenizer.model")
    found: list[tuple[str, ...]] = []
    for name, entry in Manifest.load(folder).splits.items():
        if not entry.documents or split not in (None, name):
            continue
        corpus = Corpus.open(folder, name)
        for document in range(corpus.num_documents):
            tokens, start = corpus.tokens(document), corpus.target_start(document)
            parts = (tokens,) if corpus.manifest.kind == "text" else (tokens[:start], tokens[start:])
            found.append(tuple(tokenizer.decode(part) for part in parts))
    return found

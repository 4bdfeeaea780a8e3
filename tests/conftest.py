"""Datasets of made-up text that any test can train on."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

WORDS = ("the river runs past an old mill where seven grey cats watch silver fish and dream of snow").split()  # noqa: SIM905

# Busy machines make deadlines fail, and an example that fails once should fail again.
settings.register_profile("mdseq", deadline=None, derandomize=True)
settings.load_profile("mdseq")

# Tensors here are tiny: more threads than one only wait for each other, above all on a busy machine.
torch.set_num_threads(1)


@pytest.fixture
def exact_products() -> Iterator[None]:
    """Products of fp32 in fp32, on a GPU too, whatever a test before has asked for."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = allowed


def _sentence(rng: random.Random, num_words: int) -> str:
    return " ".join(rng.choices(WORDS, k=num_words)).capitalize() + ".\n"


def _built(folder: Path) -> Path:
    # Here, so that tests of a few packages run where not everything is installed.
    from data_prep.run import Where, build
    from data_prep.spec import load_prep_spec

    spec = load_prep_spec([str(folder / "in.jsonl")], {}, {}, ["vocabulary.size=600", "splits.valid_fraction=0.05"])
    build(spec, folder / "data", Where(workers=1))
    return folder / "data"


@pytest.fixture(scope="session")
def text_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty texts of 20 to 400 words."""
    folder = tmp_path_factory.mktemp("text")
    rng = random.Random(0)
    texts = ["".join(_sentence(rng, 10) for _ in range(rng.randint(2, 40))) for _ in range(40)]
    (folder / "in.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return _built(folder)


@pytest.fixture(scope="session")
def pair_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two hundred pairs: a sentence and its words in upper case."""
    folder = tmp_path_factory.mktemp("pair")
    rng = random.Random(1)
    sources = [_sentence(rng, rng.randint(2, 6)) for _ in range(200)]
    records = [json.dumps({"src": source, "trg": source.upper()}) for source in sources]
    (folder / "in.jsonl").write_text("\n".join(records))
    return _built(folder)

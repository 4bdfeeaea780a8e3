"""A small vocabulary."""

from __future__ import annotations

from pathlib import Path

import pytest

from mdseq.data.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer(text_dataset: Path) -> Tokenizer:
    return Tokenizer.load(text_dataset / "tokenizer.model")

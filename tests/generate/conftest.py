"""A small vocabulary, and models for the sampler."""

from __future__ import annotations

from pathlib import Path

import pytest

from mdseq.data.tokenizer import Tokenizer
from mdseq.diffusion.denoising import DiffusionModel
from tests.generate.sampling import model_of


@pytest.fixture(scope="session")
def tokenizer(text_dataset: Path) -> Tokenizer:
    return Tokenizer.load(text_dataset / "tokenizer.model")


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    return model_of("diffusion.self_conditioning=0")


@pytest.fixture(scope="module")
def self_conditioned() -> DiffusionModel:
    return model_of("diffusion.self_conditioning=0.5")

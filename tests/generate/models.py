"""Tiny models of random weights: what they write is nonsense, but a function of what they are asked."""

from __future__ import annotations

from pathlib import Path

import torch

from mdseq.data.corpus import Corpus
from mdseq.data.format import Kind
from mdseq.data.lengths import LengthTable
from mdseq.data.tokenizer import Tokenizer
from mdseq.diffusion.absorbing import Absorption
from mdseq.diffusion.denoising import DiffusionModel
from mdseq.diffusion.estimates import Reading
from mdseq.diffusion.schedule import NoiseSchedule
from mdseq.generate.text import TextGenerator
from mdseq.model.denoiser import Denoiser, DenoiserConfig
from mdseq.model.saved import ModelConfig, save_model
from mdseq.spec import load_spec

ROW_LENGTH, GAMMA, NUM_TIMESTEPS = 64, 0.5, 30
OVERRIDES = [
    "model.embedding_dim=8", "model.hidden_dim=16", "model.num_layers=2", "model.num_heads=2",
    "attention.window=3", "attention.num_global=2", "experts.num_experts=4", "experts.feedforward_dim=8",
    "diffusion.normalise_embeddings=false", "diffusion.self_conditioning=0",
]  # fmt: skip


def tiny_denoiser(vocab_size: int) -> Denoiser:
    torch.manual_seed(0)
    denoiser = Denoiser(DenoiserConfig.of(load_spec(None, OVERRIDES).spec, vocab_size)).eval()
    with torch.no_grad():
        denoiser.output[-1].weight.mul_(100)  # nothing is learned, but something is said
    return denoiser


def tiny_model(vocab_size: int, reading: Reading = "output") -> DiffusionModel:
    m_z, schedule = torch.full((8,), 0.5), NoiseSchedule("sqrt", NUM_TIMESTEPS)
    return DiffusionModel(tiny_denoiser(vocab_size), m_z, schedule, Absorption(GAMMA), reading)


def tiny_generator(
    tokenizer: Tokenizer, kind: Kind = "text", row_length: int | None = None, lengths: LengthTable | None = None
) -> TextGenerator:
    return TextGenerator(tiny_model(tokenizer.vocab_size), tokenizer, kind, row_length, lengths)


def save_tiny_model(
    folder: Path,
    dataset: Path,
    step: int = 7,
    condition_dropout: float = 0.0,
    reading: Reading = "output",
    absorption: Absorption = Absorption(GAMMA),  # noqa: B008
    min_signal: float = 0.0,
) -> Path:
    """A model folder for the documents of a dataset."""
    corpus = Corpus.open(dataset, "train")
    model = tiny_model(corpus.manifest.vocab_size)
    config = ModelConfig(
        denoiser=model.denoiser.config,
        noise_schedule="sqrt",
        num_timesteps=NUM_TIMESTEPS,
        gamma=absorption.gamma,
        absorbing_schedule=absorption.schedule,
        document_kind=corpus.manifest.kind,
        row_length=ROW_LENGTH,
        step=step,
        condition_dropout=condition_dropout,
        lengths=LengthTable.of(corpus).to_dict(),
        noise_factor=1.0,
        min_signal=min_signal,
        estimate=reading,
    )
    weights = {f"denoiser.{name}": weight for name, weight in model.denoiser.state_dict().items()}
    save_model(folder, config, [*weights.items(), ("absorbing.m", model.m_z)], dataset / "tokenizer.model")
    return folder

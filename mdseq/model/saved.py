"""A trained model as a folder: what generation needs, readable without DeepSpeed and without pickle.

config.json           shape of the denoiser, forward process, kind of documents, training step
weights.safetensors   fp32 weights of the denoiser, and the absorbing state
tokenizer.model       the SentencePiece vocabulary
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mdseq.errors import UserError
from mdseq.model.denoiser import Denoiser, DenoiserConfig

CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE = "config.json", "weights.safetensors", "tokenizer.model"


@dataclass(frozen=True)
class ModelConfig:
    """What the weights do not say of themselves.

    Attributes:
        denoiser: Shape of the network.
        noise_schedule: Name of the schedule.
        num_timesteps: T of the schedule.
        noise_factor: How many times as strong as the schedule's name says the noise is.
        gamma: Share of target tokens replaced by the absorbing state at t = T; 0 without one.
        estimate: What the denoiser's output is; see `mdseq/diffusion/estimates.py`.
        condition_dropout: Share of the training documents that lost their source: above 0, sampling can be guided.
        document_kind: What a source is: the text to continue, or one side of a pair.
        row_length: Tokens of a training row.
        lengths: How long the targets of the training data are, as a `LengthTable` writes itself.
        step: Optimiser steps behind the weights.
    """

    denoiser: DenoiserConfig
    noise_schedule: str
    num_timesteps: int
    noise_factor: float
    gamma: float
    estimate: Literal["output", "softmax", "posterior"]
    condition_dropout: float
    document_kind: Literal["text", "pair"]
    row_length: int
    lengths: dict[str, Any]
    step: int

    def at_step(self, step: int) -> ModelConfig:
        return replace(self, step=step)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        return cls(**values | {"denoiser": DenoiserConfig.from_dict(values["denoiser"])})


@dataclass(frozen=True)
class SavedModel:
    """A model read back.

    Attributes:
        config: See ModelConfig.
        denoiser: In evaluation mode.
        m_z: The absorbing state, fp32; zeros without one.
        tokenizer_path: Where the vocabulary lies.
    """

    config: ModelConfig
    denoiser: Denoiser
    m_z: Tensor
    tokenizer_path: Path


def save_model(folder: Path, config: ModelConfig, weights: Iterable[tuple[str, Tensor]], tokenizer: Path) -> None:
    """Write a model folder; `weights` are named as in `DiffusionObjective`."""
    folder.mkdir()
    save_file({name: weight.cpu().contiguous() for name, weight in weights}, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(tokenizer, folder / TOKENIZER_FILE)


def load_model(folder: Path, device: torch.device | str = "cpu") -> SavedModel:
    """Read a model folder.

    Raises:
        UserError: If a file is missing or damaged.
    """
    try:
        config = ModelConfig.from_dict(json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")))
        weights = load_file(folder / WEIGHTS_FILE, device=str(device))
        m_z = weights.pop("absorbing.m", torch.zeros(config.denoiser.embedding_dim, device=device))
        state = {name.removeprefix("denoiser."): weight for name, weight in weights.items()}
        denoiser = Denoiser(config.denoiser).to(device)
        denoiser.load_state_dict(state)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} does not hold a whole model: {error}") from None
    return SavedModel(config, denoiser.eval(), m_z, folder / TOKENIZER_FILE)

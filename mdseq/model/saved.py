"""A trained model as a folder: what generation needs, readable without DeepSpeed and without pickle.

config.json                        shape of the denoiser, forward process, kind of documents, training step
model.safetensors                  fp32 weights of the denoiser, and the absorbing state; a large model's in shards,
model-00001-of-00003.safetensors   which model.safetensors.index.json lists (as Hugging Face's tools do)
tokenizer.model                    the SentencePiece vocabulary

A training checkpoint is such a folder too: its weights are in the pieces that the ranks have written.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mdseq.errors import UserError
from mdseq.model.denoiser import Denoiser, DenoiserConfig
from mdseq.model.pieces import PiecedWeights, write_tensors

CONFIG_FILE, TOKENIZER_FILE = "config.json", "tokenizer.model"
WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
RANK_FILES = "rank-*.safetensors"
SHARD_BYTES = 2**32
WhichWeights = Literal["average", "weights"]


@dataclass(frozen=True)
class ModelConfig:
    """What the weights do not say of themselves.

    Attributes:
        denoiser: Shape of the network.
        noise_schedule: Name of the schedule.
        num_timesteps: T of the schedule.
        noise_factor: How many times as strong as the schedule's name says the noise is.
        min_signal: Least alpha of the schedule; 0 for the whole of it.
        gamma: Share of target tokens replaced by the absorbing state at t = T; 0 without one.
        absorbing_schedule: How that share grows; see `mdseq/diffusion/absorbing.py`.
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
    min_signal: float
    gamma: float
    absorbing_schedule: Literal["sigma", "uniform"]
    estimate: Literal["output", "softmax", "posterior"]
    condition_dropout: float
    document_kind: Literal["text", "pair"]
    row_length: int
    lengths: dict[str, Any]
    step: int

    def at_step(self, step: int) -> ModelConfig:
        return replace(self, step=step)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

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

    def digest(self) -> str:
        """SHA-256 of the weights, whatever files they came from."""
        digest = hashlib.sha256()
        for values in (*self.denoiser.parameters(), self.m_z):
            digest.update(values.detach().cpu().contiguous().view(torch.uint8).numpy().data)  # numpy has no bfloat16
        return digest.hexdigest()


def save_model(
    folder: Path,
    config: ModelConfig,
    weights: Iterable[tuple[str, Tensor]],
    tokenizer: Path,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model folder, in memory for one shard.

    Args:
        folder: Not there yet.
        config: See ModelConfig.
        weights: Named as in `DiffusionObjective`.
        tokenizer: The vocabulary's file.
        shard_bytes: A file takes no more weights once they are so large.
    """
    folder.mkdir()
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    num_bytes = 0

    def write_shard() -> None:
        write_tensors(folder / f"shard-{len(shards)}", held, {"format": "pt"})
        shards.append(list(held))
        held.clear()

    for name, weight in weights:
        held[name] = weight
        num_bytes += weight.nbytes
        if sum(one.nbytes for one in held.values()) >= shard_bytes:
            write_shard()
    if held or not shards:
        write_shard()
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    files = files if len(shards) > 1 else [WEIGHTS_FILE]
    for i, file in enumerate(files):
        (folder / f"shard-{i}").rename(folder / file)
    if len(shards) > 1:
        places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": num_bytes}, "weight_map": places}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (folder / CONFIG_FILE).write_text(config.to_json(), encoding="utf-8")
    shutil.copyfile(tokenizer, folder / TOKENIZER_FILE)


def load_model(folder: Path, device: torch.device | str = "cpu", which: WhichWeights = "average") -> SavedModel:
    """Read a model folder.

    Args:
        folder: A model's, or a checkpoint.
        device: Where to put it.
        which: Of a checkpoint, which weights: their average, or those that training had reached.

    Raises:
        UserError: If a file is missing or damaged.
    """
    try:
        config = read_config(folder)
        denoiser = Denoiser(config.denoiser).to(device)
        m_z = torch.zeros(config.denoiser.embedding_dim, device=device)
        wanted = dict(denoiser.named_parameters(prefix="denoiser")) | {"absorbing.m": m_z}
        for name, weight in read_weights(folder, which):
            with torch.no_grad():
                wanted.pop(name).copy_(weight)
        wanted.pop("absorbing.m", None)  # models without one have none to read
        if wanted:
            raise ValueError(f"no {', '.join(wanted)}")
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} does not hold a whole model: {error}") from None
    return SavedModel(config, denoiser.eval(), m_z, folder / TOKENIZER_FILE)


def read_config(folder: Path) -> ModelConfig:
    """What a model folder says of its weights; raises what reading raises."""
    return ModelConfig.from_dict(json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")))


def read_weights(folder: Path, which: WhichWeights = "average") -> Iterator[tuple[str, Tensor]]:
    """The weights of a model folder or checkpoint, one at a time."""
    ranks = sorted(folder.glob(RANK_FILES))
    if ranks:
        with PiecedWeights(ranks) as pieces:
            for name, shape in pieces.shapes().items():
                yield name, pieces.whole(which, name, shape)
        return
    files = [WEIGHTS_FILE]
    if (folder / INDEX_FILE).is_file():
        files = sorted(set(json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"].values()))
    for file in files:
        with safe_open(folder / file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dictionary)
                yield name, opened.get_tensor(name)

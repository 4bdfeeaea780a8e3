"""Checkpoints: a folder that exists whole or not at all.

    checkpoints/step-00000200/
        engine/                DeepSpeed's files, one set a rank
        average-rank-0000.pt   this rank's share of the weight average
        trainer.pt             what is the same on every rank: timestep history, router shares, tokens seen
        model/                 the averaged weights and what generation needs (mdseq/model/saved.py)
        manifest.json          step, ranks, dataset, spec, and every file with its size; written last

It is written under another name and renamed once every rank's files are on disk.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from mdseq.engine.ema import WeightAverage
from mdseq.engine.weights import gathered_weights
from mdseq.errors import UserError
from mdseq.model.saved import ModelConfig, save_model

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine

MANIFEST_FILE = "manifest.json"
_NAME = re.compile(r"step-\d{8}")
_PARTIAL = ".partial"


@dataclass(frozen=True)
class CheckpointManifest:
    """What a checkpoint must match before it is loaded.

    Attributes:
        step: Optimiser steps taken.
        num_ranks, expert_parallel_size, zero_stage: How the state is spread over files.
        dataset_fingerprint: Of the data it was trained on.
        spec: The run spec, as nested plain values.
        file_bytes: Size of every file, by its path within the checkpoint.
    """

    step: int
    num_ranks: int
    expert_parallel_size: int
    zero_stage: int
    dataset_fingerprint: str
    spec: dict[str, Any]
    file_bytes: dict[str, int] = field(default_factory=dict)

    def at_step(self, step: int) -> CheckpointManifest:
        return replace(self, step=step)


def save_checkpoint(
    folder: Path,
    engine: DeepSpeedEngine,
    average: WeightAverage,
    trainer_state: dict[str, Any],
    manifest: CheckpointManifest,
    model: ModelConfig,
    tokenizer: Path,
) -> Path:
    """Save everything; a collective over all ranks, between optimiser steps.

    Args:
        folder: The run's folder of checkpoints.
        engine, average: State of the ranks.
        trainer_state: State that is the same on every rank: plain values and tensors.
        manifest: With `file_bytes` still empty.
        model: Of the folder that generation reads.
        tokenizer: The vocabulary's file.

    Returns:
        The checkpoint's path.

    Raises:
        UserError: If it cannot be written; what was written is not a checkpoint.
    """
    final = folder / f"step-{manifest.step:08d}"
    partial = final.with_name(final.name + _PARTIAL)
    rank = dist.get_rank()
    try:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        engine.save_checkpoint(str(partial), tag="engine", save_latest=False)
        torch.save(average.state_dict(), partial / f"average-rank-{rank:04d}.pt")
        with average.in_place_of_weights():
            weights = gathered_weights(engine)
            if rank == 0:
                save_model(partial / "model", model, weights, tokenizer)
            else:
                for _ in weights:  # every rank takes part in gathering
                    continue
        if rank == 0:
            torch.save(trainer_state, partial / "trainer.pt")
            for script in partial.glob("zero_to_*.py"):  # DeepSpeed's converters refuse adopted experts
                script.unlink()
        dist.barrier()
        if rank == 0:
            _seal(partial, final, manifest)
        dist.barrier()
    except (OSError, RuntimeError) as error:
        # torch reports a full disk as an error of its stream, without saying so.
        full = shutil.disk_usage(folder).free < 2**20
        if isinstance(error, RuntimeError) and not full:
            raise
        shutil.rmtree(partial, ignore_errors=True)
        reason = "no space left" if full else error
        raise UserError(
            f"cannot write the checkpoint {final}: {reason}; "
            "make room, then the same command continues from the last one"
        ) from None
    return final


def whole_checkpoints(folder: Path) -> list[tuple[Path, CheckpointManifest]]:
    """The checkpoints that have all their files, oldest first."""
    found = []
    for path in sorted(folder.glob("step-*")):
        manifest = _read_manifest(path) if _NAME.fullmatch(path.name) else None
        if manifest is not None:
            found.append((path, manifest))
    return found


def load_checkpoint(path: Path, engine: DeepSpeedEngine, average: WeightAverage) -> dict[str, Any]:
    """Restore the ranks' state in place; returns the trainer's state."""
    engine.load_checkpoint(str(path), tag="engine")
    rank_file = path / f"average-rank-{dist.get_rank():04d}.pt"
    average.load_state_dict(torch.load(rank_file, map_location="cpu", weights_only=True))
    return torch.load(path / "trainer.pt", map_location="cpu", weights_only=True)


def remove_old_checkpoints(folder: Path, keep_last: int) -> None:
    """Delete all but the newest whole checkpoints, and what a killed save left behind; for rank 0 alone."""
    for path, _ in whole_checkpoints(folder)[:-keep_last]:
        shutil.rmtree(path)
    for path in folder.glob(f"step-*{_PARTIAL}"):
        shutil.rmtree(path)


def _seal(partial: Path, final: Path, manifest: CheckpointManifest) -> None:
    """Put all files on disk, list them in the manifest, and give the folder its name."""
    file_bytes = {}
    for file in sorted(p for p in partial.rglob("*") if p.is_file()):
        _flush_to_disk(file)
        file_bytes[str(file.relative_to(partial))] = file.stat().st_size
    manifest_file = partial / MANIFEST_FILE
    manifest_file.write_text(json.dumps(asdict(manifest) | {"file_bytes": file_bytes}, indent=1), encoding="utf-8")
    _flush_to_disk(manifest_file)
    _flush_to_disk(partial)
    shutil.rmtree(final, ignore_errors=True)  # a torn one of the same step, or it would have been resumed
    partial.rename(final)
    _flush_to_disk(final.parent)


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_manifest(path: Path) -> CheckpointManifest | None:
    """The manifest, or None where the checkpoint is not whole."""
    try:
        manifest = CheckpointManifest(**json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8")))
        whole = all((path / name).stat().st_size == size for name, size in manifest.file_bytes.items())
    except (OSError, ValueError, TypeError):
        return None
    return manifest if whole else None

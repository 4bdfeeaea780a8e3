"""Checkpoints: a folder that exists whole or not at all, and that any number of ranks can continue.

    checkpoints/step-00000200/
        rank-0000.safetensors  what this rank's optimiser holds: weights, their average, Adam's moments
        trainer.pt             what is the same on every rank: timestep history, router shares
        config.json, tokenizer.model, spec.toml, engine.json, environment.json
        manifest.json          step, ranks, dataset, spec, and every file with its size and sha256; written last

Ranks write at the same time, under another name. When every file is on the disk, rank 0 writes the manifest and renames
the folder: from then on it is a checkpoint. What has no manifest, or not all its files, is none.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from mdseq.engine.agreement import Agreement
from mdseq.engine.ema import WeightAverage
from mdseq.engine.partitions import MOMENTS, Partition, publish_weights
from mdseq.errors import UserError
from mdseq.files import sync_folder, write_whole
from mdseq.model.pieces import FileDigest, PiecedWeights, write_pieces
from mdseq.model.saved import CONFIG_FILE, RANK_FILES
from mdseq.spec import CheckpointSpec

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine

MANIFEST_FILE, TRAINER_FILE = "manifest.json", "trainer.pt"
WEIGHTS, AVERAGE = "weights", "average"
_NAME = re.compile(r"step-\d{8}")
_PARTIAL = ".partial"


@dataclass(frozen=True)
class CheckpointManifest:
    """What a checkpoint is.

    Attributes:
        step: Optimiser steps taken.
        probe_loss: Loss of a row that training has not seen, by the weights saved: who loads them must find the same.
        valid_loss: Of held-out rows, if it was computed after this step.
        spread: Over how many ranks, and how; whoever continues it may spread it otherwise.
        dataset_fingerprint: Of the data it was trained on.
        spec: The run spec, as nested plain values.
        files: Every file by its name.
    """

    step: int
    probe_loss: float
    valid_loss: float | None
    spread: str
    dataset_fingerprint: str
    spec: dict[str, Any]
    files: dict[str, FileDigest] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Of a checkpoint whose files are all there in full size; None of anything else."""
        try:
            values = json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8"))
            manifest = cls(**values | {"files": {name: FileDigest(**one) for name, one in values["files"].items()}})
            whole = all((path / name).stat().st_size == one.num_bytes for name, one in manifest.files.items())
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None
        return manifest if whole else None


class CheckpointWriter:
    """Saves the state of all ranks in the background: training waits while it is copied, not while it is written.

    All ranks call all methods in the same order.
    """

    def __init__(
        self,
        folder: Path,
        partitions: Sequence[Partition],
        average: WeightAverage,
        shapes: Mapping[str, torch.Size],
        agreement: Agreement,
    ) -> None:
        self.folder = folder
        self._partitions = partitions
        self._average = average
        self._shapes = shapes
        self._agreement = agreement
        self._copies: dict[str, list[Tensor]] = {}
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._digests: dict[str, FileDigest] = {}

    def start(self, manifest: CheckpointManifest, trainer_state: dict[str, Any], files: Mapping[str, bytes]) -> None:
        """Copy the state and begin to write it, once the save before is complete.

        Args:
            manifest: Without its files.
            trainer_state: Plain values and tensors, the same on every rank.
            files: More files, by name.

        Raises:
            UserError: There is no room, or the save before could not be written; on every rank.
        """
        self.finish()
        self._manifest = manifest
        self._path = self.folder / f"step-{manifest.step:08d}"
        self._partial = self._path.with_name(self._path.name + _PARTIAL)
        states = self._states()
        self._make_folder(sum(flat.nbytes for flats in states.values() for flat in flats))
        self._copy(states)
        extra: dict[str, bytes] = {}
        if self._agreement.rank == 0:
            stream = io.BytesIO()
            torch.save(trainer_state, stream)
            extra = {**files, TRAINER_FILE: stream.getvalue()}
        self._thread = threading.Thread(target=self._write, args=(extra,), name="checkpoint")
        self._thread.start()

    def complete(self) -> Path | None:
        """The checkpoint, if one has been started and all ranks have now written it; does not wait.

        Raises:
            UserError: A rank could not write; on every rank.
        """
        if self._thread is None or not self._agreement.all(not self._thread.is_alive()):
            return None
        self._thread.join()
        self._thread = None
        try:
            self._fail_together(self._error)
        except UserError:
            if self._agreement.rank == 0:
                shutil.rmtree(self._partial, ignore_errors=True)
            raise
        digests = self._agreement.gather(self._digests)
        error = None
        if self._agreement.rank == 0:
            try:
                self._seal({name: digest for of_rank in digests for name, digest in of_rank.items()})
            except OSError as caught:
                error = caught
        self._fail_together(error)
        return self._path

    def finish(self) -> Path | None:
        """Wait for what has been started; its path."""
        if self._thread is not None:
            self._thread.join()
        return self.complete()

    def _states(self) -> dict[str, list[Tensor]]:
        """What this rank has to save."""
        partitions = self._partitions
        moments = {moment: [partition.moment(moment) for partition in partitions] for moment in MOMENTS}
        return {WEIGHTS: [partition.weights for partition in partitions], AVERAGE: self._average.values} | moments

    def _make_folder(self, num_bytes: int) -> None:
        """If there is room for so much of each rank."""
        needed = self._agreement.total([num_bytes])[0]
        error = None
        if self._agreement.rank == 0:
            try:
                free = shutil.disk_usage(self.folder).free
                if needed > free:
                    raise OSError(f"it takes {_size(needed)}, and {_size(free)} are free")
                shutil.rmtree(self._partial, ignore_errors=True)
                self._partial.mkdir(parents=True)
            except OSError as caught:
                error = caught
        self._fail_together(error)

    def _copy(self, states: Mapping[str, Sequence[Tensor]]) -> None:
        """Into memory that is kept from one save to the next, so that no save is the one that finds no more."""
        if not self._copies:
            self._copies = {
                state: [torch.empty(flat.shape, dtype=flat.dtype, pin_memory=flat.is_cuda) for flat in flats]
                for state, flats in states.items()
            }
        for state, flats in states.items():
            for copy, flat in zip(self._copies[state], flats, strict=True):
                copy.copy_(flat, non_blocking=True)
        if any(flat.is_cuda for flats in states.values() for flat in flats):
            torch.cuda.synchronize()

    def _write(self, extra: Mapping[str, bytes]) -> None:
        self._error, self._digests = None, {}
        try:
            name = f"rank-{self._agreement.rank:04d}.safetensors"
            pieces = [partition.pieces for partition in self._partitions]
            self._digests[name] = write_pieces(self._partial / name, self._copies, pieces, self._shapes)
            for name, content in extra.items():
                write_whole(self._partial / name, content)
                self._digests[name] = FileDigest.of(self._partial / name)
        except Exception as error:
            self._error = error

    def _seal(self, files: Mapping[str, FileDigest]) -> None:
        """Make a checkpoint of what has been written."""
        manifest = asdict(self._manifest) | {"files": {name: asdict(files[name]) for name in sorted(files)}}
        write_whole(self._partial / MANIFEST_FILE, json.dumps(manifest, indent=1).encode())
        shutil.rmtree(self._path, ignore_errors=True)  # a torn one of the same step, or it would have been resumed
        self._partial.rename(self._path)
        sync_folder(self.folder)

    def _fail_together(self, error: Exception | None) -> None:
        message = None
        if error is not None:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            message = (
                f"cannot write the checkpoint {self._path}: rank {self._agreement.rank}: {reason}; "
                "make room, then the same command continues from the last one"
            )
        self._agreement.fail_together(message)


def whole_checkpoints(folder: Path) -> list[tuple[Path, CheckpointManifest]]:
    """The checkpoints whose files are all there in full size, oldest first."""
    paths = sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))
    manifests = ((path, CheckpointManifest.read(path)) for path in paths)
    return [(path, manifest) for path, manifest in manifests if manifest is not None]


def find_model(folder: Path) -> Path:
    """The newest whole checkpoint of a run; a checkpoint or another model folder is its own.

    Raises:
        UserError: There is none.
    """
    if (folder / CONFIG_FILE).is_file():
        return folder
    if not folder.is_dir():
        raise UserError(f"no run folder at {folder}; give one that training made, such as runs/quickstart")
    checkpoints = whole_checkpoints(folder / "checkpoints")
    if not checkpoints:
        raise UserError(f"{folder} has no whole checkpoint; train it first, or give another folder")
    return checkpoints[-1][0]


def damaged_files(path: Path, manifest: CheckpointManifest, agreement: Agreement) -> list[str]:
    """Files that are not what was written; every rank reads its share of them, and hears of all."""
    share = sorted(manifest.files)[agreement.rank :: agreement.num_ranks]
    damaged = [name for name in share if not _is_as_written(path / name, manifest.files[name])]
    return sorted(name for found in agreement.gather(damaged) for name in found)


def load_checkpoint(
    path: Path,
    engine: DeepSpeedEngine,
    partitions: Sequence[Partition],
    average: WeightAverage,
    shapes: Mapping[str, torch.Size],
) -> dict[str, Any]:
    """Restore the ranks' state, however many ranks have saved it; returns the trainer's state.

    Args:
        path: The checkpoint.
        engine, partitions, average: What to restore.
        shapes: Of the weights, whole.

    Raises:
        UserError: The checkpoint is of another model.
    """
    trainer = torch.load(path / TRAINER_FILE, map_location="cpu", weights_only=True)
    try:
        with PiecedWeights(sorted(path.glob(RANK_FILES))) as saved:
            _check_shapes(saved.shapes(), shapes)
            for partition, averaged in zip(partitions, average.values, strict=True):
                weights = partition.weights
                targets = {WEIGHTS: weights, AVERAGE: averaged} | {m: torch.zeros_like(weights) for m in MOMENTS}
                for piece in partition.pieces:
                    place = slice(piece.offset, piece.offset + piece.numel)
                    for state, flat in targets.items():
                        flat[place] = saved.read(state, piece.name, piece.start, piece.numel)
                steps = torch.tensor(float(trainer["optimiser_steps"]), device=weights.device)
                partition.state.update(step=steps, **{moment: targets[moment] for moment in MOMENTS})
    except ValueError as error:
        raise UserError(f"{path} does not fit this model: {error}") from None
    publish_weights(engine)
    return trainer


def remove_old_checkpoints(folder: Path, keep: CheckpointSpec) -> None:
    """Delete the whole checkpoints that need not be kept, and what a killed save left behind; for rank 0 alone."""
    found = whole_checkpoints(folder)
    judged = sorted((manifest.valid_loss, path) for path, manifest in found if manifest.valid_loss is not None)
    kept = {path for path, _ in found[-keep.keep_last :]} | {path for _, path in judged[: keep.keep_best]}
    if keep.keep_every_steps:
        kept |= {path for path, manifest in found if manifest.step % keep.keep_every_steps == 0}
    for path in {path for path, _ in found} - kept:
        shutil.rmtree(path)
    for path in folder.glob(f"step-*{_PARTIAL}"):
        shutil.rmtree(path)


def _check_shapes(saved: Mapping[str, torch.Size], wanted: Mapping[str, torch.Size]) -> None:
    differences = [
        f"  {name}: {_shape(saved.get(name))} in the checkpoint, {_shape(wanted.get(name))} now"
        for name in sorted(saved.keys() | wanted.keys())
        if saved.get(name) != wanted.get(name)
    ]
    if differences:
        raise ValueError("\n" + "\n".join(differences))


def _shape(shape: torch.Size | None) -> str:
    return "none" if shape is None else str(list(shape))


def _is_as_written(path: Path, expected: FileDigest) -> bool:
    try:
        return FileDigest.of(path) == expected
    except OSError:
        return False


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**27 else f"{num_bytes / 2**20:.2f} MiB"

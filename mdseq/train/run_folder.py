"""The folder of one run: its spec, engine configuration, environment, metrics, samples and checkpoints."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mdseq.engine.checkpoint import CheckpointManifest, whole_checkpoints
from mdseq.engine.config import EngineConfig
from mdseq.errors import UserError
from mdseq.files import nearest_existing, write_whole
from mdseq.settings import flatten
from mdseq.slurm import JOBS_FOLDER
from mdseq.spec import RunSpec
from mdseq.train.environment import Place, environment, with_earlier

SPEC_FILE, ENVIRONMENT_FILE, LOCK_FILE = "spec.toml", "environment.json", "lock"
# What decides the trajectory; a run that continues must not change it.
_FIXED_SECTIONS = ("seed", "model", "attention", "experts", "diffusion", "data")
_FREE_KEYS = ("data.path", "data.micro_batch_size", "attention.engine", "model.activation_checkpointing")


class RunFolder:
    """Paths of a run, and the choice of where it continues."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"

    def check_usable(self) -> None:
        """Raise UserError if the folder holds something else than a run, or cannot be written; leaves no trace."""
        found = {path.name for path in self.path.iterdir()} if self.path.is_dir() else set()
        if found - {LOCK_FILE, JOBS_FOLDER} and SPEC_FILE not in found:
            raise UserError(f"{self.path} holds files that are not a run's; choose another --output")
        existing = nearest_existing(self.path)
        try:
            with tempfile.TemporaryFile(dir=existing):
                return
        except OSError as error:
            raise UserError(
                f"cannot write the run to {self.path}: {existing}: {error.strerror}; choose another --output"
            ) from None

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Inside, no other run writes here; for rank 0 alone.

        Raises:
            UserError: Another run does.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / LOCK_FILE).open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise UserError(
                    f"another run is writing to {self.path}: {file.read().strip()}; wait for it, or choose another "
                    "--output"
                ) from None
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}\n")
            file.flush()
            yield

    def find_checkpoints(self, resume: str) -> list[tuple[Path, CheckpointManifest]]:
        """Where to continue: whole checkpoints, newest first, or the one named; none for a fresh start.

        Args:
            resume: "auto", "never", or the path of a checkpoint.
        """
        if resume not in ("auto", "never"):
            wanted = Path(resume)
            newest = max((manifest.step for _, manifest in whole_checkpoints(self.checkpoints)), default=0)
            for found, manifest in whole_checkpoints(wanted.parent):
                if found == wanted and manifest.step < newest:
                    raise UserError(
                        f"{self.path} holds a later checkpoint, of step {newest}, which continuing from {wanted} would "
                        "overwrite; choose another --output"
                    )
                if found == wanted:
                    return [(found, manifest)]
            raise UserError(
                f"--resume {resume} is not a whole checkpoint; see {self.checkpoints}, or use --resume auto"
            )
        found_all = whole_checkpoints(self.checkpoints)
        if resume == "never" and found_all:
            raise UserError(
                f"{self.path} already holds a run with {len(found_all)} checkpoints, which --resume never would "
                "overwrite; choose another --output, or continue it with --resume auto"
            )
        return found_all[::-1]

    def describe(self, spec: RunSpec, engine: EngineConfig, places: Sequence[Place]) -> dict[str, bytes]:
        """Write spec.toml, engine.json and environment.json, and return them by name; for rank 0 alone.

        Args:
            spec, engine: What is run.
            places: Where all ranks are, in their order.
        """
        self.samples.mkdir(parents=True, exist_ok=True)
        self.checkpoints.mkdir(exist_ok=True)
        started = with_earlier(environment(places), self.path / ENVIRONMENT_FILE)
        files = {
            SPEC_FILE: spec.to_toml(),
            "engine.json": json.dumps(engine.values, indent=2) + "\n",
            ENVIRONMENT_FILE: json.dumps(started, indent=2) + "\n",
        }
        contents = {name: text.encode() for name, text in files.items()}
        for name, content in contents.items():
            write_whole(self.path / name, content)
        return contents


def check_same_run(
    path: Path, manifest: CheckpointManifest, spec: RunSpec, dataset_fingerprint: str, allow_changes: bool
) -> list[str]:
    """How the run that the checkpoint belongs to differs from this one, a line each.

    Raises:
        UserError: It does, and that is not allowed.
    """
    saved, wanted = flatten(manifest.spec), flatten(spec.model_dump(mode="json"))
    differences = [
        f"  {key}: {saved.get(key)} in the checkpoint, {wanted.get(key)} now"
        for key in sorted(saved.keys() | wanted.keys())
        if key.partition(".")[0] in _FIXED_SECTIONS and key not in _FREE_KEYS and saved.get(key) != wanted.get(key)
    ]
    if manifest.dataset_fingerprint != dataset_fingerprint:
        differences.append(f"  dataset: {manifest.dataset_fingerprint[:12]} then, {dataset_fingerprint[:12]} now")
    if differences and not allow_changes:
        raise UserError(
            f"{path} cannot be continued with what is asked for now:\n" + "\n".join(differences) + "\n"
            "  restore these, start another run with another --output, or mean it: --allow_changes"
        )
    return differences

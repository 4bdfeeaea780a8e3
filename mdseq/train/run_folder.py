"""The folder of one run: its spec, engine configuration, environment, metrics, samples and checkpoints."""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mdseq import __version__
from mdseq.engine.checkpoint import CheckpointManifest, whole_checkpoints
from mdseq.engine.config import EngineConfig
from mdseq.errors import UserError
from mdseq.settings import flatten
from mdseq.spec import RunSpec

SPEC_FILE = "spec.toml"
_PACKAGES = ("torch", "deepspeed", "sentencepiece", "pyarrow", "numpy")
# What decides the trajectory; a run that continues must not change it.
_FIXED_SECTIONS = ("seed", "model", "attention", "experts", "diffusion", "data")
_FREE_KEYS = ("data.path", "data.micro_batch_size", "attention.engine")


class RunFolder:
    """Paths of a run, and the choice of where it continues."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"

    def check_usable(self) -> None:
        """Raise UserError if the folder holds something else than a run, or cannot be written; leaves no trace."""
        if self.path.is_dir() and any(self.path.iterdir()) and not (self.path / SPEC_FILE).is_file():
            raise UserError(f"{self.path} holds files that are not a run's; choose another --output")
        existing = next(parent for parent in (self.path, *self.path.parents) if parent.exists())
        try:
            with tempfile.TemporaryFile(dir=existing):
                return
        except OSError as error:
            raise UserError(
                f"cannot write the run to {self.path}: {existing}: {error.strerror}; choose another --output"
            ) from None

    def find_checkpoint(self, resume: str) -> tuple[Path, CheckpointManifest] | None:
        """Where to continue: the newest whole checkpoint, the one named, or None for a fresh start.

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
                    return found, manifest
            raise UserError(
                f"--resume {resume} is not a whole checkpoint; see {self.checkpoints}, or use --resume auto"
            )
        found_all = whole_checkpoints(self.checkpoints)
        if resume == "auto":
            return found_all[-1] if found_all else None
        if found_all:
            raise UserError(
                f"{self.path} already holds a run with {len(found_all)} checkpoints, which --resume never would "
                "overwrite; choose another --output, or continue it with --resume auto"
            )
        return None

    def write_description(self, spec: RunSpec, engine: EngineConfig) -> None:
        """Write spec.toml, engine.json and environment.json; for rank 0 alone."""
        self.samples.mkdir(parents=True, exist_ok=True)
        self.checkpoints.mkdir(exist_ok=True)
        (self.path / SPEC_FILE).write_text(spec.to_toml(), encoding="utf-8")
        for name, values in (("engine.json", engine.values), ("environment.json", _environment(engine))):
            (self.path / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def check_same_run(
    path: Path, manifest: CheckpointManifest, spec: RunSpec, engine: EngineConfig, dataset_fingerprint: str
) -> None:
    """Raise UserError with a table of differences if the checkpoint belongs to another run than this one."""
    saved, wanted = flatten(manifest.spec), flatten(spec.model_dump(mode="json"))
    differences = [
        f"  {key}: {saved.get(key)} in the checkpoint, {wanted.get(key)} now"
        for key in sorted(saved.keys() | wanted.keys())
        if key.partition(".")[0] in _FIXED_SECTIONS and key not in _FREE_KEYS and saved.get(key) != wanted.get(key)
    ]
    if manifest.dataset_fingerprint != dataset_fingerprint:
        differences.append(f"  dataset: {manifest.dataset_fingerprint[:12]} then, {dataset_fingerprint[:12]} now")
    for name in ("num_ranks", "expert_parallel_size"):
        if getattr(manifest, name) != getattr(engine, name):
            differences.append(f"  {name}: {getattr(manifest, name)} in the checkpoint, {getattr(engine, name)} now")
    if manifest.zero_stage != engine.zero_stage:
        differences.append(f"  ZeRO stage: {manifest.zero_stage} in the checkpoint, {engine.zero_stage} now")
    if differences:
        raise UserError(
            f"{path} cannot be continued with what is asked for now:\n" + "\n".join(differences) + "\n"
            "  restore these, or start another run with another --output"
        )


def _environment(engine: EngineConfig) -> dict[str, Any]:
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "num_ranks": engine.num_ranks,
        "packages": {"mdseq": __version__} | {name: version(name) for name in _PACKAGES},
    }

"""Weights out of a run: a model folder with a card that says where it comes from."""

from __future__ import annotations

import shutil
from pathlib import Path

from mdseq.engine.checkpoint import CheckpointManifest, find_model
from mdseq.errors import UserError
from mdseq.files import sync_folder
from mdseq.model.pieces import FileDigest
from mdseq.model.saved import (
    SHARD_BYTES,
    TOKENIZER_FILE,
    WhichWeights,
    read_config,
    read_weights,
    save_model,
)
from mdseq.report.metrics import read_metrics

CARD_FILE = "README.md"
SPEC_FILE = "spec.toml"


def export_model(run: Path, output: Path, which: WhichWeights, shard_bytes: int = SHARD_BYTES) -> Path:
    """Write a run's newest whole checkpoint as a model folder, in memory for one shard.

    Args:
        run: A run folder, or one of its checkpoints.
        output: The folder to make.
        which: The averaged weights, or those that training had reached.
        shard_bytes: Weights of one file.

    Returns:
        The checkpoint.

    Raises:
        UserError: There is no undamaged checkpoint, or the folder is there already or cannot be written.
    """
    checkpoint = find_model(run)
    manifest = CheckpointManifest.read(checkpoint)
    if manifest is None:
        raise UserError(f"{checkpoint} is not a whole checkpoint; give a run folder, or a checkpoint of one")
    if output.exists():
        raise UserError(f"{output} is there already, and nothing is overwritten; choose another --output")
    damaged = [name for name, digest in manifest.files.items() if FileDigest.of(checkpoint / name) != digest]
    if damaged:
        raise UserError(
            f"{checkpoint} is damaged: {', '.join(damaged)} no longer what was saved; export an older checkpoint"
        )
    partial = output.with_name(f"{output.name}.partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        config = read_config(checkpoint)
        save_model(partial, config, read_weights(checkpoint, which), checkpoint / TOKENIZER_FILE, shard_bytes)
        (partial / CARD_FILE).write_text(_card(checkpoint, manifest, which), encoding="utf-8")
        partial.rename(output)
        sync_folder(output.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"cannot write {output}: {error.strerror or error}; nothing was left there") from None
    return checkpoint


def _card(checkpoint: Path, manifest: CheckpointManifest, which: WhichWeights) -> str:
    """What someone who finds the folder needs to know."""
    logged = [line for line in read_metrics(checkpoint.parent.parent) if line["step"] <= manifest.step]
    figures = [f"| {name} | {_number(logged[-1][name])} |" for name in ("loss", "tokens") if logged]
    weights = "the moving average of the weights" if which == "average" else "the weights, not their average"
    spec = (checkpoint / SPEC_FILE).read_text(encoding="utf-8")
    return "\n".join(
        [
            "# A diffusion language model",
            "",
            f"Made by mdseq: {weights} after {manifest.step:,} optimiser steps.",
            "",
            "    import mdseq",
            "    denoiser = mdseq.load(FOLDER)",
            "",
            "    mdseq generate FOLDER",
            "",
            "| | |",
            "|---|---|",
            f"| optimiser steps | {manifest.step:,} |",
            *figures,
            f"| dataset fingerprint | {manifest.dataset_fingerprint} |",
            "",
            "The run spec:",
            "",
            *(f"    {line}".rstrip() for line in spec.splitlines()),
            "",
        ]
    )


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"

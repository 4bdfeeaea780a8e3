"""mdseq trains diffusion language models on long documents."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from mdseq.model.denoiser import Denoiser

__version__ = "0.1.0"


def load(folder: str | Path, device: torch.device | str = "cpu") -> Denoiser:
    """The denoiser of an exported model, in plain PyTorch; `mdseq.generate.text.TextGenerator` writes texts with one.

    Args:
        folder: What `mdseq export` has made; or a run, whose newest averaged weights are taken.
        device: Where to put it.

    Returns:
        In evaluation mode, fp32.

    Raises:
        mdseq.errors.UserError: It is none, or it is damaged.
    """
    from mdseq.engine.checkpoint import find_model
    from mdseq.model.saved import load_model

    return load_model(find_model(Path(folder)), device).denoiser

"""The trained model that a command works with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from mdseq.model.saved import SavedModel


def load_run(run: Path, precision: Literal["fp32", "bf16"] = "fp32") -> SavedModel:
    """The newest averaged weights of a run, or those of a model folder, on a GPU where there is one.

    Args:
        run: Where they are.
        precision: What the denoiser's layers compute in. Embeddings, scores and all that a solver does stay in fp32.

    Raises:
        UserError: There are none.
    """
    import torch

    from mdseq.engine.checkpoint import find_model
    from mdseq.model.saved import load_model

    saved = load_model(find_model(run), "cuda" if torch.cuda.is_available() else "cpu")
    if precision == "bf16":
        saved.denoiser.cast_layers(torch.bfloat16)
    return saved

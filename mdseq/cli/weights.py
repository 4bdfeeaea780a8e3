"""The trained model that a command works with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mdseq.model.saved import SavedModel


def load_run(run: Path) -> SavedModel:
    """The newest averaged weights of a run, or those of a model folder, on a GPU where there is one.

    Raises:
        UserError: There are none.
    """
    import torch

    from mdseq.engine.checkpoint import find_model
    from mdseq.model.saved import load_model

    return load_model(find_model(run), "cuda" if torch.cuda.is_available() else "cpu")

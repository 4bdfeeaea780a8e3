"""Which engine a run's attention takes on the device at hand."""

from __future__ import annotations

import torch

from mdseq.errors import UserError
from mdseq.sparse.attend import Call, Choice, choose
from mdseq.spec import RunSpec


def choose_attention(spec: RunSpec, device: torch.device) -> Choice:
    """The engine, and why. Raises UserError: the one that is asked for cannot run here."""
    dtype = torch.bfloat16 if spec.optimiser.precision == "bf16" else torch.float32
    head_dim = spec.model.hidden_dim // spec.model.num_heads
    call = Call.on(device, dtype, head_dim, needs_gradient=True, num_slots=spec.data.row_length)
    try:
        return choose(spec.attention.engine, call)
    except ValueError as error:
        raise UserError(f"attention.engine: {error}") from None

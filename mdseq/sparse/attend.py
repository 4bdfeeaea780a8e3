"""The one call of the library, and which engine answers it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from mdseq.kernels.launch import has_triton
from mdseq.sparse.banded import attend_banded
from mdseq.sparse.dense import attend_dense
from mdseq.sparse.documents import Layout
from mdseq.sparse.flash import attend_flash
from mdseq.sparse.flex import attend_flex
from mdseq.sparse.fused import HEAD_DIMS, attend_fused
from mdseq.sparse.pattern import Pattern
from mdseq.sparse.reference import attend_reference

ENGINES = {
    "reference": attend_reference,
    "dense": attend_dense,
    "banded": attend_banded,
    "fused": attend_fused,
    "flash": attend_flash,
    "flex": attend_flex,
}
FASTEST_FIRST = ("fused", "flash", "flex", "banded")
# The flash kernel visits as many blocks for each document as for the longest there could be, though most are empty.
# On an H100, from about this many documents a row on, that costs more than what FlexAttention is slower by.
MANY_DOCUMENTS = 128
# On a CPU, up to about this many slots all pairs cost less than to tell them apart.
SHORT_ROW = 320

log = logging.getLogger("mdseq.sparse")


def attend(
    q_bshd: Tensor, k_bshd: Tensor, v_bshd: Tensor, pattern: Pattern, layout: Layout, engine: str = "auto"
) -> Tensor:
    """Attention over the keys that `pattern` and `layout` make visible.

    Args:
        q_bshd, k_bshd, v_bshd: [b, s, h, d], the row's global slots first (`layout.num_global` of them).
        pattern: Window and dilation of this layer.
        layout: Documents of the slots; shared by all layers of a batch, so that masks are built once.
        engine: A key of ENGINES, or "auto" for the fastest that can run; all give the same answer.

    Returns:
        [b, s, h, d]; zero at slots that hold nothing.

    Raises:
        ValueError: If there is no such engine, or it cannot run on these tensors; it says which can.
    """
    choice = choose(engine, Call.of(q_bshd, k_bshd, v_bshd, layout))
    _log_once(choice)
    return ENGINES[choice.engine](q_bshd, k_bshd, v_bshd, pattern, layout)


@dataclass(frozen=True)
class Call:
    """What the choice of an engine depends on.

    Attributes:
        capability: Of a GPU, (major, minor); (0, 0) elsewhere.
        needs_gradient: Whether a backward pass may follow.
        num_slots: Of a row.
        num_documents: Of a row, at most.
        has_triton: Whether there is a compiler for kernels of our own.
    """

    device_type: str
    dtype: torch.dtype
    head_dim: int
    needs_gradient: bool
    num_slots: int
    num_documents: int = 1
    capability: tuple[int, int] = (0, 0)
    has_triton: bool = False

    @classmethod
    def of(cls, q_bshd: Tensor, k_bshd: Tensor, v_bshd: Tensor, layout: Layout) -> Call:
        needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q_bshd, k_bshd, v_bshd))
        _, s, _, d = q_bshd.shape
        return cls.on(q_bshd.device, q_bshd.dtype, d, needs_gradient, s, layout.num_documents)

    @classmethod
    def on(
        cls,
        device: torch.device,
        dtype: torch.dtype,
        head_dim: int,
        needs_gradient: bool,
        num_slots: int,
        num_documents: int = 1,
    ) -> Call:
        """On a device of this machine."""
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
        return cls(
            device.type, dtype, head_dim, needs_gradient, num_slots, num_documents, capability, has_triton=has_triton()
        )


@dataclass(frozen=True)
class Choice:
    """An engine, and why it was taken."""

    engine: str
    reason: str


def choose(engine: str, call: Call) -> Choice:
    """Take `engine`, or for "auto" the fastest that can run.

    Raises:
        ValueError: If there is no such engine, or it cannot run.
    """
    if engine == "auto":
        return _fastest(call)
    able = [name for name in ENGINES if _obstacle(name, call) is None]
    if engine not in ENGINES:
        raise ValueError(f"engine {engine!r} does not exist; give auto, {', '.join(ENGINES)}")
    obstacle = _obstacle(engine, call)
    if obstacle is not None:
        raise ValueError(f"{engine} cannot run: {obstacle}; give auto, {', '.join(able)}")
    return Choice(engine, "asked for")


def _fastest(call: Call) -> Choice:
    if call.device_type != "cuda":
        # FlexAttention would run on a CPU too, but only forward: training and sampling shall use the same engine.
        return Choice("dense", "no GPU, short rows") if call.num_slots <= SHORT_ROW else Choice("banded", "no GPU")
    obstacles: list[str] = []
    for engine in FASTEST_FIRST:
        if engine == "flash" and call.num_documents > MANY_DOCUMENTS and _obstacle("flex", call) is None:
            obstacles.append(f"flash: slow with more than {MANY_DOCUMENTS} documents a row")
            continue
        obstacle = _obstacle(engine, call)
        if obstacle is None:
            return Choice(engine, "; ".join(obstacles) or f"{_name(call.dtype)} on a GPU")
        obstacles.append(f"{engine}: {obstacle}")
    raise AssertionError("the banded engine runs everywhere")


def _obstacle(engine: str, call: Call) -> str | None:
    """Why an engine cannot run, or None if it can."""
    on_gpu = call.device_type == "cuda"
    if engine == "fused":
        if not on_gpu:
            return "no GPU"
        if not call.has_triton:
            return "triton is not installed"
        if call.capability < (8, 0):
            return f"it needs a GPU of compute capability 8.0 or more, this one has {_version(call.capability)}"
        if call.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return f"it needs bfloat16, float16 or float32, not {_name(call.dtype)}"
        if call.head_dim not in HEAD_DIMS:
            return f"it needs a head dimension of {', '.join(map(str, HEAD_DIMS))}, not {call.head_dim}"
    if engine == "flash":
        if not on_gpu:
            return "no GPU"
        if call.capability < (8, 0):
            return f"it needs a GPU of compute capability 8.0 or more, this one has {_version(call.capability)}"
        if call.dtype not in (torch.bfloat16, torch.float16):
            return f"it needs bfloat16 or float16, not {_name(call.dtype)}"
        if call.head_dim % 8 or call.head_dim > 256:
            return f"it needs a head dimension that is a multiple of 8 and at most 256, not {call.head_dim}"
    if engine == "flex":
        if call.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return f"it needs bfloat16, float16 or float32, not {_name(call.dtype)}"
        if not on_gpu and call.needs_gradient:
            return "it has no backward pass without a GPU"
        if on_gpu and call.head_dim < 16:
            return f"it needs a head dimension of at least 16, not {call.head_dim}"
        if on_gpu and call.capability < (8, 0):
            return f"it needs a GPU of compute capability 8.0 or more, this one has {_version(call.capability)}"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _version(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


@cache
def _log_once(choice: Choice) -> None:
    log.info("attention engine: %s (%s)", choice.engine, choice.reason)

"""What a training step keeps of each block for its backward pass: everything, or the input only, here or in CPU memory.

Computing a block again costs a second forward pass (Chen et al., arXiv 1604.06174). Nothing in a block draws random
numbers, so it comes out the same to the bit, and with it the loss and all gradients.

In very long rows, the inside of a single block is too large as well, and most of it is that of the feed-forward layer.
As this takes one slot like the other, it is computed for a piece of the row at a time (as ALST's tiled MLP, arXiv
2506.13996, section 3.1); the sum over pieces then rounds differently in the gradients of the weights.

Shapes: b batch, s slots, n = b * s slots of all rows, d hidden dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

ActivationCheckpointing = Literal["none", "recompute", "offload"]

# torch rounds pinned memory up to a power of 2. In one piece, the input of a row of 2^20 tokens and a few global slots
# would take twice its size.
PIECE_BYTES = 2**26
# Slots of a feed-forward layer: enough for a GPU to be busy, few enough to be small beside the rest of a block.
PIECE_SLOTS = 2**17


def block_caller(mode: ActivationCheckpointing) -> Callable[..., Tensor]:
    """How one forward pass calls its parts, in order: `call(block, x_bsd, *shared)` is `block(x_bsd, *shared)`.

    "recompute" keeps x_bsd, and computes the block again when the backward pass needs what is inside; "offload" keeps
    x_bsd in CPU memory. Without gradients, as while sampling, both are plain calls.
    """
    if mode == "none" or not torch.is_grad_enabled():
        return lambda block, x_bsd, *shared: block(x_bsd, *shared)
    store = CpuStore() if mode == "offload" else None

    def call(block: Callable[..., Tensor], x_bsd: Tensor, *shared: Any) -> Tensor:
        def of_input(x_bsd: Tensor) -> Tensor:  # what all blocks share is not kept again for each
            return block(x_bsd, *shared)

        if store is None or not x_bsd.is_cuda:
            return recomputed(of_input, x_bsd)
        with saved_tensors_hooks(store.put, store.get):  # sees x_bsd only: the insides have hooks of their own
            return recomputed(of_input, x_bsd)

    return call


def recomputed(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """function(*inputs), of which the inputs are kept for the backward pass."""
    output: Tensor = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return output


def in_pieces(function: Callable[..., Tensor], *inputs_n: Tensor, recompute: bool) -> Tensor:
    """function(*inputs_n) of a function that takes one slot like the other, for PIECE_SLOTS of them at a time.

    With gradients, that saves memory only if each piece is computed again from its inputs: with `recompute`, or not at
    all.
    """
    grad_enabled = torch.is_grad_enabled()
    if len(inputs_n[0]) <= PIECE_SLOTS or (grad_enabled and not recompute):
        return function(*inputs_n)
    pieces = zip(*(x_n.split(PIECE_SLOTS) for x_n in inputs_n), strict=True)
    return torch.cat([recomputed(function, *piece) if grad_enabled else function(*piece) for piece in pieces])


class CpuStore:
    """Keeps tensors of a GPU in pinned CPU memory until they are needed again, the last one first.

    Both ways, copies run beside the computation, on a stream of their own: getting a tensor starts to fetch the one
    that was put before it. So the GPU holds two of them.
    """

    def __init__(self) -> None:
        self.kept: list[_Kept] = []

    def put(self, x: Tensor) -> Tensor | int:
        """Start to copy; what is returned is for `get`. What is in CPU memory stays as it is."""
        if not x.is_cuda:  # torch's checkpointing keeps an empty tensor of its own there
            return x
        x = x.detach().contiguous()
        pieces = [torch.empty(one.shape, dtype=x.dtype, pin_memory=True) for one in _pieces(x)]
        stream = _copy_stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            for to, one in zip(pieces, _pieces(x), strict=True):
                to.copy_(one, non_blocking=True)
        x.record_stream(stream)  # nothing else gets this memory before it is copied
        self.kept.append(_Kept(pieces, x.shape, x.device))
        return len(self.kept) - 1

    def get(self, index: Tensor | int) -> Tensor:
        if isinstance(index, Tensor):
            return index
        kept = self.kept[index]
        x, kept.fetched = self._fetch(kept), None
        torch.cuda.current_stream(x.device).wait_stream(_copy_stream(x.device))
        if index:  # from here on, so that x does not wait for it
            self.kept[index - 1].fetched = self._fetch(self.kept[index - 1])
        return x

    @staticmethod
    def _fetch(kept: _Kept) -> Tensor:
        """On its way to the GPU."""
        if kept.fetched is not None:
            return kept.fetched
        x = torch.empty(kept.shape, dtype=kept.pieces[0].dtype, device=kept.device)
        stream = _copy_stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))  # which may still be at work on what was here before
        with torch.cuda.stream(stream):
            for to, one in zip(_pieces(x), kept.pieces, strict=True):
                to.copy_(one, non_blocking=True)
        return x


@dataclass
class _Kept:
    """A tensor in CPU memory, and on the GPU once it is on its way back."""

    pieces: list[Tensor]
    shape: torch.Size
    device: torch.device
    fetched: Tensor | None = None


def _pieces(x: Tensor) -> tuple[Tensor, ...]:
    return x.flatten().split(PIECE_BYTES // x.element_size())


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)

"""What to say when memory runs out."""

from __future__ import annotations

import re

import torch

from mdseq.engine.advice import GIB, memory_advice
from mdseq.engine.config import EngineConfig
from mdseq.engine.memory import estimate_memory
from mdseq.model.denoiser import DenoiserConfig
from mdseq.spec import RunSpec

# torch reports that the CPU's allocator has failed as a plain RuntimeError.
_NO_MEMORY = re.compile(r"DefaultCPUAllocator|can't allocate memory|out of memory", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is torch's, or Python's, way to say that memory has run out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error)))


def out_of_memory(spec: RunSpec, engine: EngineConfig, vocab_size: int, *, on_gpu: bool) -> str:
    """What a rank's memory goes to by estimate, and what to change, the most saving first."""
    parts = estimate_memory(DenoiserConfig.of(spec, vocab_size), spec, engine, on_gpu=on_gpu).parts
    listed = ", ".join(f"{name} {num_bytes / GIB:.2f}" for name, num_bytes in parts.items() if num_bytes)
    advice = memory_advice(spec, engine, vocab_size, on_gpu=on_gpu)
    return "\n".join([f"out of memory; by estimate a rank needs, in GiB: {listed}", *(f"  {text}" for text in advice)])

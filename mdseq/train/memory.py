"""What to say when memory runs out."""

from __future__ import annotations

import re

import torch

from mdseq.engine.config import EngineConfig
from mdseq.model.cost import memory_per_rank
from mdseq.model.denoiser import DenoiserConfig
from mdseq.spec import RunSpec

# torch reports that the CPU's allocator has failed as a plain RuntimeError.
_NO_MEMORY = re.compile(r"DefaultCPUAllocator|can't allocate memory|out of memory", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is torch's, or Python's, way to say that memory has run out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error)))


def memory_advice(spec: RunSpec, engine: EngineConfig, vocab_size: int) -> str:
    """What to lower, and by how much, from what a rank's memory goes to by estimate."""
    parts = memory_per_rank(
        DenoiserConfig.of(spec, vocab_size), spec, engine.zero_stage, engine.num_ranks, engine.expert_parallel_size,
        engine.offloads_optimiser,
    )  # fmt: skip
    listed = ", ".join(f"{name} {gib:.2f}" for name, gib in parts.items())
    advice = [f"out of memory; by estimate a rank needs, in GiB: {listed}"]
    rows, activations = spec.data.micro_batch_size, parts["activations"]
    if rows > 1:
        saved = activations * (rows - rows // 2) / rows
        advice.append(
            f"  data.micro_batch_size = {rows // 2} instead of {rows} saves about {saved:.2f} GiB of activations"
        )
    else:
        advice.append(
            f"  data.row_length = {spec.data.row_length // 2} instead of {spec.data.row_length} saves about "
            f"{activations / 2:.2f} GiB of activations"
        )
    state = parts["weights"] + parts["gradients"] + parts["optimiser"] + parts["average"]
    if engine.zero_stage < 3 and engine.num_ranks > 1:
        whole = parts["weights"] + (parts["gradients"] if engine.zero_stage < 2 else 0)
        saved = whole * (1 - 1 / engine.num_ranks)
        advice.append(f"  ds_configs/zero3.json shards weights and gradients too, and saves about {saved:.2f} GiB")
    elif not engine.offloads_optimiser:
        saved = parts["optimiser"] + parts["average"]
        advice.append(f"  ds_configs/zero3_offload.json puts about {saved:.2f} of {state:.2f} GiB into CPU memory")
    return "\n".join(advice)

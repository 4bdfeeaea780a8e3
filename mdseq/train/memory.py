"""What to say when memory runs out."""

from __future__ import annotations

import re

import torch

from mdseq.engine.config import EngineConfig
from mdseq.model.cost import memory_per_rank
from mdseq.model.denoiser import DenoiserConfig
from mdseq.model.recompute import ActivationCheckpointing
from mdseq.spec import RunSpec

# torch reports that the CPU's allocator has failed as a plain RuntimeError.
_NO_MEMORY = re.compile(r"DefaultCPUAllocator|can't allocate memory|out of memory", re.IGNORECASE)

SPARING_MORE: dict[str, ActivationCheckpointing] = {"none": "recompute", "recompute": "offload"}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is torch's, or Python's, way to say that memory has run out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error)))


def memory_advice(spec: RunSpec, engine: EngineConfig, vocab_size: int) -> str:
    """What to change, and how much that saves, from what a rank's memory goes to by estimate; the most first."""
    parts = _memory(spec, engine, vocab_size)
    rows, activations = spec.data.micro_batch_size, parts["activations"]
    advice: list[tuple[float, str]] = []
    if rows > 1:
        saved = activations * (rows - rows // 2) / rows
        text = f"data.micro_batch_size = {rows // 2} instead of {rows} saves about {saved:.2f} GiB of activations"
    else:
        saved, length = activations / 2, spec.data.row_length
        text = f"data.row_length = {length // 2} instead of {length} saves about {saved:.2f} GiB of activations"
    advice.append((saved, text))
    if mode := SPARING_MORE.get(spec.model.activation_checkpointing):
        sparing = spec.model_copy(update={"model": spec.model.model_copy(update={"activation_checkpointing": mode})})
        saved = activations - _memory(sparing, engine, vocab_size)["activations"]
        advice.append((saved, f"model.activation_checkpointing = {mode} saves about {saved:.2f} GiB of activations"))
    state = parts["weights"] + parts["gradients"] + parts["optimiser"] + parts["average"]
    if engine.zero_stage < 3 and engine.num_ranks > 1:
        whole = parts["weights"] + (parts["gradients"] if engine.zero_stage < 2 else 0)
        saved = whole * (1 - 1 / engine.num_ranks)
        advice.append(
            (saved, f"ds_configs/zero3.json shards weights and gradients too, and saves about {saved:.2f} GiB")
        )
    elif not engine.offloads_optimiser:
        saved = parts["optimiser"] + parts["average"]
        text = f"ds_configs/zero3_offload.json puts about {saved:.2f} of {state:.2f} GiB into CPU memory"
        advice.append((saved, text))
    listed = ", ".join(f"{name} {gib:.2f}" for name, gib in parts.items())
    texts = [f"  {text}" for _, text in sorted(advice, reverse=True)]
    return "\n".join([f"out of memory; by estimate a rank needs, in GiB: {listed}", *texts])


def _memory(spec: RunSpec, engine: EngineConfig, vocab_size: int) -> dict[str, float]:
    return memory_per_rank(
        DenoiserConfig.of(spec, vocab_size), spec, engine.zero_stage, engine.num_ranks, engine.expert_parallel_size,
        engine.offloads_optimiser,
    )  # fmt: skip

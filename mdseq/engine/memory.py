"""What a rank's memory goes to, by arithmetic on what DeepSpeed 0.19.8 and the trainer allocate; nothing is built.

A training step is fullest at one of three moments: where the forward pass ends and activations are whole, where the
gradients are reduced, or where the optimiser steps; unless ZeRO-3 needs more at the start, where it is given the model
whole. What is reported are the parts at the fullest moment, and no sum of maxima that never meet.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from mdseq.engine.config import EngineConfig
from mdseq.model.cost import ParameterCount, activation_bytes, count_parameters, value_bytes
from mdseq.model.denoiser import DenoiserConfig
from mdseq.spec import RunSpec

# DeepSpeed's defaults (deepspeed/runtime/zero/config.py).
_BUCKET_ELEMENTS, _PREFETCH_ELEMENTS, _REUSE_ELEMENTS = 500_000_000, 50_000_000, 1_000_000_000
_GRADIENT_GROUP_ELEMENTS = 1_000_000_000

FP32_BYTES = 4
_MASTER, _MOMENTS, _AVERAGE = FP32_BYTES, 2 * FP32_BYTES, FP32_BYTES


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        weights: In the type of the model, as far as the rank holds them, and the layers that ZeRO-3 has gathered.
        gradients: Accumulated, and the optimiser's fp32 copy of them.
        optimiser: Adam's moments and the fp32 weights.
        average: Of the weights.
        activations: What the backward pass keeps of a micro-batch.
        buffers: Of communication.
        checkpoint: The copy that is written in the background. On a GPU's rank it is in CPU memory, see `on_host`.
        experts: What of the parts before is due to experts; not one more part.
        on_host: Besides, in CPU memory, of a rank on a GPU: that copy and what is offloaded, or at the start the whole
            model in fp32, if that is more.
    """

    weights: int
    gradients: int
    optimiser: int
    average: int
    activations: int
    buffers: int
    checkpoint: int
    experts: int
    on_host: int

    @property
    def parts(self) -> dict[str, int]:
        """What adds up to the total, by name."""
        names = [field.name for field in fields(self) if field.name not in ("experts", "on_host")]
        return {name: getattr(self, name) for name in names}

    @property
    def total(self) -> int:
        """On the rank's device at the fullest moment."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class HostedParameters:
    """Parameters of the whole model as one rank has them.

    Attributes:
        shared, experts: Whole, in the layers: of the experts those that the rank hosts.
        shared_share, experts_share: What its optimiser updates.
        gathered: Whole, of what ZeRO-3 would have to gather.
    """

    shared: int
    experts: int
    shared_share: int
    experts_share: int
    gathered: int

    @classmethod
    def of(cls, count: ParameterCount, num_ranks: int, expert_parallel_size: int) -> HostedParameters:
        """Experts that are spread are sharded over the ranks that host the same: as many as copies of them."""
        copies = num_ranks // expert_parallel_size
        experts = _ceil(count.experts, expert_parallel_size)
        gathered = (count.shared if num_ranks > 1 else 0) + (experts if copies > 1 else 0)
        return cls(count.shared, experts, _ceil(count.shared, num_ranks), _ceil(experts, copies), gathered)

    @property
    def whole(self) -> int:
        return self.shared + self.experts

    @property
    def share(self) -> int:
        return self.shared_share + self.experts_share


def estimate_memory(config: DenoiserConfig, spec: RunSpec, engine: EngineConfig, *, on_gpu: bool) -> Memory:
    """What a rank holds at the fullest moment of a step, once optimiser and checkpoints have their memory.

    Left out is what a process holds besides: libraries, the context of a GPU, and what allocators waste.
    """
    count = count_parameters(config, spec.diffusion.absorbing)
    held = HostedParameters.of(count, engine.num_ranks, engine.expert_parallel_size)
    value = value_bytes(spec)
    stage, offloads = engine.zero_stage, _offloads(engine, on_gpu)
    activations = activation_bytes(config, spec, on_gpu=on_gpu, spread_experts=engine.expert_parallel_size > 1)
    state = held.share * (_MASTER + _MOMENTS)
    average, copy = held.share * _AVERAGE, held.share * (_MASTER + _MOMENTS + _AVERAGE)
    offloaded = held.share * (_MASTER + _MOMENTS + _AVERAGE + value + FP32_BYTES) if offloads else 0
    base = Memory(
        weights=(held.share if stage == 3 else held.whole) * value,
        gradients=0,
        optimiser=0 if offloads else state,
        average=0 if offloads else average,
        activations=0,
        buffers=0,
        checkpoint=0 if on_gpu else copy,
        experts=0,
        on_host=max(count.total * FP32_BYTES, copy + offloaded) if on_gpu else 0,
    )
    moments = _moments_of_stage_3 if stage == 3 else _moments_of_stages_1_and_2
    return max(
        (_with_experts(moment, held, stage) for moment in moments(base, held, spec, engine, activations, on_gpu)),
        key=lambda memory: memory.total,
    )


def _moments_of_stages_1_and_2(
    base: Memory, held: HostedParameters, spec: RunSpec, engine: EngineConfig, activations: int, on_gpu: bool
) -> list[Memory]:
    """Buckets of gradients are allocated by every backward pass, and copied for the collective (stage_1_and_2.py)."""
    value, zero = value_bytes(spec), engine.values["zero_optimization"]
    bucket = int(zero.get("reduce_bucket_size", _BUCKET_ELEMENTS))
    in_use = min(bucket, held.whole)
    num_buckets = 2 if zero.get("overlap_comm") else 1
    # Memory of a CPU that nothing has been written to is none.
    buckets = (bucket * num_buckets if on_gpu else in_use) * value
    copied, shares = in_use * value, 0 if _offloads(engine, on_gpu) else held.share * value
    early = bucket < held.whole  # a bucket is full while most activations are still there
    if engine.zero_stage == 1:  # all is reduced in the last backward pass, or after it without `overlap_comm`
        accumulated = held.whole * value if engine.micro_batches > 1 else 0
        grows = engine.micro_batches > 1 or not zero.get("overlap_comm")
        waiting = (held.whole - in_use) * value if grows else shares * early  # what is not in the bucket
    else:
        accumulated = shares if engine.micro_batches > 1 else 0
        waiting = accumulated + shares * early
    reduced_in_backward = engine.zero_stage == 2 or zero.get("overlap_comm")
    in_forward = (buckets if on_gpu or (early and reduced_in_backward) else 0) + (
        copied if early and reduced_in_backward else 0
    )
    return [
        replace(base, gradients=accumulated, activations=activations, buffers=in_forward),
        replace(base, gradients=waiting, buffers=buckets + copied),
        replace(base, gradients=shares + (accumulated if engine.zero_stage == 2 else 0), buffers=buckets),
        replace(base, gradients=0 if _offloads(engine, on_gpu) else shares + held.share * FP32_BYTES),
    ]


def _moments_of_stage_3(
    base: Memory, held: HostedParameters, spec: RunSpec, engine: EngineConfig, activations: int, on_gpu: bool
) -> list[Memory]:
    """The model comes to DeepSpeed whole, and is then sharded; gradients are reduced in a bucket that stays."""
    value, zero = value_bytes(spec), engine.values["zero_optimization"]
    bucket = int(zero.get("reduce_bucket_size", _BUCKET_ELEMENTS))
    prefetch = int(zero.get("stage3_prefetch_bucket_size", _PREFETCH_ELEMENTS))
    in_use = min(bucket, held.whole)
    buckets, copied = (bucket if on_gpu else in_use) * value, in_use * value
    # They arrive in one piece and are copied out of it; what is kept, and what is on its way.
    gathered = kept_gathered(held, engine) * value
    arriving = min(held.gathered, prefetch) * value
    gradients = 0 if _offloads(engine, on_gpu) else held.share * value
    early = bucket < held.whole
    forward = replace(
        base,
        weights=base.weights + gathered,
        gradients=gradients,
        activations=activations,
        buffers=buckets + max(arriving, copied * early),
    )
    by_gloo = 0 if on_gpu else copied  # it reduces in a copy
    reduction = replace(base, gradients=gradients, buffers=buckets + copied + by_gloo)
    group = min(held.share, int(zero.get("sub_group_size", _GRADIENT_GROUP_ELEMENTS)))
    flattened = group * (FP32_BYTES + (value if value != FP32_BYTES else 0))
    step = replace(base, gradients=gradients + (0 if _offloads(engine, on_gpu) else flattened), buffers=buckets)
    start = replace(base, weights=(held.whole + held.share) * value, optimiser=0, average=0, checkpoint=0)
    return [forward, reduction, step, start]


def kept_gathered(held: HostedParameters, engine: EngineConfig) -> int:
    """Values of the weights that ZeRO-3 has gathered in the forward pass and keeps for the backward pass.

    It keeps those between whose uses no more than `stage3_max_reuse_distance` values are passed, forward and backward:
    by default, whole models of half a billion parameters (partitioned_param_coordinator.py).
    """
    zero = engine.values["zero_optimization"]
    return min(held.gathered, int(zero.get("stage3_max_reuse_distance", _REUSE_ELEMENTS)) // 2)


def _with_experts(memory: Memory, held: HostedParameters, stage: int) -> Memory:
    """Told how much of what belongs to parameters belongs to the experts: in proportion to how they are held."""
    in_shares = memory.optimiser + memory.average + memory.checkpoint + (memory.weights if stage == 3 else 0)
    in_whole = memory.gradients + (0 if stage == 3 else memory.weights)
    experts = in_shares * held.experts_share / held.share + in_whole * held.experts / held.whole
    return replace(memory, experts=round(experts))


def _offloads(engine: EngineConfig, on_gpu: bool) -> bool:
    """Whether the optimiser's state is elsewhere than the model; on a CPU both are in its memory."""
    return engine.offloads_optimiser and on_gpu


def _ceil(count: int, parts: int) -> int:
    return -(-count // parts)

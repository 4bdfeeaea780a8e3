"""Ways to spread a run over GPUs, what each takes, and which to take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mdseq.engine.communication import Communication, estimate_communication
from mdseq.engine.config import DS_CONFIG_DIR, EngineConfig, complete_engine_config, nearest_batch_size, read_json
from mdseq.engine.memory import Memory, estimate_memory
from mdseq.model.denoiser import DenoiserConfig
from mdseq.spec import RunSpec

SPARE = 0.1  # share of a GPU's memory for what is not counted

# Milliseconds for which nothing else runs, by GiB: as measured on two H200 of one node, see docs/performance.md.
_WAIT_MS_PER_GIB = {"updates": 3.3, "tokens": 12.8, "gathered": 91.0}
# As many times as long between nodes: eight links of 50 GB/s a node in place of 450 GB/s a GPU. Not measured.
_BETWEEN_NODES = 9

# Of each ZeRO stage, the ds_config without experts spread, and the one with. With the rest of zero2.json, stage 1
# reduces gradients once a step, beside the last backward pass.
_FILES = {1: ("zero2.json", "zero2.json"), 2: ("zero2.json", "zero2.json"), 3: ("zero3.json", "zero3_experts.json")}
_OFFLOAD = "zero3_offload.json"


@dataclass(frozen=True)
class Choice:
    """One way to spread a run.

    Attributes:
        file: The ds_config that ships with mdseq.
        additions: What is to be written into it.
        engine: It, complete.
        memory: Of a rank.
        communication: Of a rank and step.
    """

    file: str
    additions: tuple[str, ...]
    engine: EngineConfig
    memory: Memory
    communication: Communication

    @property
    def wait_ms(self) -> float:
        """About how long a step waits for communication: to compare choices by, no forecast."""
        return sum(
            (traffic.within_nodes + _BETWEEN_NODES * traffic.between_nodes) / 2**30 * _WAIT_MS_PER_GIB[name]
            for name, traffic in vars(self.communication).items()
        )

    def fits(self, memory_bytes: float) -> bool:
        """Into the memory of a GPU, with a tenth of it to spare."""
        return self.memory.total <= (1 - SPARE) * memory_bytes


def with_nearest_batch(spec: RunSpec, num_ranks: int) -> RunSpec:
    """The spec with rows a step that these ranks can share."""
    data = spec.data.model_copy(update={"batch_size": nearest_batch_size(spec, num_ranks)})
    return spec.model_copy(update={"data": data})


def choices(spec: RunSpec, vocab_size: int, num_gpus: int, gpus_per_node: int) -> list[Choice]:
    """All ZeRO stages, with experts spread over each number of ranks that divides both, and offload.

    More ranks than a node has share experts only if they are as many as can. data.batch_size must suit `num_gpus`.
    """
    config = DenoiserConfig.of(spec, vocab_size)
    found = []
    for file, additions, values in _ds_configs(spec, num_gpus, gpus_per_node):
        engine = complete_engine_config(values, file, spec, num_gpus, on_gpu=True)
        memory = estimate_memory(config, spec, engine, on_gpu=True)
        communication = estimate_communication(config, spec, engine, gpus_per_node)
        found.append(Choice(file, additions, engine, memory, communication))
    return found


def recommended(choices: Sequence[Choice], memory_bytes: float) -> Choice | None:
    """Of those that fit with a tenth to spare, the one that waits least for communication; None if none fits.

    The optimiser goes to CPU memory only if nothing else fits. Of equal ones, a ds_config as it ships comes first, then
    what takes least memory.
    """
    return min(
        (choice for choice in choices if choice.fits(memory_bytes)),
        key=lambda choice: (
            choice.engine.offloads_optimiser, choice.wait_ms, len(choice.additions), choice.memory.total,
        ),
        default=None,
    )  # fmt: skip


DsConfig = tuple[str, tuple[str, ...], dict[str, Any]]


def _ds_configs(spec: RunSpec, num_gpus: int, gpus_per_node: int) -> Iterator[DsConfig]:
    """Files that ship with mdseq, what to write into each, and both together."""
    sizes = _expert_parallel_sizes(spec.experts.num_experts, num_gpus, gpus_per_node)
    for stage, (whole, spread) in _FILES.items():
        for size in sizes:
            file = whole if size == 1 else spread
            values = read_json(DS_CONFIG_DIR / file)
            additions = []
            if values["zero_optimization"]["stage"] != stage:
                values["zero_optimization"]["stage"] = stage
                additions.append(f'"stage": {stage}')
            if size > 1:
                if "expert_parallel" not in values or size != sizes[-1]:  # which is what "auto" makes of it
                    additions.append(f'"expert_parallel": {{ "autoep_size": {size} }}')
                values["expert_parallel"] = {"autoep_size": size}
            yield file, tuple(additions), values
    yield _OFFLOAD, (), read_json(DS_CONFIG_DIR / _OFFLOAD)


def _expert_parallel_sizes(num_experts: int, num_gpus: int, gpus_per_node: int) -> list[int]:
    """1, and over how many ranks experts can be spread."""
    if not num_experts:
        return [1]
    both = [size for size in range(1, num_experts + 1) if num_gpus % size == 0 and num_experts % size == 0]
    return [size for size in both if size <= gpus_per_node or size == both[-1]]

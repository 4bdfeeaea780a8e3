"""What a rank sends in a step, by arithmetic on what DeepSpeed 0.19.8 asks of its collectives."""

from __future__ import annotations

from dataclasses import dataclass

from mdseq.engine.config import EngineConfig
from mdseq.engine.memory import HostedParameters, kept_gathered
from mdseq.model.cost import count_parameters, value_bytes
from mdseq.model.denoiser import DenoiserConfig
from mdseq.spec import RunSpec


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends in a step, to ranks of its own node and of others."""

    within_nodes: float = 0.0
    between_nodes: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.within_nodes + other.within_nodes, self.between_nodes + other.between_nodes)

    @property
    def total(self) -> float:
        return self.within_nodes + self.between_nodes


@dataclass(frozen=True)
class Communication:
    """What a rank sends in a step, by who waits for it.

    Attributes:
        updates: Gradients, and weights after the step: beside the backward pass, or once a step.
        tokens: To experts and back; a layer waits for them.
        gathered: Weights of ZeRO-3; each layer waits for its own.
    """

    updates: Traffic
    tokens: Traffic
    gathered: Traffic

    @property
    def all(self) -> Traffic:
        return self.updates + self.tokens + self.gathered


def estimate_communication(
    config: DenoiserConfig, spec: RunSpec, engine: EngineConfig, gpus_per_node: int
) -> Communication:
    """Of the collectives over weights, gradients and tokens; an all-reduce counts as a reduce-scatter and a gather.

    Stages 1 and 2 all-reduce gradients, stage 1 once a step and stage 2 in each micro-batch, and gather the updated
    weights once. Stage 3 gathers weights and reduce-scatters gradients in each micro-batch, and gathers again for the
    backward pass what it could not keep. Tokens go to the experts of the ranks that share them and back, forward and
    backward, and forward once more where blocks are computed again. Ranks that share experts are neighbours; those
    that host the same experts are as far apart.
    """
    count = count_parameters(config, spec.diffusion.absorbing)
    ranks, shared_by, value = engine.num_ranks, engine.expert_parallel_size, value_bytes(spec)
    held = HostedParameters.of(count, ranks, shared_by)
    passes_of_updates, passes_of_gathered = engine.micro_batches * 1.0, 0.0
    if engine.zero_stage == 3:
        kept = kept_gathered(held, engine) / held.gathered if held.gathered else 1.0
        passes_of_gathered = engine.micro_batches * (2 - kept)
    else:
        passes_of_updates = 1 + 2 * (engine.micro_batches if engine.zero_stage == 2 else 1)

    def over_all(passes: float) -> Traffic:
        shared = _around_a_ring(passes * held.shared * value, ranks, distance=1, gpus_per_node=gpus_per_node)
        experts = passes * held.experts * value
        return shared + _around_a_ring(experts, ranks // shared_by, distance=shared_by, gpus_per_node=gpus_per_node)

    exchanges = engine.micro_batches * (4 if spec.model.activation_checkpointing == "none" else 6)
    slots = spec.data.micro_batch_size * (spec.data.row_length + config.num_global)
    to_each = exchanges * config.num_layers * slots * config.top_k * config.hidden_dim * value / shared_by
    near = min(shared_by, gpus_per_node)
    tokens = Traffic(to_each * (near - 1), to_each * (shared_by - near))
    return Communication(over_all(passes_of_updates), tokens, over_all(passes_of_gathered))


def _around_a_ring(num_bytes: float, ranks: int, *, distance: int, gpus_per_node: int) -> Traffic:
    """A pass over so many bytes, in a ring of ranks `distance` apart that leaves each node once."""
    sent = num_bytes * (ranks - 1) / ranks
    in_a_node = max(1, gpus_per_node // distance)
    between = 0.0 if ranks <= in_a_node else sent / in_a_node
    return Traffic(sent - between, between)

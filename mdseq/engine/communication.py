"""What a rank sends in a step, by arithmetic on what DeepSpeed 0.19.8 asks of its collectives."""

from __future__ import annotations

from dataclasses import dataclass

from mdseq.engine.config import EngineConfig
from mdseq.engine.memory import HostedParameters, kept_gathered
from mdseq.model.cost import count_parameters, value_bytes
from mdseq.model.denoiser import DenoiserConfig
from mdseq.spec import RunSpec


@dataclass(frozen=True)
class Communication:
    """Bytes that a rank sends in a step.

    Attributes:
        within_nodes: In groups of ranks that fit in a node.
        between_nodes: In groups that do not, whichever way the bytes go.
    """

    within_nodes: int
    between_nodes: int

    @property
    def total(self) -> int:
        return self.within_nodes + self.between_nodes


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
    ranks, shared_by = engine.num_ranks, engine.expert_parallel_size
    held = HostedParameters.of(count, ranks, shared_by)
    value, micro_batches = value_bytes(spec), engine.micro_batches
    if engine.zero_stage == 3:
        again = 1 - kept_gathered(held, engine) / held.gathered if held.gathered else 0.0
        passes = micro_batches * (2 + again)
    else:
        passes = 1 + 2 * (micro_batches if engine.zero_stage == 2 else 1)
    shared = passes * held.shared * value * _others(ranks)
    experts = passes * held.experts * value * _others(ranks // shared_by)
    exchanges = 4 if spec.model.activation_checkpointing == "none" else 6
    slots = spec.data.micro_batch_size * (spec.data.row_length + config.num_global)
    of_layer = slots * config.top_k * config.hidden_dim * value * _others(shared_by)
    tokens = micro_batches * exchanges * config.num_layers * of_layer
    spans = ranks > gpus_per_node
    between = (shared + experts if spans else 0) + (tokens if shared_by > gpus_per_node else 0)
    return Communication(round(shared + experts + tokens - between), round(between))


def _others(ranks: int) -> float:
    """The share that is not a rank's own."""
    return (ranks - 1) / ranks

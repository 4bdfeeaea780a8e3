"""What a model costs, by arithmetic: parameters, attention and memory, before anything is built."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mdseq.model.denoiser import DenoiserConfig
from mdseq.sparse import Documents, Pattern
from mdseq.sparse.count import forward_flops, visible_pairs
from mdseq.spec import RunSpec


@dataclass(frozen=True)
class ParameterCount:
    """Weights of a model.

    Attributes:
        shared: All but the experts'.
        experts: Of all experts of all layers.
        active: That one token meets: the shared ones, and top_k experts a layer.
    """

    shared: int
    experts: int
    active: int

    @property
    def total(self) -> int:
        return self.shared + self.experts


def count_parameters(config: DenoiserConfig, absorbing: bool) -> ParameterCount:
    """Exact."""
    z, d, f = config.embedding_dim, config.hidden_dim, config.feedforward_dim
    embedding = config.vocab_size * z + config.vocab_size  # and the tokens' biases
    inputs = 2 * z if config.self_conditioning else z
    time = (z * 4 * z + 4 * z) + (4 * z * d + d)
    input_output = (inputs * d + d) + (d * d + d) + (d * d + d) + (d * z + z)
    shared = embedding + time + input_output + config.num_global * d + d + (z if absorbing else 0)
    shared += config.num_layers * (4 * d * d + 2 * d)  # attention and two norms
    swiglu = config.num_layers * 3 * d * f
    if not config.num_experts:
        return ParameterCount(shared + swiglu, 0, shared + swiglu)
    shared += config.num_layers * d * config.num_experts  # routers
    return ParameterCount(shared, swiglu * config.num_experts, shared + swiglu * config.top_k)


@dataclass(frozen=True)
class AttentionCost:
    """Attention over one row, forward, all layers, without the projections.

    Attributes:
        flops: Exact.
        of_dense: Share of what the same layers would cost without windows.
    """

    flops: int
    of_dense: float


def attention_cost(config: DenoiserConfig, row_length: int) -> AttentionCost:
    """Of a row that one document fills; shorter documents cost less."""
    layout = Documents.whole(torch.tensor([row_length]), row_length).layout(config.num_global)
    heads, head_dim = config.num_heads, config.hidden_dim // config.num_heads
    pairs = sum(int(visible_pairs(pattern, layout, heads)) for pattern in config.patterns)
    dense = config.num_layers * int(visible_pairs(Pattern(None), layout, heads))
    return AttentionCost(forward_flops(pairs, head_dim), pairs / dense)


def memory_per_rank(
    config: DenoiserConfig,
    spec: RunSpec,
    zero_stage: int,
    num_ranks: int,
    expert_parallel_size: int,
    offloads_optimiser: bool,
) -> dict[str, float]:
    """Estimated GiB on the device of one rank, by component.

    State is exact arithmetic. Activations count what the backward pass keeps for one micro-batch, with the kernels of a
    GPU (plain PyTorch keeps more): of each layer about 9 d per token for attention and norms, 3 f and d per token and
    chosen expert, or with activation checkpointing the d of its input, and one layer as above at a time; and about
    eight embeddings a token in fp32, from the noise to the scores. Logits of the vocabulary exist a chunk at a time,
    and are left out; so is what the process holds besides, such as libraries and buffers for communication.
    """
    parameters = count_parameters(config, spec.diffusion.absorbing)
    value_bytes = 2 if spec.optimiser.precision == "bf16" else 4
    share = 1 / num_ranks
    # Experts are spread over the ranks that share them; stages 1 to 3 shard what is left over the others.
    hosted = parameters.shared + parameters.experts / expert_parallel_size
    sharded = parameters.total * share
    tokens = spec.data.micro_batch_size * spec.data.row_length
    d, layers = config.hidden_dim, config.num_layers
    chosen = config.top_k if config.num_experts else 1
    per_token_layer = 9 * d + (3 * config.feedforward_dim + d) * chosen
    per_token = {
        "none": layers * per_token_layer,
        "recompute": layers * d + per_token_layer,
        "offload": min(layers, 2) * d + per_token_layer,  # one input in use, one being fetched
    }[spec.model.activation_checkpointing]
    parts = {
        "weights": (sharded if zero_stage == 3 else hosted) * value_bytes,
        "gradients": (sharded if zero_stage >= 2 else hosted) * value_bytes,
        "optimiser": 0.0 if offloads_optimiser else sharded * (8 + 4),  # two moments and the fp32 weights
        "average": 0.0 if offloads_optimiser else sharded * 4,
        "activations": tokens * (per_token * value_bytes + 8 * 4 * config.embedding_dim),
    }
    return {name: size / 2**30 for name, size in parts.items()}

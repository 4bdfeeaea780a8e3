"""What a model costs, by arithmetic: parameters, attention and activations, before anything is built.

Shapes: z embedding dimension, d hidden dimension, f inner dimension of a feed-forward layer, v vocabulary, s slots of a
row: global, then tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mdseq.kernels.softmax import CHUNK_LOGITS, CHUNK_LOGITS_ON_GPU
from mdseq.model.denoiser import DenoiserConfig
from mdseq.sparse import Documents, Pattern
from mdseq.sparse.count import forward_flops, visible_pairs
from mdseq.spec import RunSpec

ASSUMED_VOCAB_SIZE = 16_384  # where there is no dataset to ask


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


def activation_bytes(config: DenoiserConfig, spec: RunSpec, *, on_gpu: bool, spread_experts: bool = False) -> int:
    """What the backward pass keeps of one micro-batch on a rank's device, where documents fill their rows.

    It is counted from what each operation saves, so it differs between the kernels of a GPU and plain PyTorch on a CPU.
    A slot of a layer keeps, in values of the model's type:

        inputs and results of norms, projections, rotation and attention    9 d, on a CPU 10 d
        a dense SwiGLU                                                      d + 3 f, on a CPU 4 f
        an expert, for each of the top_k                                    d + 3 f, on a CPU d + 5 f
        an expert that is spread over ranks (AutoEP), for each              2 d + 3 f, on a CPU 2 d + 4 f

    With activation checkpointing it keeps its d inputs, or with "offload" those of two layers (one in use, one on its
    way), and one layer as above at a time. Besides, in fp32: some eight embeddings a token between noise and scores,
    and on a CPU what is before and after the blocks, 17 z + 5 d in all; three embeddings of each token of the
    vocabulary; and the logits of one chunk.

    Args:
        spread_experts: Whether experts are spread over ranks; a rank is taken to receive as many tokens as it sends.
    """
    z, d, f = config.embedding_dim, config.hidden_dim, config.feedforward_dim
    rows, length = spec.data.micro_batch_size, spec.data.row_length
    tokens, slots = rows * length, rows * (length + config.num_global)
    if not config.num_experts:
        feedforward = d + 3 * f if on_gpu else 4 * f
    elif spread_experts:
        feedforward = config.top_k * (2 * d + (3 if on_gpu else 4) * f)
    else:
        feedforward = config.top_k * (d + (3 if on_gpu else 5) * f)
    layer = (9 if on_gpu else 10) * d + feedforward
    of_slot = {
        "none": config.num_layers * layer,
        "recompute": config.num_layers * d + layer,
        "offload": (min(config.num_layers, 2) if on_gpu else config.num_layers) * d + layer,
    }[spec.model.activation_checkpointing]
    around = 8 * z if on_gpu else 17 * z + 5 * d
    chunk_logits = min(CHUNK_LOGITS_ON_GPU if on_gpu else CHUNK_LOGITS, tokens * config.vocab_size)
    in_fp32 = tokens * around + 3 * z * config.vocab_size + chunk_logits
    return slots * of_slot * value_bytes(spec) + in_fp32 * 4


def value_bytes(spec: RunSpec) -> int:
    """Of a weight, a gradient or an activation in the type that the model is trained in."""
    return 2 if spec.optimiser.precision == "bf16" else 4

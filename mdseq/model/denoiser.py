"""The denoiser f: from noisy embeddings and their noise level to clean embeddings (x0-prediction).

Shapes: b batch, l tokens in a row, v vocabulary, z embedding dimension, d hidden dimension, g learned global slots of a
document, s slots of a row: global, then tokens.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdseq.model.attention import SelfAttention
from mdseq.model.block import Block
from mdseq.model.dropout import Dropout
from mdseq.model.embedding import TimeEmbedding, rotary_angles
from mdseq.model.experts import DenseFeedForward, Experts, RoutedExperts
from mdseq.model.recompute import ActivationCheckpointing, block_caller
from mdseq.sparse import Documents, Layout, Pattern
from mdseq.sparse.schedule import layer_patterns
from mdseq.spec import RunSpec


@dataclass(frozen=True)
class DenoiserConfig:
    """All that the weights' shapes and the forward pass depend on."""

    vocab_size: int
    embedding_dim: int
    hidden_dim: int
    num_layers: int
    num_heads: int
    feedforward_dim: int
    post_norm: bool
    patterns: tuple[Pattern, ...]
    num_global: int
    num_source_global: int
    attention_engine: str
    num_experts: int
    top_k: int
    normalise_embeddings: bool
    self_conditioning: bool

    @classmethod
    def of(cls, spec: RunSpec, vocab_size: int) -> DenoiserConfig:
        model, attention, experts = spec.model, spec.attention, spec.experts
        sparse = attention.kind == "sparse"
        patterns = (Pattern(None),) * model.num_layers
        if sparse:
            schedule, full_every = attention.dilation_schedule, attention.full_every
            patterns = layer_patterns(model.num_layers, attention.window, attention.dilation, schedule, full_every)
        return cls(
            vocab_size=vocab_size,
            embedding_dim=model.embedding_dim,
            hidden_dim=model.hidden_dim,
            num_layers=model.num_layers,
            num_heads=model.num_heads,
            feedforward_dim=experts.feedforward_dim if experts.num_experts else model.feedforward_dim,
            post_norm=model.norm == "post",
            patterns=patterns,
            num_global=attention.num_global if sparse else 0,
            num_source_global=attention.num_source_global if sparse else 0,
            attention_engine=attention.engine,
            num_experts=experts.num_experts,
            top_k=experts.top_k,
            normalise_embeddings=spec.diffusion.normalise_embeddings,
            self_conditioning=spec.diffusion.self_conditioning > 0,
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DenoiserConfig:
        patterns = tuple(Pattern(layer["window"], tuple(layer["dilations"])) for layer in values["patterns"])
        return cls(**values | {"patterns": patterns})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Vocabulary:
    """What embeddings are scored against: the logits of x are x @ embedding_vz.T + bias_v. Both fp32."""

    embedding_vz: Tensor
    bias_v: Tensor


class TokenBias(nn.Module):
    """A learned bias of every token's logit, [v]."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self) -> Tensor:
        return self.bias.float().clone()  # a copy: ZeRO-3 frees the parameter itself when this call ends


class Denoiser(nn.Module):
    """Embeds tokens, denoises embeddings, and gives what embeddings are scored against, tied to the embedding.

    Every document of a row has `num_global` learned global slots of its own, which go through the layers beside the
    tokens and are dropped at the end. Its first `num_source_global` tokens, where they are source, are global too: to
    that end, the caller marks them.
    """

    def __init__(self, config: DenoiserConfig, activation_checkpointing: ActivationCheckpointing = "none") -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing: ActivationCheckpointing = activation_checkpointing
        d, recompute = config.hidden_dim, activation_checkpointing != "none"
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_dim)
        self.head = TokenBias(config.vocab_size)
        self.time = TimeEmbedding(config.embedding_dim, d)
        inputs = config.embedding_dim * (2 if config.self_conditioning else 1)
        self.input = nn.Sequential(nn.Linear(inputs, d), nn.Tanh(), nn.Linear(d, d))
        self.globals = nn.Embedding(config.num_global, d) if config.num_global else None
        self.blocks = nn.ModuleList(
            Block(
                d,
                SelfAttention(d, config.num_heads, pattern, config.attention_engine),
                RoutedExperts(d, config.feedforward_dim, config.num_experts, config.top_k, recompute=recompute)
                if config.num_experts
                else DenseFeedForward(d, config.feedforward_dim, recompute=recompute),
                post_norm=config.post_norm,
            )
            for pattern in config.patterns
        )
        self.norm = nn.RMSNorm(d, eps=1e-5)
        self.output = nn.Sequential(nn.Linear(d, d), nn.Tanh(), nn.Linear(d, config.embedding_dim))
        self._initialise()

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings in fp32, [..., z]; all of length sqrt(z) if the model normalises them (Difformer, 2212.09412)."""
        embedding = self.embedding(tokens).float()
        if self.config.normalise_embeddings:
            embedding = F.normalize(embedding, dim=-1) * self.config.embedding_dim**0.5
        return embedding

    def vocabulary(self) -> Vocabulary:
        """All embeddings and biases, whole even under ZeRO-3: a weight is so only inside its module's forward pass."""
        every_token = torch.arange(self.config.vocab_size, device=self.norm.weight.device)
        return Vocabulary(self.embed(every_token), self.head())

    def forward(
        self,
        z_blz: Tensor,
        time_bl: Tensor,
        documents: Documents,
        estimate_blz: Tensor | None = None,
        dropout: Dropout | None = None,
    ) -> Tensor:
        """Predict the clean embeddings.

        Args:
            z_blz: Noisy embeddings of target positions, clean ones of source positions.
            time_bl: Noise level in [0, 1000]; 0 where the embedding is clean.
            documents: What each row holds, source tokens marked.
            estimate_blz: For a model with self-conditioning, the clean embeddings as predicted before (Analog Bits,
                arXiv 2208.04202, section 3.2); zero where there is no prediction, as None is everywhere.
            dropout: Of what goes into the first block, and of what each sublayer adds; None for none.

        Returns:
            [b, l, z] in fp32.
        """
        config = self.config
        if config.self_conditioning:
            z_blz = torch.cat([z_blz, torch.zeros_like(z_blz) if estimate_blz is None else estimate_blz], dim=-1)
        call = block_caller(self.activation_checkpointing)
        x_bld = call(self._encode, z_blz, time_bl)
        layout = self.layout(documents)
        # Called, not read: under ZeRO-3 a weight is whole only inside its module's forward pass.
        global_gd = None if self.globals is None else self.globals(torch.arange(config.num_global, device=x_bld.device))
        x_bsd = layout.to_slots(x_bld, global_gd)
        angles = rotary_angles(layout.position_bs, config.hidden_dim // config.num_heads)
        if dropout is not None:
            x_bsd = dropout.add(None, x_bsd, layout)
        for index, block in enumerate(self.blocks):
            x_bsd = call(block, x_bsd, angles, layout, dropout and dropout.of_layer(index))
        return call(self._decode, x_bsd, layout)

    def _encode(self, z_blz: Tensor, time_bl: Tensor) -> Tensor:
        return self.input(z_blz.to(self.norm.weight.dtype)) + self.time(time_bl)

    def _decode(self, x_bsd: Tensor, layout: Layout) -> Tensor:
        return self.output(self.norm(layout.to_tokens(x_bsd))).float()

    def cast_layers(self, dtype: torch.dtype) -> None:
        """Compute in another type; embeddings, and what embeddings are scored against, stay in theirs."""
        for module in (self.time, self.input, self.globals, self.blocks, self.norm, self.output):
            if module is not None:
                module.to(dtype)

    def layout(self, documents: Documents) -> Layout:
        """The slots that the layers see."""
        return documents.layout(self.config.num_global)

    @torch.no_grad()
    def _initialise(self) -> None:
        """Embeddings N(0, 1) as in DiffuSeq; weights 1 / sqrt(fan-in), less where they add to the residual stream.

        The output is next to nothing: it favours no token before it has learned something.
        """
        residual = (2 * self.config.num_layers) ** -0.5
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, Experts):
                nn.init.normal_(module.gate_up_proj, std=module.gate_up_proj.shape[-1] ** -0.5)
                nn.init.normal_(module.down_proj, std=residual * module.down_proj.shape[-1] ** -0.5)
        for block in self.blocks:
            assert isinstance(block, Block)
            block.attention.output.weight.mul_(residual)
            if isinstance(block.feedforward, DenseFeedForward):
                block.feedforward.down.weight.mul_(residual)
        last = self.output[-1]
        assert isinstance(last, nn.Linear)
        last.weight.mul_(0.01)
        if self.globals is not None:
            nn.init.normal_(self.globals.weight, std=0.02)

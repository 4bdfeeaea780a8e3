"""Rows to fill, a model that makes up its mind, and what its denoiser is shown.

Shapes: b rows, l length, z embedding dimension, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mdseq.data.tokenizer import SpecialToken
from mdseq.diffusion.absorbing import Absorption
from mdseq.diffusion.denoising import DiffusionModel
from mdseq.diffusion.estimates import READINGS
from mdseq.diffusion.schedule import NoiseSchedule
from mdseq.generate.sampler import SOLVERS, SamplerOptions, Samples, sample
from mdseq.model.denoiser import Denoiser, DenoiserConfig
from mdseq.sparse import Documents
from mdseq.spec import load_spec

VOCAB, ROWS, LENGTH, DIM, T = 24, 8, 20, 8, 40
M = torch.linspace(-1, 1, DIM)
SCHEDULE = NoiseSchedule("sqrt", T)
ALL = list(range(ROWS))
WITHOUT_TARGET = 5


class Settling(Denoiser):
    """A denoiser that makes up its mind, as trained ones do and random weights do not.

    The best estimate if tokens were independent, with the random network's output for their prior.
    """

    def forward(
        self, z_blz: Tensor, time_bl: Tensor, documents: Documents, estimate_blz: Tensor | None = None
    ) -> Tensor:
        prior_blz = super().forward(z_blz, time_bl, documents, estimate_blz)
        alpha_bl, sigma_bl = SCHEDULE.alpha_sigma((time_bl * T / 1000).clamp(max=T - 1))
        m_z = M.to(z_blz.device)
        words_vz = self.embedding.weight - m_z
        logits_blv = (z_blz - m_z) @ words_vz.T - alpha_bl[..., None] * words_vz.square().sum(dim=1) / 2
        logits_blv = logits_blv * (alpha_bl / sigma_bl**2)[..., None] + 2 * prior_blz @ words_vz.T
        return logits_blv.softmax(dim=-1) @ self.embedding.weight


def model_of(*overrides: str) -> DiffusionModel:
    """Every token meets all experts: where it is sent to some, a rounding error may send it to others."""
    tiny = [
        "model.embedding_dim=8", "model.hidden_dim=16", "model.num_layers=2", "model.num_heads=2",
        "attention.window=3", "attention.num_global=2", "experts.num_experts=4", "experts.top_k=4",
        "experts.feedforward_dim=8", "diffusion.normalise_embeddings=false",
    ]  # fmt: skip
    torch.manual_seed(0)
    denoiser = Settling(DenoiserConfig.of(load_spec(None, [*tiny, *overrides]).spec, VOCAB)).eval()
    with torch.no_grad():
        denoiser.embedding.weight.mul_(2)
        denoiser.output[-1].weight.mul_(100)  # nothing is learned, but something is said
        denoiser.head.bias.copy_(-denoiser.embedding.weight.square().sum(dim=1) / 2)  # the likeliest is the nearest
    return DiffusionModel(denoiser, M, SCHEDULE, Absorption(0.5), reading="output")


def unsure(model: DiffusionModel) -> DiffusionModel:
    """The same with words that are hard to tell apart: no two are so likely that rounding decides which is likelier."""
    denoiser = deepcopy(model.denoiser)
    with torch.no_grad():
        denoiser.embedding.weight.mul_(0.25)
        denoiser.head.bias.mul_(0.25**2)
    return replace(model, denoiser=denoiser)


def some_rows() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets and lengths: sources of 1 to 8 tokens, then targets up to lengths of 13 to 20; one has none."""
    generator = torch.Generator().manual_seed(0)
    tokens_bl = torch.randint(5, VOCAB, (ROWS, LENGTH), generator=generator)
    tokens_bl[:, 0] = SpecialToken.BOS
    length_b = 13 + torch.arange(ROWS)
    position_l = torch.arange(LENGTH)
    target_bl = (position_l > torch.arange(ROWS)[:, None]) & (position_l < length_b[:, None])
    target_bl[WITHOUT_TARGET] = False
    return tokens_bl, target_bl, length_b


def generate(
    model: DiffusionModel, index: Sequence[int] = ALL, row_length: int = LENGTH, observe=None, **options
) -> Samples:
    """Sample some of the rows as one batch, where the model is."""
    device = model.m_z.device
    tokens_bl, target_bl, length_b = (x[list(index)].to(device) for x in some_rows())
    pad = row_length - LENGTH
    return sample(
        model,
        torch.nn.functional.pad(tokens_bl, (0, pad)),
        torch.nn.functional.pad(target_bl, (0, pad)),
        Documents.whole(length_b, row_length),
        torch.tensor(index, device=device),
        SamplerOptions(**({"num_calls": 6} | options)),
        observe,
    )


class Shown:
    """Remembers what a denoiser is shown while it is open."""

    def __init__(self, model: DiffusionModel) -> None:
        self.calls: list[tuple[Tensor, Tensor, Documents, Tensor | None]] = []
        self.outputs: list[Tensor] = []
        self.hooks = [
            model.denoiser.register_forward_pre_hook(lambda _, args: self.calls.append(args)),
            model.denoiser.register_forward_hook(lambda _, __, out: self.outputs.append(out)),
        ]

    def __enter__(self) -> Shown:
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()


def slow_read(model: DiffusionModel, f_blz: Tensor, z_blz: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """An output by the definition of its reading: the estimate [b, l, z], and the logits of its tokens [b, l, v]."""
    words = model.denoiser.vocabulary()
    logits_blv = f_blz @ words.embedding_vz.T + words.bias_v
    if model.reading == "posterior":
        level = model.schedule.levels([t])[0]
        mean_vz = level.alpha * (words.embedding_vz - M).double() + M
        noisy = torch.distributions.Normal(mean_vz, level.sigma)
        absorbed_bl1 = (z_blz == M).all(dim=-1, keepdim=True)
        evidence_blv = noisy.log_prob(z_blz[..., None, :].double()).sum(dim=-1).masked_fill(absorbed_bl1, 0.0)
        logits_blv = logits_blv + evidence_blv
    mean_blz = logits_blv.softmax(dim=-1).float() @ words.embedding_vz
    return (f_blz if model.reading == "output" else mean_blz), logits_blv


every_reading = pytest.mark.parametrize("reading", READINGS)
every_solver = pytest.mark.parametrize("solver", SOLVERS)

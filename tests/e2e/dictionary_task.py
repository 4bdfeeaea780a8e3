"""A task with a known answer: the target is the source, word by word through one of two dictionaries.

Both translations of a source are right, a mixture of them is not. So a model must read the source, and its sampler must
carry what it has settled on from step to step: the mean of the two, which a single step would give, is no answer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mdseq.data.batch import Batch, StepTotals
from mdseq.data.tokenizer import SpecialToken
from mdseq.diffusion.objective import DiffusionObjective
from mdseq.generate.sampler import SamplerOptions, sample
from mdseq.sparse import Documents
from mdseq.spec import RunSpec, load_spec

FIRST = len(SpecialToken)
SOURCE_WORDS = 32
VOCAB = FIRST + 3 * SOURCE_WORDS
LENGTH = 8
ROW = 2 * LENGTH + 3


def dictionaries() -> Tensor:
    """Two translations of every source word into words of their own, [2, SOURCE_WORDS]."""
    generator = torch.Generator().manual_seed(1)
    orders = torch.stack([torch.randperm(SOURCE_WORDS, generator=generator) for _ in range(2)])
    return orders + FIRST + SOURCE_WORDS * torch.tensor([[1], [2]])


def batch_of(step: int, rows: int) -> Batch:
    """Rows `BOS source SEP target EOS` that no other step has."""
    generator = torch.Generator().manual_seed(1000 + step)
    source = torch.randint(SOURCE_WORDS, (rows, LENGTH), generator=generator)
    bos, sep, eos = (torch.full((rows, 1), token) for token in (SpecialToken.BOS, SpecialToken.SEP, SpecialToken.EOS))
    chosen = torch.randint(2, (rows, 1), generator=generator)
    tokens = torch.cat([bos, FIRST + source, sep, dictionaries()[chosen, source], eos], dim=1)
    target = torch.zeros(rows, ROW, dtype=torch.bool)
    target[:, LENGTH + 2 :] = True
    source_length = torch.full((rows,), LENGTH + 2)
    documents = Documents.whole(torch.full((rows,), ROW), ROW, source_length)
    return Batch(
        tokens_bl=tokens,
        document_bl=documents.document_bl,
        position_bl=documents.position_bl,
        target_bl=target,
        row_b=torch.arange(rows) + step * rows,
        first_document_b=torch.arange(rows),
        source_length_bm=source_length[:, None],
        num_documents=1,
        step=step,
        totals=StepTotals(
            rows=rows, tokens=rows * ROW, target_tokens=int(target.sum()), documents=rows, micro_batches=1
        ),
    )


def train(spec: RunSpec, steps: int, m_norm: float, rows: int = 64) -> DiffusionObjective:
    """Train in plain PyTorch, from an absorbing state of the given length."""
    torch.manual_seed(spec.seed)
    objective = DiffusionObjective(spec, VOCAB)
    with torch.no_grad():
        objective.absorbing.m.mul_(m_norm / objective.absorbing.m.norm())
    peak = spec.optimiser.learning_rate
    optimiser = torch.optim.AdamW(objective.parameters(), lr=peak, weight_decay=0.0)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = peak * min(1.0, (step + 1) / 20, (steps - step) / (0.3 * steps))
        loss = objective(batch_of(step, rows))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimiser.step()
        objective.timesteps.end_step()
        objective.balance.end_step()
    return objective.eval()


def learned_objective() -> DiffusionObjective:
    """A model of two layers after 1000 steps of squared error, about two minutes.

    Its absorbing state starts, and is left, far from zero, so that ignoring it shows.
    """
    spec = load_spec(
        None,
        [
            "model.embedding_dim=32", "model.hidden_dim=128", "model.num_layers=2", "model.num_heads=4",
            "attention.window=24", "attention.num_global=2", "experts.num_experts=4", "experts.feedforward_dim=128",
            "diffusion.objective=target", "diffusion.estimate=output", "diffusion.denoising_weight=1",
            "diffusion.anchor_weight=0", "diffusion.rounding_weight=1", "diffusion.normalise_embeddings=false",
            "diffusion.noise_factor=1", "diffusion.self_conditioning=0", "diffusion.absorbing_weight=0",
            "optimiser.learning_rate=2e-3",
        ],
    ).spec  # fmt: skip
    return train(spec, steps=1000, m_norm=100.0)


class Accuracy(NamedTuple):
    """Share of exact tokens, and denoiser calls made for a row on average."""

    share: float
    calls: float


def accuracy(objective: DiffusionObjective, **changes: Any) -> Accuracy:
    """On held-out sources, by the better of the two dictionaries for each; `changes` replace arguments of `sample`."""
    batch = batch_of(step=10**6, rows=256)
    arguments = {
        "model": objective.model(),
        "tokens_bl": torch.where(batch.target_bl, SpecialToken.PAD, batch.tokens_bl),
        "target_bl": batch.target_bl,
        "documents": batch.documents(),
        "sample_b": batch.row_b,
        "options": SamplerOptions(),
    }
    samples = sample(**(arguments | changes))
    answer = dictionaries()[:, batch.tokens_bl[:, 1 : LENGTH + 1] - FIRST]
    exact = samples.tokens_bl[:, LENGTH + 2 : -1] == answer
    return Accuracy(exact.float().mean(dim=-1).amax(dim=0).mean().item(), samples.calls_b.float().mean().item())

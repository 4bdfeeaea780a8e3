"""A task with a known answer: the target is the source, word by word through one of two dictionaries.

Both translations of a source are right, a mixture of them is not. So a model must read the source, and its sampler must
carry what it has settled on from step to step: the mean of the two, which a single step would give, is no answer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mdseq.data.batch import Batch, StepTotals
from mdseq.data.tokenizer import SpecialToken
from mdseq.diffusion.objective import DiffusionObjective
from mdseq.generate.sampler import SamplerOptions, sample
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
    return Batch(
        tokens_bl=tokens,
        document_bl=torch.zeros(rows, ROW, dtype=torch.long),
        position_bl=torch.arange(ROW).expand(rows, ROW),
        target_bl=target,
        row_b=torch.arange(rows) + step * rows,
        first_document_b=torch.arange(rows),
        source_length_bm=torch.full((rows, 1), LENGTH + 2),
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
    """A model of two layers after 1000 steps, about two minutes.

    Its absorbing state starts, and is left, far from zero, so that ignoring it shows.
    """
    spec = load_spec(
        None,
        [
            "model.embedding_dim=32", "model.hidden_dim=128", "model.num_layers=2", "model.num_heads=4",
            "attention.window=24", "attention.num_global=2", "experts.num_experts=4", "experts.feedforward_dim=128",
            "diffusion.absorbing_weight=0.0", "optimiser.learning_rate=2e-3",
        ],
    ).spec  # fmt: skip
    return train(spec, steps=1000, m_norm=100.0)


def accuracy(objective: DiffusionObjective, num_steps: int = 20, **changes: Any) -> float:
    """Share of exact tokens on held-out sources, by the better of the two dictionaries for each.

    `changes` replace arguments of the sampler.
    """
    batch = batch_of(step=10**6, rows=256)
    arguments = {
        "model": objective.model(),
        "tokens_bl": torch.where(batch.target_bl, SpecialToken.PAD, batch.tokens_bl),
        "target_bl": batch.target_bl,
        "documents": batch.documents(),
        "sample_b": batch.row_b,
        "options": SamplerOptions(num_steps),
    }
    generated = sample(**(arguments | changes)).tokens_bl
    answer = dictionaries()[:, batch.tokens_bl[:, 1 : LENGTH + 1] - FIRST]
    return (generated[:, LENGTH + 2 : -1] == answer).float().mean(dim=-1).amax(dim=0).mean().item()

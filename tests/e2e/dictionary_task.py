"""A task with a known answer: the target is the source, word by word through a fixed dictionary."""

from __future__ import annotations

import torch
from torch import Tensor

from mdseq.data.batch import Batch, StepTotals
from mdseq.data.tokenizer import SpecialToken
from mdseq.diffusion.objective import DiffusionObjective
from mdseq.generate.sampler import SamplerOptions, sample
from mdseq.spec import RunSpec

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
        num_documents=1,
        step=step,
        totals=StepTotals(
            rows=rows, tokens=rows * ROW, target_tokens=int(target.sum()), documents=rows, micro_batches=1
        ),
    )


def train(spec: RunSpec, steps: int, rows: int = 64, m_scale: float = 1.0) -> DiffusionObjective:
    """Train in plain PyTorch; `m_scale` moves the initial absorbing state away from zero."""
    torch.manual_seed(spec.seed)
    objective = DiffusionObjective(spec, VOCAB)
    with torch.no_grad():
        objective.absorbing.m.mul_(m_scale)
    optimiser = torch.optim.AdamW(objective.parameters(), lr=spec.optimiser.learning_rate, weight_decay=0.0)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = spec.optimiser.learning_rate * min(1.0, (steps - step) / (0.3 * steps), (step + 1) / 20)
        loss = objective(batch_of(step, rows))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimiser.step()
        objective.timesteps.end_step()
        if objective.balance is not None:
            objective.balance.end_step()
        if step % 50 == 49:
            print(step, {k: round(v, 3) for k, v in objective.statistics.take().items()})
    return objective


def accuracy(objective: DiffusionObjective, steps: int = 20, rows: int = 64, **changes) -> float:
    """Share of exact target tokens on held-out sources; `changes` replace arguments of the sampler."""
    batch = batch_of(10**6, rows)
    objective.eval()
    arguments = {
        "m_z": objective.absorbing().detach(),
        "schedule": objective.schedule,
        "tokens_bl": torch.where(batch.target_bl, SpecialToken.PAD, batch.tokens_bl),
        "target_bl": batch.target_bl,
        "documents": batch.documents,
        "sample_b": batch.row_b,
        "options": SamplerOptions(num_steps=steps),
    }
    generated = sample(objective.denoiser, **(arguments | changes))
    objective.train()
    answer = dictionaries()[:, batch.tokens_bl[:, 1 : LENGTH + 1] - FIRST]
    return (generated[:, LENGTH + 2 : -1] == answer).float().mean(dim=-1).amax(dim=0).mean().item()

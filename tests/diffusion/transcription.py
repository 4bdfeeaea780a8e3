"""The training losses as their papers write them: NumPy and float64, one position at a time.

Only the weights, the random numbers and the denoiser's last output f are taken from the objective.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch

from mdseq.data.batch import Batch
from mdseq.diffusion.objective import DiffusionObjective
from mdseq.diffusion.timesteps import HISTORY
from mdseq.noise import NoiseKey, Purpose

Array = np.ndarray


@dataclass(frozen=True)
class Position:
    """What one position is, by the equations.

    Attributes:
        z_t: What the denoiser is shown.
        time: What it is told.
        weight: Importance weight of its document's timestep; 0 where the position does not count.
        terms: The loss, term by term, each with weight 1.
    """

    z_t: Array
    time: float
    weight: float
    terms: dict[str, float]


def make_importance_uneven(objective: DiffusionObjective) -> None:
    """Give the timestep sampler a full history, so that draws have weights of their own."""
    generator = torch.Generator().manual_seed(5)
    history_th = torch.rand(objective.schedule.num_timesteps, HISTORY, generator=generator) * 4 + 0.1
    objective.timesteps.load_state_dict(
        {"squared_loss_th": history_th, "num_seen_t": torch.full((len(history_th),), float(HISTORY))}
    )


class Transcription(ABC):
    """What the two objectives share: the process, the random numbers, the timestep of each document."""

    def __init__(self, objective: DiffusionObjective, batch: Batch, f_blz: torch.Tensor) -> None:
        self.spec = objective.spec.diffusion
        self.T = self.spec.num_timesteps
        self.embedding = objective.denoiser.embedding.weight.detach().double().numpy()
        if self.spec.normalise_embeddings:
            lengths = np.linalg.norm(self.embedding, axis=1, keepdims=True)
            self.embedding = self.embedding / lengths * np.sqrt(self.embedding.shape[1])
        self.bias = objective.denoiser.head.bias.detach().double().numpy()
        self.m = objective.absorbing().detach().double().numpy()
        self.gamma = self.spec.gamma if self.spec.absorbing else 0.0
        self.uniform_shares = self.spec.absorbing_schedule == "uniform"
        self.f = f_blz.double().numpy()

        # DiffuSeq's "sqrt" schedule; the noise so many times as strong, then all of it scaled to the old variance.
        signal = 1 - np.sqrt(np.arange(self.T + 1) / self.T + 1e-4)
        abar = np.cumprod(1 - np.minimum(1 - signal[1:] / signal[:-1], 0.999))
        noise = self.spec.noise_factor**2 * (1 - abar)
        self.abar = abar / (abar + noise)
        self.stretch = 1.0
        if self.spec.min_signal:  # as far as the signal has fallen to that, at equal steps in t
            log_snr = np.log(self.abar / (1 - self.abar)) / 2
            least = np.log(self.spec.min_signal**2 / (1 - self.spec.min_signal**2)) / 2
            end = np.interp(-least, -log_snr, np.arange(self.T))
            self.stretch = (self.T - 1) / end
            log_snr = np.interp(np.linspace(0, end, self.T), np.arange(self.T), log_snr)
            self.abar = 1 / (1 + np.exp(-2 * log_snr))

        key = NoiseKey(objective.spec.seed, batch.step, batch.row_b)
        length, dim = batch.tokens_bl.shape[1], self.embedding.shape[1]
        self.embedding_noise = key.normal(Purpose.EMBEDDING, length, dim).double().numpy()
        self.epsilon = key.normal(Purpose.DIFFUSION, length, dim).double().numpy()
        self.uniform = key.uniform(Purpose.ABSORBING, length).double().numpy()
        self.share = key.uniform(Purpose.SHARE, batch.num_documents).double().numpy()
        self.dropped = key.uniform(Purpose.CONDITION, batch.num_documents).numpy() <= self.spec.condition_dropout
        self.token_dropped = key.uniform(Purpose.SOURCE, length).numpy() <= self.spec.source_dropout
        self.tokens, self.target = batch.tokens_bl.numpy(), batch.target_bl.numpy()
        self.document = batch.document_bl.numpy()
        if self.spec.stratified:
            t, weight = objective.timesteps.draw(
                key, batch.num_documents, batch.first_document_b, batch.totals.documents
            )
            self.t, self.weight = t.numpy(), weight.double().numpy()
        else:
            uniform = key.uniform(Purpose.TIMESTEP, batch.num_documents).double().numpy()
            self.t, self.weight = self.timesteps(objective, uniform)

    def timesteps(self, objective: DiffusionObjective, uniform: Array) -> tuple[Array, Array]:
        """LossSecondMomentResampler: p_t ~ sqrt(mean loss^2), mixed with 0.001 of uniform; weights 1 / (T p_t)."""
        probability = np.full(self.T, 1 / self.T)
        if (objective.timesteps.num_seen_t == HISTORY).all():
            importance = np.sqrt(objective.timesteps.squared_loss_th.double().numpy().mean(axis=1))
            probability = 0.999 * importance / importance.sum() + 0.001 / self.T
        end = np.cumsum(probability)
        t = np.searchsorted(end, uniform)
        weight = 1 / (self.T * probability[t])
        if self.spec.continuous_time:  # as far into the bin as the number is into its probability
            share = (uniform - (end - probability)[t]) / probability[t]
            return (t + share) * (self.T - 1) / self.T, weight
        return t, weight

    def alpha_sigma(self, t: float) -> tuple[float, float]:
        """Between timesteps, log(alpha / sigma) is linear."""
        log_snr = np.interp(t, np.arange(self.T), np.log(self.abar / (1 - self.abar)) / 2)
        return np.sqrt(1 / (1 + np.exp(-2 * log_snr))), np.sqrt(1 / (1 + np.exp(2 * log_snr)))

    def noised(self, b: int, i: int, z_0: Array) -> tuple[Array, float]:
        """z_t and time of a position that is denoised."""
        t = self.t[b, self.owner(b, i)]
        alpha, sigma = self.alpha_sigma(t)
        z_t = alpha * (z_0 - self.m) + sigma * self.epsilon[b, i] + self.m
        return self.m if self.replaced(b, i) else z_t, t / self.stretch * 1000 / self.T

    def replaced(self, b: int, i: int) -> bool:
        owner = self.owner(b, i)
        share = self.share[b, owner] if self.uniform_shares else self.alpha_sigma(self.t[b, owner])[1]
        return bool(self.uniform[b, i] <= self.gamma * share)

    def owner(self, b: int, i: int) -> int:
        """Padding goes with the row's first document."""
        return max(self.document[b, i], 0)

    def cross_entropy(self, logits: Array, token: int) -> float:
        return np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[token]

    @abstractmethod
    def position(self, b: int, i: int) -> Position:
        """What stands at a position, and what it loses."""

    def loss(self, terms: dict[str, float]) -> float:
        """The sum of the terms, each with its weight."""
        weights = {name: getattr(self.spec, f"{name}_weight", 1.0) for name in terms}
        return sum(weights[name] * terms[name] for name in terms)

    def terms(self) -> dict[str, float]:
        """Each term's weighted mean over the positions that count."""
        positions = [self.position(b, i) for b, i in np.ndindex(*self.tokens.shape)]
        counted = [position for position in positions if position.weight]
        return {
            name: sum(position.weight * position.terms[name] for position in counted) / len(counted)
            for name in counted[0].terms
        }


class Published(Transcription):
    """DiffuSeq's `training_losses_seq2seq` (method.md 3.3 and 3.4), with the absorbing state of 1.4."""

    def position(self, b: int, i: int) -> Position:
        word, token = self.embedding[self.tokens[b, i]], self.tokens[b, i]
        x_start = word + np.sqrt(1 - self.abar[0]) * self.embedding_noise[b, i]
        input_mask = self.target[b, i] or self.document[b, i] < 0
        z_t, time = self.noised(b, i, x_start) if input_mask else (x_start, 0.0)
        goal = word if self.t[b, self.owner(b, i)] == 0 else x_start
        terms = {
            "denoising": np.mean((goal - self.f[b, i]) ** 2),
            "prior": np.mean((np.sqrt(self.abar[-1]) * (x_start - self.m)) ** 2),  # tT, about u = z - m
            "rounding": self.cross_entropy(self.embedding @ x_start + self.bias, token),  # decoder_nll
        }
        return Position(z_t, time, self.weight[b, self.owner(b, i)], terms)


class Target(Transcription):
    """The objective "target": z_0 = e, over target positions only."""

    def position(self, b: int, i: int) -> Position:
        word, token, owner = self.embedding[self.tokens[b, i]], self.tokens[b, i], self.owner(b, i)
        if not self.target[b, i]:
            dropped = self.document[b, i] >= 0 and (self.dropped[b, owner] or self.token_dropped[b, i])
            return Position(self.m, 2000.0, 0, {}) if dropped else Position(word, 0.0, 0, {})
        z_t, time = self.noised(b, i, word)
        alpha, sigma = self.alpha_sigma(self.t[b, owner])
        strength = min(alpha**2 / sigma**2, self.spec.snr_cap) if self.spec.snr_cap else 1.0
        rounded = word + np.sqrt(1 - self.abar[0]) * self.embedding_noise[b, i]
        anchor = self.embedding @ self.f[b, i] + self.bias
        if self.spec.estimate == "posterior" and not self.replaced(b, i):
            means = alpha * (self.embedding - self.m) + self.m
            anchor = anchor - ((z_t - means) ** 2).sum(axis=1) / (2 * sigma**2)
        terms = {
            "denoising": strength * np.mean((word - self.f[b, i]) ** 2),
            "prior": 0.0 if self.spec.min_signal else np.mean((np.sqrt(self.abar[-1]) * (word - self.m)) ** 2),
            "rounding": self.cross_entropy(self.embedding @ rounded + self.bias, token),
            "anchor": self.cross_entropy(anchor, token),
        }
        return Position(z_t, time, self.weight[b, owner], terms)

"""Fill the target positions of rows by solving the reverse process.

Shapes: b batch, l length, z embedding dimension, n rows that still need the denoiser.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from mdseq.diffusion.denoising import DiffusionModel, GivenRows
from mdseq.diffusion.rounding import likeliest_tokens, nearest_tokens
from mdseq.diffusion.schedule import NoiseLevel
from mdseq.diffusion.solvers import SOLVERS as REVERSE_SOLVERS
from mdseq.diffusion.solvers import ReverseProcess
from mdseq.diffusion.time_grids import TIME_GRIDS, time_grid
from mdseq.errors import UserError
from mdseq.noise import NoiseKey, Purpose
from mdseq.sparse import Documents

MASK_PREDICT = "mask_predict"
SOLVERS = (*REVERSE_SOLVERS, MASK_PREDICT)


def usual_solver(model: DiffusionModel) -> str:
    """What suits the process that a model was trained on."""
    return MASK_PREDICT if model.absorbs else "dpm_2m"


@dataclass(frozen=True)
class SamplerOptions:
    """How to solve.

    Attributes:
        num_calls: Denoiser calls; at t = T - 1 the first, at t = 0 the last, whose estimate is the result.
        solver: A key of `mdseq.diffusion.solvers.SOLVERS`, or "mask_predict": see `_mask_predict`.
        time_grid: A key of `mdseq.diffusion.time_grids.TIME_GRIDS`: where between T - 1 and 0 the calls are spent.
        seed: Key of all noise, below 2**32.
        temperature: Factor of all noise that is drawn, at the start and in the steps of stochastic solvers. 1 is what
            was trained; less gives likelier texts that are more alike, and 0 always the same one, but for `absorb`.
        guidance: Weight w of the source: the denoiser's output is f' + w (f - f'), with f' that without source
            (classifier-free guidance, arXiv 2207.12598); 1 for none. Costs a second pass of the denoiser in each call.
        clamp: Replace every estimate by its nearest embedding (DiffuSeq's clamping trick).
        threshold: Quantile of the size of an estimate's values; what exceeds it is cut, and the rest scaled down, so
            that none exceeds the largest of all embeddings (dynamic thresholding, Imagen, arXiv 2205.11487, section
            2.3); 1 for none.
        absorb: Apply the discrete part of the soft absorbing state while sampling: after each step but the last, a
            target token is m with the probability that it was in training.
        patience: Calls for which all tokens of a row must stay the same until the row is done; 0 to make all calls.
        confidence: Probability that each of those tokens must have as well. On a fine time grid tokens stay the same
            long before they are settled, since neighbouring calls hardly differ.

    Raises:
        UserError: If a value is not allowed.
    """

    num_calls: int = 20
    solver: str = "dpm_2m"
    time_grid: str = "uniform"
    seed: int = 0
    temperature: float = 1.0
    guidance: float = 1.0
    clamp: bool = False
    threshold: float = 1.0
    absorb: bool = False
    patience: int = 0
    confidence: float = 0.0

    def __post_init__(self) -> None:
        for name, allowed, fits in (
            ("num_calls", "1 or more denoiser calls", self.num_calls >= 1),
            ("solver", f"one of {', '.join(SOLVERS)}", self.solver in SOLVERS),
            ("time_grid", f"one of {', '.join(TIME_GRIDS)}", self.time_grid in TIME_GRIDS),
            ("seed", "0 to 4294967295", 0 <= self.seed < 2**32),
            ("temperature", "a finite number of at least 0; 1 is as trained", 0 <= self.temperature < math.inf),
            ("guidance", "a finite number of at least 0; 1 is no guidance", 0 <= self.guidance < math.inf),
            ("threshold", "more than 0 and at most 1, such as 0.995; 1 is no threshold", 0 < self.threshold <= 1),
            ("patience", "0 or more calls; 0 makes them all", self.patience >= 0),
            ("confidence", "a probability, 0 to 1", 0 <= self.confidence <= 1),
        ):
            if not fits:
                raise UserError(f"the sampler's {name} = {getattr(self, name)} is not allowed; give {allowed}")
        if self.solver == MASK_PREDICT and self.absorb:
            raise UserError(
                "the sampler's absorb = True does not go with solver = mask_predict, which chooses what is absorbed "
                "itself; leave absorb out"
            )
        if self.confidence and not self.patience:
            raise UserError(
                f"the sampler's confidence = {self.confidence} ends no text early without a patience; "
                "give a patience of 1 or more calls"
            )


@dataclass(frozen=True)
class Estimate:
    """What the sampler holds true at one denoiser call.

    Attributes:
        call: Counted from 0.
        timestep: Of the call.
        tokens_bl: The likeliest token of each position; given tokens where nothing is generated.
        confidence_bl: Its probability; 1 for given tokens.
    """

    call: int
    timestep: float
    tokens_bl: Tensor
    confidence_bl: Tensor


@dataclass(frozen=True)
class Samples:
    """What was generated.

    Attributes:
        tokens_bl: int64; given tokens where nothing was to be generated.
        calls_b: Denoiser calls made for each row.
    """

    tokens_bl: Tensor
    calls_b: Tensor


@torch.no_grad()
def sample(
    model: DiffusionModel,
    tokens_bl: Tensor,
    target_bl: Tensor,
    documents: Documents,
    sample_b: Tensor,
    options: SamplerOptions,
    observe: Callable[[Estimate], None] | None = None,
) -> Samples:
    """Generate tokens wherever `target_bl` is True.

    Args:
        model: Trained weights and their process.
        tokens_bl: Given tokens; what stands at target positions is ignored.
        target_bl: Positions to fill.
        documents: What each row holds.
        sample_b: Id of each row's noise: with the seed, it fixes the result, whatever else is in the batch.
        options: Solver, calls, seed.
        observe: Called with the state of each call, until no row needs another.

    Raises:
        UserError: The solver is mask_predict, and the model has no absorbing state; or it is another, and the model has
            not been trained on noise alone, which it begins with.
    """
    if options.solver == MASK_PREDICT and not model.absorption.gamma:
        raise UserError(
            "solver mask_predict begins with every token absorbed, which this model has not been trained on; use "
            "another solver, or train with diffusion.absorbing = true and a diffusion.gamma above 0"
        )
    if options.solver != MASK_PREDICT and model.schedule.min_signal:
        raise UserError(
            f"solver {options.solver} begins with noise alone, which this model has not been trained on "
            f"(diffusion.min_signal = {model.schedule.min_signal}); use mask_predict"
        )
    levels = model.schedule.levels(time_grid(options.time_grid, model.schedule, options.num_calls))
    rows = GivenRows.of(model, tokens_bl, target_bl, documents)
    denoised = _Denoised(rows, tokens_bl, options, observe)
    keys = {level: NoiseKey(options.seed, index, sample_b) for index, level in enumerate(levels)}
    length, dim = rows.source_blz.shape[1:]

    def draw_normal(level: NoiseLevel) -> Tensor:
        return options.temperature * keys[level].normal(Purpose.SAMPLING, length, dim)

    def absorb(u_blz: Tensor, level: NoiseLevel) -> Tensor:
        if not options.absorb or level is levels[-1]:
            return u_blz
        probability = model.absorption.probability(level.timestep / model.schedule.last, level.sigma)
        absorbed_bl = keys[level].uniform(Purpose.RESAMPLING, length) <= probability
        return torch.where(absorbed_bl[..., None], 0.0, u_blz)  # z = m

    start_blz = options.temperature * keys[levels[0]].normal(Purpose.STARTING, length, dim)
    # What solvers return is the newest estimate, which is kept.
    if options.solver == MASK_PREDICT:
        _mask_predict(levels, denoised, draw_normal)
    else:
        REVERSE_SOLVERS[options.solver](ReverseProcess(levels, denoised.predict, draw_normal, absorb), start_blz)
    return Samples(denoised.tokens(), denoised.calls_b)


def _mask_predict(
    levels: Sequence[NoiseLevel], denoised: _Denoised, draw_normal: Callable[[NoiseLevel], Tensor]
) -> None:
    """Guess all tokens, keep those that are likeliest, and guess the others again in their sight.

    Between calls at t and s, the likeliest tokens go through the forward process anew, to q(z_s | tokens), and those
    of them with the least probability are absorbed, z = m: at first all, and after n of N calls a share of 1 - n / N.
    So a token's first guess does not become the evidence for its second; for the same reason, the probability of one
    that is not absorbed stays what it was when it last was. This is Mask-Predict (Ghazvininejad et al., arXiv
    1904.09324), with the soft absorbing state for its mask.
    """
    u_blz = torch.zeros_like(denoised.x_blz)
    confidence_bl = torch.zeros_like(denoised.confidence_bl)
    kept_bl = torch.zeros_like(confidence_bl, dtype=torch.bool)
    for calls, (t, s) in enumerate(pairwise(levels), start=1):
        denoised.predict(u_blz, t)
        confidence_bl = torch.where(kept_bl, confidence_bl, denoised.confidence_bl)
        kept_bl, u_0 = denoised.likeliest(confidence_bl, calls, len(levels))
        u_blz = torch.where(kept_bl[..., None], s.alpha * u_0 + s.sigma * draw_normal(s), 0.0)
    denoised.predict(u_blz, levels[-1])


class _Denoised:
    """The newest estimate of every row, and the denoiser as solvers call it: only for the rows that still need it.

    Attributes:
        all_rows: All of the batch.
        rows: Those that still do.
        row_n: Where they are in the batch.
        x_blz: Newest estimate of the clean embeddings; zero in rows without targets.
        scores_bly: Scores of its tokens.
        tokens_bl: The likeliest of them, if they are looked at in every call; -1 at targets that have none yet.
        confidence_bl: Their probabilities.
        unchanged_b: For how many calls the tokens of a row have been the same.
        calls_b: Calls made for each row.
    """

    def __init__(
        self,
        rows: GivenRows,
        tokens_bl: Tensor,
        options: SamplerOptions,
        observe: Callable[[Estimate], None] | None,
    ) -> None:
        self.options = options
        self.observe = observe
        self.all_rows = self.rows = rows
        self.row_n = torch.arange(len(tokens_bl), device=tokens_bl.device)
        self.x_blz = torch.zeros_like(rows.source_blz)
        scored = rows.reader.scored
        self.scores_bly = self.x_blz.new_zeros(*tokens_bl.shape, scored.embedding_vz.shape[1])
        self.tokens_bl = torch.where(rows.target_bl, -1, tokens_bl)
        self.confidence_bl = torch.ones_like(self.tokens_bl, dtype=self.x_blz.dtype)
        self.unchanged_b = torch.zeros_like(self.row_n)
        self.calls_b = torch.zeros_like(self.row_n)
        self.num_calls = 0
        self._keep(rows.target_bl.any(dim=1))

    def predict(self, u_blz: Tensor, level: NoiseLevel) -> Tensor:
        """The estimate of u_0 = z_0 - m; that of a row which is done stays as it is."""
        m_z = self.rows.model.m_z
        if len(self.row_n):
            self.x_blz[self.row_n], self.scores_bly[self.row_n] = self._estimate(u_blz[self.row_n] + m_z, level)
            self.calls_b[self.row_n] += 1
            if self._looked_at:
                self._look(level)
            self.num_calls += 1
        return self.x_blz - m_z

    def tokens(self) -> Tensor:
        """Tokens of the newest estimate."""
        if not self._looked_at and len(self.row_n):
            self._round()
        return self.tokens_bl

    def likeliest(self, confidence_bl: Tensor, calls: int, of: int) -> tuple[Tensor, Tensor]:
        """All targets [b, l] but the least likely of a row, whose share is 1 - calls / of; and u_0 of all tokens."""
        rows = self.all_rows
        confidence_bl = confidence_bl.masked_fill(~rows.target_bl, torch.inf)
        rank_bl = confidence_bl.argsort(dim=1, stable=True).argsort(dim=1)
        others_b = rows.target_bl.sum(dim=1) * (of - calls) // of
        u_0 = rows.reader.embedding_vz[self.tokens_bl.clamp(min=0)] - rows.model.m_z
        return (rank_bl >= others_b[:, None]) & rows.target_bl, u_0

    @property
    def _looked_at(self) -> bool:
        return self.observe is not None or self.options.patience > 0 or self.options.solver == MASK_PREDICT

    def _estimate(self, z_nlz: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        options, rows = self.options, self.rows
        earlier_nlz = None
        if rows.model.denoiser.config.self_conditioning and self.num_calls:
            earlier_nlz = self.x_blz[self.row_n]
        timestep_n = torch.full((len(z_nlz),), level.timestep, device=z_nlz.device, dtype=torch.float64)
        prediction = rows.predict(z_nlz, timestep_n, earlier_nlz, options.guidance)
        x_nlz, embedding_vz = prediction.clean_blz, rows.reader.embedding_vz
        if options.threshold < 1:
            x_nlz = thresholded(x_nlz, rows.target_bl, options.threshold, embedding_vz.abs().max())
        if options.clamp:
            x_nlz = embedding_vz[nearest_tokens(x_nlz, embedding_vz)]
        return x_nlz, x_nlz if rows.reader.reading == "output" else prediction.scores_bly

    def _look(self, level: NoiseLevel) -> None:
        """Tell the observer, and let go of the rows that have not changed for long enough."""
        earlier_bl = self.tokens_bl
        self._round()
        same_b = (self.tokens_bl == earlier_bl).all(dim=1)
        self.unchanged_b = torch.where(same_b, self.unchanged_b + 1, 0)
        if self.observe is not None:
            self.observe(Estimate(self.num_calls, level.timestep, self.tokens_bl, self.confidence_bl))
        if self.options.patience:
            sure_b = (self.confidence_bl >= self.options.confidence).all(dim=1)
            settled_b = (self.unchanged_b >= self.options.patience) & sure_b
            self._keep(~settled_b[self.row_n])

    def _round(self) -> None:
        target_nl = self.rows.target_bl
        tokens_nl, confidence_nl = likeliest_tokens(self.scores_bly[self.row_n], self.rows.reader.scored)
        tokens_nl = torch.where(target_nl, tokens_nl, self.tokens_bl[self.row_n])
        confidence_nl = torch.where(target_nl, confidence_nl, 1.0)
        self.tokens_bl = self.tokens_bl.index_copy(0, self.row_n, tokens_nl)
        self.confidence_bl = self.confidence_bl.index_copy(0, self.row_n, confidence_nl)

    def _keep(self, needed_n: Tensor) -> None:
        if not needed_n.all():
            kept = needed_n.nonzero().flatten()
            self.rows, self.row_n = self.rows.take(kept), self.row_n[kept]


def thresholded(x_blz: Tensor, target_bl: Tensor, quantile: float, largest: Tensor) -> Tensor:
    """Cut a row's values at the quantile of their size over its targets, then scale them until none exceeds `largest`.

    Rows of which the quantile does not exceed `largest` are cut there, and not scaled. Every row must have a target.
    """
    size_bn = x_blz.abs().masked_fill(~target_bl[..., None], torch.inf).flatten(1).sort(dim=1).values
    count_b = target_bl.sum(dim=1) * x_blz.shape[2]
    place_b = (quantile * (count_b.double() - 1)).ceil().long()
    limit_b11 = size_bn.gather(1, place_b[:, None])[..., None].clamp(min=largest)
    return x_blz.clamp(-limit_b11, limit_b11) * (largest / limit_b11)

"""Rows whose tokens have settled are not denoised any further."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from mdseq.diffusion.denoising import DiffusionModel
from mdseq.generate.sampler import Estimate
from tests.generate.sampling import ALL, WITHOUT_TARGET, Shown, every_solver, generate


@every_solver
@pytest.mark.parametrize(("patience", "confidence"), [(1, 0.0), (2, 0.0), (3, 0.0), (1, 0.9), (2, 0.99)])
def test_a_row_is_done_when_its_tokens_have_settled(
    self_conditioned: DiffusionModel, solver: str, patience: int, confidence: float
) -> None:
    """At the first call at which they have been the same for `patience` calls, and each is likely enough."""
    options = {"solver": solver, "num_calls": 12, "time_grid": "quadratic", "seed": 2}
    seen: list[Estimate] = []
    generate(self_conditioned, observe=seen.append, **options)
    early = generate(self_conditioned, patience=patience, confidence=confidence, **options)
    for row in set(ALL) - {WITHOUT_TARGET}:
        tokens = [estimate.tokens_bl[row].tolist() for estimate in seen]
        sure = [estimate.confidence_bl[row].min() >= confidence for estimate in seen]
        same = [later == sooner for sooner, later in pairwise(tokens)]  # at call i + 1
        done = [i for i in range(len(tokens)) if i >= patience and all(same[i - patience : i]) and sure[i]]
        last = done[0] if done else len(tokens) - 1
        assert early.calls_b[row] == last + 1
        assert early.tokens_bl[row].tolist() == tokens[last]


def test_confidence_asks_for_more_calls(self_conditioned: DiffusionModel) -> None:
    options = {"num_calls": 12, "time_grid": "quadratic", "patience": 1}
    calls = [int(generate(self_conditioned, confidence=c, **options).calls_b.sum()) for c in (0.0, 0.9, 0.99)]
    assert calls[0] < calls[1] < calls[2]


def test_the_denoiser_runs_only_on_rows_that_are_not_done(self_conditioned: DiffusionModel) -> None:
    with Shown(self_conditioned) as shown:
        calls_b = generate(self_conditioned, num_calls=12, time_grid="quadratic", patience=1).calls_b
    assert len(set(calls_b.tolist())) > 3  # or this would show little
    expected = [int((calls_b > call).sum()) for call in range(int(calls_b.max()))]
    assert [len(call[0]) for call in shown.calls] == expected


def test_a_row_that_never_settles_has_all_calls(model: DiffusionModel) -> None:
    assert (generate(model, [0, 1, 2], num_calls=6, patience=6).calls_b == 6).all()


def test_rows_that_are_done_are_observed_as_they_are(self_conditioned: DiffusionModel) -> None:
    """And when all are, there is nothing left to observe."""
    seen: list[Estimate] = []
    samples = generate(self_conditioned, observe=seen.append, num_calls=30, time_grid="quadratic", patience=1)
    assert len(seen) == samples.calls_b.max() < 30
    for row in ALL:
        for estimate in seen[int(samples.calls_b[row]) :]:
            assert torch.equal(estimate.tokens_bl[row], samples.tokens_bl[row])

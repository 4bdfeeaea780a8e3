"""The bound of tokens that are absorbed: right where it can be written out, and blind to what it guesses."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch import Tensor

from mdseq.diffusion.absorbing import Absorption
from mdseq.diffusion.bound import RowDraws
from mdseq.diffusion.denoising import DiffusionModel, GivenRows
from mdseq.diffusion.estimates import READINGS, Reading
from mdseq.diffusion.orders import absorbing_bound
from mdseq.diffusion.schedule import NoiseSchedule
from mdseq.sparse import Documents
from tests.diffusion.test_denoising import VOCAB, Shown, T, model_of, some_rows


def draws_of(num_rows: int, seed: int = 0) -> RowDraws:
    row_b = torch.arange(num_rows)
    return RowDraws(seed, 0, row_b, row_b, torch.zeros_like(row_b))


def bound(model: DiffusionModel, num_sets: int, seed: int = 0) -> Tensor:
    """Of the three rows."""
    tokens_bl, target_bl, documents = some_rows()
    return absorbing_bound(GivenRows.of(model, tokens_bl, target_bl, documents), tokens_bl, draws_of(3, seed), num_sets)


@torch.no_grad()
@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("share", [0, 0.5], ids=["alone", "self_conditioned"])
def test_it_is_the_mean_over_all_sets_of_absorbed_tokens(reading: Reading, share: float) -> None:
    """Of five targets, with next to no noise on those that are left, n / |A| times what those of A cost."""
    quiet = NoiseSchedule("sqrt", T, 0.01, 0.99995)
    model = replace(model_of(f"diffusion.self_conditioning={share}", reading=reading), schedule=quiet)
    n, length, copies = 5, 8, 3000
    tokens_l = torch.randint(5, VOCAB, (length,), generator=torch.Generator().manual_seed(2))
    target_l = torch.arange(length) >= length - n

    def given(num_rows: int) -> tuple[GivenRows, Tensor]:
        tokens_bl, target_bl = tokens_l.expand(num_rows, -1), target_l.expand(num_rows, -1)
        documents = Documents.whole(torch.full((num_rows,), length), length)
        return GivenRows.of(model, tokens_bl, target_bl, documents), tokens_bl

    rows, _ = given(1)
    expected = 0.0
    for size in range(1, n + 1):
        for chosen in combinations(range(length - n, length), size):
            z_blz = rows.source_blz.clone()
            z_blz[0, list(chosen)] = model.m_z
            timestep_b = torch.tensor([quiet.last * size / n], dtype=torch.float64)
            said = rows.predict(z_blz, timestep_b)
            if share:
                said = rows.predict(z_blz, timestep_b, said.clean_blz)
            logits_lv = said.scores_bly[0] @ rows.reader.scored.embedding_vz.T + rows.reader.scored.bias_v
            nats_l = -logits_lv.log_softmax(dim=-1).gather(1, tokens_l[:, None])[:, 0]
            expected += n / size * nats_l[list(chosen)].sum().item() / math.comb(n, size) / n
    many, tokens_bl = given(copies)
    nats_b = absorbing_bound(many, tokens_bl, draws_of(copies), num_sets=3)
    assert abs(nats_b.mean().item() - expected) < 4 * nats_b.std().item() / copies**0.5 + 1e-3 * expected
    assert nats_b.std() > 0.01 * expected, "sets differ"


@torch.no_grad()
@pytest.mark.parametrize("num_sets", [1, 4])
def test_a_guess_costs_the_logarithm_of_the_vocabulary(num_sets: int) -> None:
    """Whatever is drawn, and for each target of a row."""
    model = model_of(reading="posterior")
    model.denoiser.output[-1].weight.zero_()
    nats_b = bound(model, num_sets)
    assert nats_b.tolist() == pytest.approx([n * math.log(VOCAB) for n in (7, 9, 10)], rel=1e-6)


@torch.no_grad()
def test_what_is_absorbed_is_m_and_the_rest_is_noised_as_mask_predict_does() -> None:
    """Sizes are spread evenly, and each set is another; sources stay as they are."""
    model = model_of()
    shown = Shown(model.denoiser)
    bound(model, num_sets=6)
    tokens_bl, target_bl, _ = some_rows()
    words_blz = model.denoiser.embed(tokens_bl)
    sizes = []
    for z_blz, time_bl, _, _ in shown.calls:
        absorbed_bl = (z_blz == model.m_z).all(dim=-1)
        assert not absorbed_bl[~target_bl].any()
        assert torch.equal(z_blz[~target_bl], words_blz[~target_bl])
        sizes.append(absorbed_bl.sum(dim=1))
        share_b = sizes[-1] / target_bl.sum(dim=1)
        for b, share in enumerate(share_b.tolist()):
            time = time_bl[b][target_bl[b]]
            assert time.tolist() == pytest.approx([1000 * share * (T - 1) / T] * len(time), rel=1e-5)
        alpha_b, sigma_b = model.schedule.alpha_sigma(model.schedule.last * share_b)
        kept_bl = target_bl & ~absorbed_bl
        u_blz = alpha_b[:, None, None] * (words_blz - model.m_z)
        noise_blz = (z_blz - model.m_z - u_blz) / sigma_b[:, None, None]
        assert not kept_bl.any() or 0.5 < noise_blz[kept_bl].std() < 1.5
    for b, count in enumerate((7, 9, 10)):
        ordered = [int(size[b]) for size in sizes]
        assert ordered == sorted(ordered)
        for index, size in enumerate(ordered):
            assert count * index / 6 <= size <= math.ceil(count * (index + 1) / 6)


@torch.no_grad()
def test_the_seed_decides() -> None:
    model = model_of()
    assert torch.equal(bound(model, 2), bound(model, 2))
    assert not torch.equal(bound(model, 2), bound(model, 2, seed=1))


def test_it_is_taken_of_models_that_were_trained_on_all_shares() -> None:
    model = model_of()
    for absorption, absorbs in (
        (Absorption(1.0, "uniform"), True),
        (Absorption(0.9, "uniform"), False),
        (Absorption(1.0, "sigma"), False),
        (Absorption(0.0), False),
    ):
        assert replace(model, absorption=absorption).absorbs == absorbs

"""Noise is a function of what it is for: standard, well spread, and blind to the layout of the batch."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mdseq.noise import NoiseKey, Purpose, philox

KNOWN_ANSWERS = [  # Random123, tests/kat_vectors, "philox4x32 10": counter, key, result
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def key_of(seed: int = 0, step: int = 0, rows: list[int] | int = 1) -> NoiseKey:
    return NoiseKey(seed, step, torch.arange(rows) if isinstance(rows, int) else torch.tensor(rows))


def kolmogorov_smirnov(values: Tensor, cumulative: Tensor) -> float:
    """sqrt(n) times the largest distance between the empirical and the exact distribution; 1.95 is p = 0.001."""
    n = values.numel()
    rank = torch.arange(1, n + 1, dtype=torch.float64)
    above, below = (rank / n - cumulative).abs().max(), (cumulative - (rank - 1) / n).abs().max()
    return math.sqrt(n) * max(above.item(), below.item())


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter: str, key: str, result: str) -> None:
    k0, k1 = words(key)
    out = philox(tuple(torch.tensor([word]) for word in words(counter)), (k0, k1))
    assert [word.item() for word in out] == words(result)


@settings(max_examples=100)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=6, max_size=6))
def test_philox_equals_its_definition_in_unbounded_integers(values: list[int]) -> None:
    x0, x1, x2, x3, k0, k1 = values
    out = philox(tuple(torch.tensor([word]) for word in (x0, x1, x2, x3)), (k0, k1))
    for _ in range(10):
        product0, product1 = 0xD2511F53 * x0, 0xCD9E8D57 * x2
        x0, x1, x2, x3 = (
            (product1 >> 32) ^ x1 ^ k0,
            product1 % 2**32,
            (product0 >> 32) ^ x3 ^ k1,
            product0 % 2**32,
        )
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    assert [word.item() for word in out] == [x0, x1, x2, x3]


def test_normal_is_standard_normal() -> None:
    values = key_of(rows=64).normal(Purpose.DIFFUSION, 50, 65).double().flatten()
    n = values.numel()
    assert values.mean().abs() < 4 / n**0.5
    assert (values.square().mean() - 1).abs() < 4 * (2 / n) ** 0.5
    assert values.pow(3).mean().abs() < 4 * (15 / n) ** 0.5
    assert (values.pow(4).mean() - 3).abs() < 4 * (96 / n) ** 0.5
    assert kolmogorov_smirnov(values, torch.special.ndtr(values.sort().values)) < 1.95


def test_uniform_is_uniform_and_never_zero() -> None:
    values = key_of(rows=1000).uniform(Purpose.ABSORBING, 200).double().flatten()
    assert kolmogorov_smirnov(values, values.sort().values) < 1.95
    assert 0 < values.min() < 1e-4
    assert 1 - 1e-4 < values.max() <= 1


@pytest.mark.parametrize("dim", [1, 2, 3, 7, 64])
def test_shapes_and_types(dim: int) -> None:
    key = key_of(rows=3)
    normal, uniform = key.normal(Purpose.DIFFUSION, 5, dim), key.uniform(Purpose.TIMESTEP, 5)
    assert (normal.shape, normal.dtype) == ((3, 5, dim), torch.float32)
    assert (uniform.shape, uniform.dtype) == ((3, 5), torch.float32)
    assert torch.isfinite(normal).all()
    assert key.normal(Purpose.DIFFUSION, 0, dim).shape == (3, 0, dim)


@settings(max_examples=30)
@given(
    st.lists(st.integers(0, 2**40), min_size=1, max_size=6),
    st.integers(0, 2**32 - 1),
    st.integers(0, 10**6),
    st.randoms(use_true_random=False),
)
def test_a_row_draws_the_same_in_any_company_and_order(rows, seed, step, rng) -> None:
    whole = NoiseKey(seed, step, torch.tensor(rows))
    normal, uniform = whole.normal(Purpose.DIFFUSION, 4, 5), whole.uniform(Purpose.ABSORBING, 4)
    order = list(range(len(rows)))
    rng.shuffle(order)
    shuffled = NoiseKey(seed, step, torch.tensor(rows)[order])
    assert torch.equal(shuffled.normal(Purpose.DIFFUSION, 4, 5), normal[order])
    for b, row in enumerate(rows):
        alone = NoiseKey(seed, step, torch.tensor([row]))
        assert torch.equal(alone.normal(Purpose.DIFFUSION, 4, 5)[0], normal[b])
        assert torch.equal(alone.uniform(Purpose.ABSORBING, 4)[0], uniform[b])


def test_a_longer_row_begins_with_the_draws_of_a_shorter_one() -> None:
    key = key_of(seed=5, step=7, rows=3)
    for draw in (
        lambda length: key.normal(Purpose.SAMPLING, length, 6),
        lambda length: key.uniform(Purpose.ABSORBING, length),
    ):
        assert torch.equal(draw(40)[:, :11], draw(11))


def test_the_draws_are_pinned() -> None:
    """A run that resumes with a later release must see the noise it would have seen."""
    key = key_of(seed=1, step=2, rows=[3])
    words_of_uniform = (key.uniform(Purpose.TIMESTEP, 2) * 2**24).long() - 1
    # counter (index, position, row, step), key (seed, purpose); the first word, without its lower 8 bits
    expected = [
        philox(tuple(torch.tensor([c]) for c in (0, position, 3, 2)), (1, Purpose.TIMESTEP))[0].item() >> 8
        for position in range(2)
    ]
    assert words_of_uniform.tolist() == [expected]


def test_every_part_of_the_key_matters() -> None:
    """Draws that differ in one of purpose, step, seed, row or position are uncorrelated."""
    count = 20_000

    def draw(purpose: Purpose = Purpose.DIFFUSION, seed: int = 0, step: int = 0, row: int = 0) -> np.ndarray:
        return key_of(seed, step, [row]).normal(purpose, count, 1).flatten().numpy()

    several = [draw(purpose) for purpose in Purpose]
    several += [
        draw(seed=1),
        draw(seed=2**31),
        draw(step=1),
        draw(step=2**20),
        draw(row=1),
        draw(row=2**8),
        draw(row=2**20),
    ]
    base = draw()
    several += [np.roll(base, 1), np.roll(base, 2)]  # neighbouring positions
    for a, b in itertools.combinations(several, 2):
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / count**0.5
    assert len({array.tobytes() for array in several}) == len(several)


def test_the_values_of_one_position_are_uncorrelated() -> None:
    dim = 10
    values = key_of(rows=[0]).normal(Purpose.DIFFUSION, 20_000, dim)[0].double().numpy()
    for power in (1, 2):  # the two halves share a radius word: their squares must be uncorrelated too
        correlation = np.corrcoef(values.T**power)
        assert np.abs(correlation - np.eye(dim)).max() < 5 / 20_000**0.5


def test_purposes_are_pinned_and_distinct() -> None:
    """Renumbering them would change every run."""
    assert {purpose.name: int(purpose) for purpose in Purpose} == {
        "TIMESTEP": 1, "EMBEDDING": 2, "DIFFUSION": 3, "ABSORBING": 4, "STARTING": 5, "SAMPLING": 6, "PREFIX": 7,
        "SUFFIX": 8, "STRATA": 9, "SELF_CONDITIONING": 10, "LAG": 11, "CONDITION": 12, "LENGTH": 13, "RESAMPLING": 14,
        "DROPOUT": 15, "SOURCE": 16, "SHARE": 17, "LIKELIHOOD": 20, "ORDER": 21,
    }  # fmt: skip

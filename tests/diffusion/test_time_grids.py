"""Grids run from noise to data, are spread as they say, and may have more points than there are timesteps."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mdseq.diffusion.schedule import NOISE_SCHEDULES, NoiseSchedule
from mdseq.diffusion.time_grids import TIME_GRIDS, time_grid

every_grid = pytest.mark.parametrize("name", TIME_GRIDS)


@given(
    st.sampled_from(list(TIME_GRIDS)),
    st.sampled_from(list(NOISE_SCHEDULES)),
    st.integers(2, 60),
    st.sampled_from([0.25, 1.0, 4.0]),
    st.integers(2, 200),
)
def test_a_grid_falls_from_the_last_timestep_to_the_first(
    name: str, schedule: str, num_timesteps: int, noise_factor: float, num_points: int
) -> None:
    grid = time_grid(name, NoiseSchedule(schedule, num_timesteps, noise_factor), num_points)
    assert (len(grid), grid[0], grid[-1]) == (num_points, num_timesteps - 1, 0)
    assert grid == sorted(set(grid), reverse=True)


@every_grid
def test_a_grid_of_one_starts_where_the_noise_is(name: str) -> None:
    assert time_grid(name, NoiseSchedule("sqrt", 2000), 1) == [1999]


def test_each_grid_is_even_in_what_it_is_named_after() -> None:
    schedule = NoiseSchedule("sqrt", 2000)

    def assert_even(values: torch.Tensor) -> None:
        gaps = values.diff()
        torch.testing.assert_close(gaps, gaps.mean().expand_as(gaps), rtol=1e-8, atol=0)

    grid_of = {name: torch.tensor(time_grid(name, schedule, 9), dtype=torch.float64) for name in TIME_GRIDS}
    assert_even(grid_of["uniform"])
    assert_even(schedule.log_snr(grid_of["log_snr"]))
    assert_even(grid_of["quadratic"].sqrt())


@every_grid
def test_as_many_points_as_timesteps_and_more(name: str) -> None:
    schedule = NoiseSchedule("cosine", 5)
    for num_points in (5, 6, 1000):
        levels = schedule.levels(time_grid(name, schedule, num_points))
        assert all(s.log_snr > t.log_snr for t, s in pairwise(levels))

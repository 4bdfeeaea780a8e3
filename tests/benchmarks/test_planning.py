"""The estimate of memory is within a fifth of what ranks hold, in real runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.planning import NOTHING, SIZES, VOCAB, Size, estimated, measured_bytes

SMALL = Size(256, 4, 256, 512)
CASES = [
    pytest.param(SMALL, "zero2", 2, id="small, weights whole"),
    pytest.param(SMALL, "zero3_experts", 2, id="small, all spread"),
]
SLOW = [
    pytest.param(size, ds_config, num_ranks, id=f"{millions} M, {ds_config} on {num_ranks}", marks=pytest.mark.slow)
    for millions, size in SIZES.items()
    for ds_config, num_ranks in (("cpu", 1), ("zero3_experts", 2))  # the benchmark has more
]


@pytest.mark.parametrize(("size", "ds_config", "num_ranks"), CASES + SLOW)
def test_ranks_hold_what_is_estimated(
    size: Size, ds_config: str, num_ranks: int, text_dataset: Path, tmp_path: Path
) -> None:
    assert estimated(NOTHING, ds_config, num_ranks).total < 0.05 * estimated(size, ds_config, num_ranks).total
    found = measured_bytes(size, ds_config, num_ranks, text_dataset, tmp_path)
    assert estimated(size, ds_config, num_ranks, VOCAB).total == pytest.approx(found, rel=0.2)

"""A run goes on wherever it is moved: other ranks, ZeRO stages and spreads of experts, and the same curve."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from mdseq.engine.config import load_engine_config
from mdseq.errors import UserError
from mdseq.spec import load_spec
from tests.dist.ranks import run_ranks, train
from tests.dist.test_training import DS_CONFIGS, TINY, losses, state

# (ranks, ds_config, ranks that share the experts): where the run goes on every two steps.
MOVES = [
    (1, "cpu", None),
    (2, "zero2", None),
    (2, "zero3_experts", 2),
    (4, "zero3_experts", 4),
    (4, "zero3_experts", 2),
    (1, "zero3_experts", 1),
    (2, "zero3_offload", None),
    (2, "cpu", 2),
    (4, "zero2", None),
    (1, "zero3", None),
    (1, "cpu", None),
]
STEPS = 2 * len(MOVES)


def go_on(
    dataset: Path, folder: Path, steps: int, num_ranks: int, ds_config: str, experts_over: int | None, *more: str
) -> None:
    path = folder.with_name(f"{ds_config}-{experts_over}.json")
    path.write_text(json.dumps(spread(ds_config, experts_over)))
    arguments = ["--ds_config", path, "--data", dataset, "--output", folder, *TINY, f"schedule.steps={steps}"]
    # With a linear decay, the rate at a step would depend on where the run is to end.
    micro_batch_size = f"data.micro_batch_size={4 // num_ranks}"
    statuses = run_ranks(num_ranks, train, *arguments, micro_batch_size, "schedule.decay=constant", *more)
    assert statuses == [0] * num_ranks


def spread(ds_config: str, experts_over: int | None) -> dict:
    """A ds_config whose experts are spread over so many ranks, or left alone."""
    config = json.loads((DS_CONFIGS / f"{ds_config}.json").read_text())
    config.pop("expert_parallel", None)
    return config | ({"expert_parallel": {"autoep_size": experts_over}} if experts_over else {})


@pytest.fixture(scope="module")
def unmoved(text_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unmoved") / "run"
    go_on(text_dataset, folder, STEPS, *MOVES[0])
    return folder


def test_a_run_that_moves_every_two_steps_has_the_curve_of_one_that_stays(unmoved, text_dataset, tmp_path):
    moved = tmp_path / "run"
    for i, move in enumerate(MOVES):
        go_on(text_dataset, moved, 2 * (i + 1), *move)
    assert len(losses(moved)) == STEPS
    torch.testing.assert_close(losses(moved), losses(unmoved), rtol=1e-5, atol=1e-5)
    for which in ("weights", "average", "exp_avg", "exp_avg_sq"):
        expected = state(unmoved, STEPS, which)
        for name, values in state(moved, STEPS, which).items():
            torch.testing.assert_close(values, expected[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_moving_alone_changes_no_value(text_dataset, tmp_path):
    """In bf16, too, what is saved right after a move is what was saved before it, to the last bit."""
    folder, more = tmp_path / "run", ("optimiser.precision=bf16", "checkpoint.keep_last=9")
    go_on(text_dataset, folder, 2, 2, "zero3_experts", 2, *more)
    moves = [(4, "zero2", None), (2, "cpu", 2), (1, "zero3", None)]
    for step, move in enumerate(moves, start=3):
        go_on(text_dataset, folder, step, *move, *more, "optimiser.learning_rate=1e-30")
        before, after = (state(folder, s, "weights") for s in (step - 1, step))
        for name, values in after.items():
            assert torch.equal(values, before[name]), name


WAYS = list(itertools.product((1, 2, 4), (1, 2, 4), (0, 1, 2, 3)))  # ranks, ranks that share the experts, ZeRO stage
ALLOWED = [(ranks, experts, stage) for ranks, experts, stage in WAYS if stage and ranks % experts == 0]


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "experts_over", "stage"), ALLOWED)
def test_every_way_to_spread_experts_gives_the_same_losses(
    unmoved, text_dataset, tmp_path, num_ranks, experts_over, stage
):
    ds_config = {1: "cpu", 2: "zero2", 3: "zero3"}[stage]
    go_on(text_dataset, tmp_path / "run", 5, num_ranks, ds_config, experts_over)
    torch.testing.assert_close(losses(tmp_path / "run"), losses(unmoved)[:5], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("num_ranks", "experts_over", "stage"), sorted(set(WAYS) - set(ALLOWED)))
def test_what_deepspeed_cannot_do_is_refused_before_it_is_started(tmp_path, num_ranks, experts_over, stage):
    path = tmp_path / "ds.json"
    path.write_text(
        json.dumps({"zero_optimization": {"stage": stage}, "expert_parallel": {"autoep_size": experts_over}})
    )
    spec = load_spec(None, ["experts.num_experts=4", "data.batch_size=4", "data.micro_batch_size=1"]).spec
    with pytest.raises(UserError) as refused:
        load_engine_config(path, spec, num_ranks, on_gpu=False)
    assert ("stage = 0 must be 1, 2 or 3" in str(refused.value)) == (stage == 0)
    wrong = f"autoep_size = {experts_over} must divide the number of ranks = {num_ranks}"
    assert (wrong in str(refused.value)) == (num_ranks % experts_over > 0)

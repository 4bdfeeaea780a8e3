"""The spec and the ds_config each say their own facts, and contradictions are named, all at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mdseq.engine.config import EngineConfig, load_engine_config
from mdseq.errors import UserError
from mdseq.spec import RunSpec, load_spec, preset_names

DS_CONFIGS = sorted((Path(__file__).parent.parent.parent / "ds_configs").glob("*.json"))


def write(folder: Path, values: Any) -> Path:
    path = folder / "ds.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")
    return path


def spec_of(*overrides: str) -> RunSpec:
    return load_spec(None, overrides).spec


def load(folder: Path, values: dict[str, Any], *overrides: str, num_ranks: int = 1) -> EngineConfig:
    values = {"zero_optimization": {"stage": 1}} | values
    return load_engine_config(write(folder, values), spec_of(*overrides), num_ranks, on_gpu=False)


def problems(folder: Path, values: Any, *overrides: str, num_ranks: int = 1) -> list[str]:
    """The lines of the message about a ds_config that is wrong."""
    if isinstance(values, dict):
        values = {"zero_optimization": {"stage": 1}} | values
    with pytest.raises(UserError) as error:
        load_engine_config(write(folder, values), spec_of(*overrides), num_ranks, on_gpu=False)
    return str(error.value).splitlines()


FACTS = {
    "train_batch_size": 12,
    "train_micro_batch_size_per_gpu": 3,
    "gradient_accumulation_steps": 4,
    "gradient_clipping": 0.5,
    "bf16": {"enabled": True},
}
OVERRIDES = ["data.batch_size=12", "data.micro_batch_size=3", "optimiser.gradient_clipping=0.5",
             "optimiser.precision=bf16", "optimiser.learning_rate=3e-4", "optimiser.betas=[0.8, 0.95]"]  # fmt: skip


@pytest.mark.parametrize(
    "given",
    [{}, dict.fromkeys(FACTS, "auto"), {"bf16": {"enabled": "auto"}}, FACTS],
    ids=["absent", "auto", "auto inside", "equal"],
)
def test_the_spec_fills_what_is_absent_auto_or_equal(tmp_path: Path, given: dict[str, Any]) -> None:
    config = load(tmp_path, given, *OVERRIDES)
    assert {key: config.values[key] for key in FACTS} == FACTS
    optimizer = config.values["optimizer"]
    assert optimizer["type"] == "AdamW"
    assert (optimizer["params"]["lr"], optimizer["params"]["betas"]) == (3e-4, [0.8, 0.95])


def test_what_belongs_to_the_ds_config_is_passed_on(tmp_path: Path) -> None:
    zero = {"stage": 3, "reduce_bucket_size": 7, "offload_optimizer": {"device": "cpu"}}
    config = load(tmp_path, {"zero_optimization": zero, "wall_clock_breakdown": True})
    assert config.values["zero_optimization"] == zero
    assert config.values["wall_clock_breakdown"] is True
    assert (config.zero_stage, config.offloads_optimiser) == (3, True)


@pytest.mark.parametrize("offload", [{}, {"offload_optimizer": {"device": "none"}}])
def test_no_offload(tmp_path: Path, offload: dict[str, Any]) -> None:
    assert not load(tmp_path, {"zero_optimization": {"stage": 2} | offload}).offloads_optimiser


def test_a_contradiction_names_both_places(tmp_path: Path) -> None:
    heading, problem = problems(tmp_path, {"gradient_clipping": 2.0}, "optimiser.gradient_clipping=0.5")
    assert heading == f"1 problem in {tmp_path / 'ds.json'} with this run spec:"
    assert "gradient_clipping = 2.0 contradicts the run spec, which makes it 0.5" in problem
    assert "(optimiser.gradient_clipping)" in problem
    assert 'write "auto" in the ds_config' in problem


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    heading, *lines = problems(
        tmp_path,
        {
            "train_batch_size": 999,
            "bf16": {"enabled": True},
            "optimizer": {"type": "Lamb", "params": {"lr": 1.0}},
            "fp16": {"enabled": True},
            "scheduler": {},
            "zero_optimization": {"stage": 0},
            "expert_parallel": {"autoep_size": 3},
        },
        "data.batch_size=7",
        num_ranks=2,
    )
    assert heading.startswith(f"{len(lines)} problems in ")
    starts = [line.strip().split(" ")[0] for line in lines]
    assert sorted(starts) == sorted(
        ["data.batch_size", "train_batch_size", "bf16.enabled", "optimizer.type", "optimizer.params.lr", "fp16",
         "scheduler", "zero_optimization.stage", "expert_parallel.autoep_size"]
    )  # fmt: skip


@pytest.mark.parametrize("key", ["fp16", "scheduler", "tensorboard", "csv_monitor"])
def test_what_is_not_deepspeeds_to_decide(tmp_path: Path, key: str) -> None:
    _, problem = problems(tmp_path, {key: {"enabled": False}})
    assert f"{key} does not belong in a ds_config" in problem


@pytest.mark.parametrize("stage", [0, 4, None, "3"])
def test_the_stage_must_be_one_to_three(tmp_path: Path, stage: object) -> None:
    _, problem = problems(tmp_path, {"zero_optimization": {"stage": stage}})
    assert f"zero_optimization.stage = {json.dumps(stage)} must be 1, 2 or 3" in problem


@pytest.mark.parametrize("section", ["offload_optimizer", "offload_param"])
def test_the_averaged_weights_must_be_at_hand(tmp_path: Path, section: str) -> None:
    _, problem = problems(tmp_path, {"zero_optimization": {"stage": 3, section: {"device": "nvme"}}})
    assert f'{section}.device = "nvme"' in problem


def test_gradients_must_keep_their_order(tmp_path: Path) -> None:
    _, problem = problems(tmp_path, {"zero_optimization": {"stage": 2, "round_robin_gradients": True}})
    assert "round_robin_gradients" in problem


@pytest.mark.parametrize(
    "values",
    [{"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, {"bf16": {"check_grad_overflow": False}}],
)
def test_steps_that_are_not_finite_must_be_noticed(tmp_path: Path, values: dict[str, Any]) -> None:
    _, problem = problems(tmp_path, values)
    assert "= false would take steps that are not finite; remove it" in problem


def test_a_section_that_is_no_object_is_one_problem(tmp_path: Path) -> None:
    _, problem = problems(tmp_path, {"bf16": True})
    assert "bf16 = true contradicts the run spec" in problem


@pytest.mark.parametrize(
    ("batch_size", "micro_batch_size", "num_ranks", "micro_batches"),
    [(16, 1, 1, 16), (16, 4, 1, 4), (16, 4, 2, 2), (16, 4, 4, 1), (6, 2, 3, 1)],
)
def test_ranks_times_micro_batches_make_the_batch(
    tmp_path: Path, batch_size: int, micro_batch_size: int, num_ranks: int, micro_batches: int
) -> None:
    config = load(
        tmp_path, {}, f"data.batch_size={batch_size}", f"data.micro_batch_size={micro_batch_size}", num_ranks=num_ranks
    )  # fmt: skip
    assert config.micro_batches == config.values["gradient_accumulation_steps"] == micro_batches
    assert config.values["train_batch_size"] == micro_batches * micro_batch_size * num_ranks
    assert config.num_ranks == num_ranks


@pytest.mark.parametrize(("batch_size", "num_ranks", "nearest"), [(16, 3, 18), (2, 4, 8), (20, 8, 16)])
def test_ranks_that_do_not_divide_the_batch(tmp_path: Path, batch_size: int, num_ranks: int, nearest: int) -> None:
    overrides = [f"data.batch_size={batch_size}", "data.micro_batch_size=2"]
    _, problem = problems(tmp_path, {}, *overrides, num_ranks=num_ranks)
    assert f"data.batch_size = {batch_size} must be a multiple of" in problem
    assert problem.endswith(f"the nearest is {nearest}")
    overrides[0] = f"data.batch_size={nearest}"
    load(tmp_path, {}, *overrides, num_ranks=num_ranks)


@pytest.mark.parametrize(
    ("size", "num_experts", "num_ranks", "expected"),
    [("auto", 8, 1, 1), ("auto", 8, 4, 4), ("auto", 8, 16, 8), ("auto", 6, 4, 2), ("auto", 3, 2, 1),
     (2, 8, 4, 2), (1, 8, 4, 1), (4, 4, 4, 4)],
)  # fmt: skip
def test_ranks_that_share_the_experts(
    tmp_path: Path, size: object, num_experts: int, num_ranks: int, expected: int
) -> None:
    config = load(
        tmp_path, {"expert_parallel": {"autoep_size": size}}, f"experts.num_experts={num_experts}",
        f"data.batch_size={num_ranks}", num_ranks=num_ranks,
    )  # fmt: skip
    assert config.expert_parallel_size == expected
    if expected == 1:  # nothing to spread: our own layer runs
        assert "expert_parallel" not in config.values
        return
    section = config.values["expert_parallel"]
    assert section["autoep_size"] == expected
    assert section["enabled"] is True
    assert section["use_grouped_mm"] is False
    assert (section["expert_w1"], section["expert_w2"], section["expert_w3"]) == ("gate_up_proj", "down_proj", None)


@pytest.mark.parametrize(("size", "num_ranks"), [(3, 3), (3, 4), (8, 4), (0, 4), (-1, 4), ("all", 4), (2.0, 4)])
def test_sizes_that_do_not_divide_ranks_and_experts(tmp_path: Path, size: object, num_ranks: int) -> None:
    _, problem = problems(
        tmp_path, {"expert_parallel": {"autoep_size": size}}, "experts.num_experts=4", "data.batch_size=12",
        num_ranks=num_ranks,
    )  # fmt: skip
    assert f"expert_parallel.autoep_size = {json.dumps(size)} must divide the number of ranks = {num_ranks}" in problem
    assert "experts.num_experts = 4" in problem


def test_expert_parallelism_without_experts(tmp_path: Path) -> None:
    _, problem = problems(tmp_path, {"expert_parallel": {"autoep_size": "auto"}}, "experts.num_experts=0")
    assert "the run spec has no experts" in problem


@pytest.mark.parametrize("section", [None, {"enabled": False, "autoep_size": 99}])
def test_without_expert_parallelism_every_rank_hosts_all_experts(tmp_path: Path, section: object) -> None:
    config = load(tmp_path, {} if section is None else {"expert_parallel": section}, num_ranks=2)
    assert config.expert_parallel_size == 1
    assert "expert_parallel" not in config.values


def test_how_the_experts_are_found_is_not_the_users_to_change(tmp_path: Path) -> None:
    _, problem = problems(tmp_path, {"expert_parallel": {"autoep_size": 1, "route_norm": False}})
    assert problem.strip().startswith("expert_parallel.route_norm = false contradicts")


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("preset", preset_names())
@pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_load_with_every_preset_that_allows_them(path: Path, preset: str, num_ranks: int) -> None:
    spec = load_spec(Path(preset)).spec
    if "expert_parallel" in json.loads(path.read_text()) and not spec.experts.num_experts:
        with pytest.raises(UserError, match="has no experts"):
            load_engine_config(path, spec, num_ranks, on_gpu=True)
        return
    config = load_engine_config(path, spec, num_ranks, on_gpu=True)
    assert '"auto"' not in json.dumps(config.values)
    rows = config.values["train_micro_batch_size_per_gpu"] * config.micro_batches * num_ranks
    assert rows == config.values["train_batch_size"] == spec.data.batch_size
    assert config.offloads_optimiser == ("offload" in path.stem)


def test_a_missing_file_names_those_beside_it(tmp_path: Path) -> None:
    write(tmp_path, {})
    with pytest.raises(UserError, match=r"no ds_config at .*absent.json; found: .*ds.json"):
        load_engine_config(tmp_path / "absent.json", spec_of(), 1, on_gpu=False)
    with pytest.raises(UserError, match="none in that folder"):
        load_engine_config(tmp_path / "nowhere" / "absent.json", spec_of(), 1, on_gpu=False)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("{", "not valid JSON"), ("", "not valid JSON"), ("[1]", "must hold a JSON object"), ("3", "must hold")],
)
def test_a_file_that_is_no_json_object(tmp_path: Path, text: str, complaint: str) -> None:
    (message,) = problems(tmp_path, text)
    assert str(tmp_path / "ds.json") in message
    assert complaint in message


@pytest.mark.parametrize(
    "values",
    [
        {"zero_optimization": 3},
        {"zero_optimization": None},
        {"zero_optimization": [1]},
        {"expert_parallel": True},
        {"expert_parallel": 2},
        {"bf16": True},
        {"optimizer": "Adam"},
    ],
)
def test_a_section_that_is_no_section(tmp_path: Path, values: dict[str, Any]) -> None:
    _, problem = problems(tmp_path, values)
    assert problem.strip().startswith(next(iter(values)))


def test_no_offload_may_be_written_as_null(tmp_path: Path) -> None:
    config = load(tmp_path, {"zero_optimization": {"stage": 2, "offload_optimizer": None}})
    assert not config.offloads_optimiser

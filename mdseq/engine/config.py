"""What DeepSpeed is told: the ds_config completed from the run spec, one home for each fact.

Batch size, optimiser, precision and clipping live in the spec; sharding, offload, buckets and communication in the
ds_config, where the keys that both could set read "auto". A ds_config that says otherwise is an error that names both
places. Nothing here imports deepspeed, so a dry run is quick.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mdseq.errors import UserError
from mdseq.spec import RunSpec

AUTO = "auto"
DS_CONFIG_DIR = Path(__file__).resolve().parents[2] / "ds_configs"  # those that ship with mdseq

# AutoEP replaces our `RoutedExperts`, found by these names, by its own layer (see mdseq/model/experts.py).
_ADOPTED_LAYER = {
    "enabled": True,
    "moe_layer_pattern": r"denoiser\.blocks\.\d+\.feedforward",
    "router_pattern": "gate",
    "expert_pattern": "experts",
    "expert_w1": "gate_up_proj",
    "expert_w2": "down_proj",
    "expert_w3": None,
    "num_experts_attr": "num_experts",
    "top_k_attr": "top_k",
    "score_func": "softmax",
    "score_apply": "post",
}

_NOT_OURS = {
    "fp16": "mdseq trains in fp32 or bf16 (optimiser.precision)",
    "scheduler": "the learning rate over time is the spec's [schedule]",
    "tensorboard": "mdseq writes TensorBoard files itself, into the run folder",
    "csv_monitor": "mdseq writes metrics.jsonl itself, into the run folder",
}


@dataclass(frozen=True)
class EngineConfig:
    """The complete DeepSpeed configuration of one run.

    Attributes:
        values: What `deepspeed.initialize` receives.
        num_ranks: World size.
        expert_parallel_size: Ranks that share one copy of the experts; 1 where each rank hosts all of them.
        micro_batches: Micro-batches of one rank per optimiser step.
    """

    values: dict[str, Any]
    num_ranks: int
    expert_parallel_size: int
    micro_batches: int

    @property
    def zero_stage(self) -> int:
        return self.values["zero_optimization"]["stage"]

    @property
    def spread(self) -> str:
        """How state is spread, for people."""
        ranks = "1 rank" if self.num_ranks == 1 else f"{self.num_ranks} ranks"
        experts = f", experts over {self.expert_parallel_size}" if self.expert_parallel_size > 1 else ""
        return f"{ranks}, ZeRO stage {self.zero_stage}{experts}"

    @property
    def offloads_optimiser(self) -> bool:
        offload = self.values["zero_optimization"].get("offload_optimizer") or {}
        return offload.get("device", "none") != "none"


def load_engine_config(path: Path, spec: RunSpec, num_ranks: int, on_gpu: bool) -> EngineConfig:
    """Read a ds_config and complete it from the spec.

    Raises:
        UserError: Naming every contradiction at once, with both places.
    """
    return complete_engine_config(read_json(path), str(path), spec, num_ranks, on_gpu)


def complete_engine_config(
    values: dict[str, Any], origin: str, spec: RunSpec, num_ranks: int, on_gpu: bool
) -> EngineConfig:
    """As `load_engine_config`, of a ds_config that has been read; changes `values`.

    Args:
        origin: What messages call it.
    """
    problems: list[str] = []
    _check_sections(values, problems)
    micro_batches = _count_micro_batches(spec, num_ranks, problems)
    _merge(values, _facts_of_spec(spec, micro_batches), "", problems)
    problems += [f"{key} does not belong in a ds_config: {why}" for key, why in _NOT_OURS.items() if key in values]
    _check_zero(values, problems)
    expert_parallel_size = _complete_experts(values, spec, num_ranks, on_gpu, problems)
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise UserError(f"{count} in {origin} with this run spec:\n{listed}")
    return EngineConfig(values, num_ranks, expert_parallel_size, micro_batches)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file. Raises UserError: it is not there, or something else."""
    if not path.is_file():
        known = ", ".join(sorted(str(p) for p in path.parent.glob("*.json"))) or "none in that folder"
        raise UserError(f"no ds_config at {path}; found: {known}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object")
    return values


def _check_sections(values: dict[str, Any], problems: list[str]) -> None:
    """Report sections that are no objects, and put in their place what raises no further problem."""
    for section, replacement in (("zero_optimization", {"stage": 1}), ("expert_parallel", {"enabled": False})):
        if not isinstance(values.get(section, {}), dict):
            problems.append(f"{section} must be a JSON object, not {json.dumps(values[section])}")
            values[section] = replacement


def nearest_batch_size(spec: RunSpec, num_ranks: int) -> int:
    """Rows a step that this many ranks can share; data.batch_size itself if they can."""
    rows = spec.data.micro_batch_size * num_ranks
    return rows * max(1, round(spec.data.batch_size / rows))


def _count_micro_batches(spec: RunSpec, num_ranks: int, problems: list[str]) -> int:
    rows, nearest = spec.data.micro_batch_size * num_ranks, nearest_batch_size(spec, num_ranks)
    if spec.data.batch_size != nearest:
        problems.append(
            f"data.batch_size = {spec.data.batch_size} must be a multiple of data.micro_batch_size = "
            f"{spec.data.micro_batch_size} times the number of ranks = {num_ranks}; the nearest is {nearest}"
        )
    return max(1, spec.data.batch_size // rows)


def _facts_of_spec(spec: RunSpec, micro_batches: int) -> dict[str, Any]:
    """The keys whose home is the spec, as DeepSpeed spells them."""
    optimiser = spec.optimiser
    return {
        "train_batch_size": spec.data.batch_size,
        "train_micro_batch_size_per_gpu": spec.data.micro_batch_size,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": optimiser.gradient_clipping,
        "bf16": {"enabled": optimiser.precision == "bf16"},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": optimiser.learning_rate,
                "betas": list(optimiser.betas),
                "eps": optimiser.epsilon,
                "weight_decay": optimiser.weight_decay,
                # DeepSpeed's own Adam would be compiled on first use; torch's fused one needs no compiler.
                "torch_adam": True,
                "fused": True,
            },
        },
        "steps_per_print": 10**9,  # progress is mdseq's to print
    }


def _merge(values: dict[str, Any], facts: dict[str, Any], prefix: str, problems: list[str]) -> None:
    """Put `facts` into `values` where these are absent, "auto" or equal."""
    for key, fact in facts.items():
        found = values.get(key, AUTO)
        if isinstance(fact, dict) and isinstance(found, dict):
            _merge(found, fact, f"{prefix}{key}.", problems)
        elif found in (AUTO, fact):
            values[key] = fact
        else:
            problems.append(
                f"{prefix}{key} = {json.dumps(found)} contradicts the run spec, which makes it {json.dumps(fact)} "
                f'({_home(prefix + key)}); write "auto" in the ds_config'
            )


def _home(key: str) -> str:
    """Where in the spec a DeepSpeed key comes from."""
    homes = {
        "train_batch_size": "data.batch_size",
        "train_micro_batch_size_per_gpu": "data.micro_batch_size",
        "gradient_accumulation_steps": "data.batch_size over data.micro_batch_size and ranks",
        "gradient_clipping": "optimiser.gradient_clipping",
        "bf16": "optimiser.precision",
        "optimizer": "optimiser",
        "steps_per_print": "mdseq prints progress itself, every report.log_interval_steps",
        "expert_parallel": "mdseq's experts are of this form",
    }
    return homes[key.partition(".")[0]]


def _check_zero(values: dict[str, Any], problems: list[str]) -> None:
    stage = values.get("zero_optimization", {}).get("stage")
    if stage not in (1, 2, 3):
        problems.append(
            f"zero_optimization.stage = {json.dumps(stage)} must be 1, 2 or 3; stage 0 clips gradients wrongly with "
            "experts spread over ranks, and takes steps that are not finite (DeepSpeed 0.19.8); stage 1 costs no more"
        )
    for section in ("offload_optimizer", "offload_param"):
        if (values.get("zero_optimization", {}).get(section) or {}).get("device") == "nvme":
            problems.append(
                f'zero_optimization.{section}.device = "nvme" takes away weights that are averaged and saved; write '
                '"cpu" or "none"'
            )
    if values.get("zero_optimization", {}).get("round_robin_gradients"):
        problems.append(
            "zero_optimization.round_robin_gradients permutes the weights that checkpoints name (DeepSpeed 0.19.8); "
            "remove it"
        )
    for section, key in (("zero_optimization", "compute_grad_norm"), ("bf16", "check_grad_overflow")):
        found = values.get(section)
        if isinstance(found, dict) and found.get(key) is False:
            problems.append(f"{section}.{key} = false would take steps that are not finite; remove it")


def _complete_experts(values: dict[str, Any], spec: RunSpec, num_ranks: int, on_gpu: bool, problems: list[str]) -> int:
    """Set AutoEP's keys from the spec; the ds_config only says over how many ranks to spread the experts.

    Over one rank there is nothing to spread: our own layer computes the same, faster.
    """
    section = values.get("expert_parallel")
    if section is None or section.get("enabled", True) is False:
        values.pop("expert_parallel", None)
        return 1
    num_experts = spec.experts.num_experts
    if not num_experts:
        problems.append(
            "expert_parallel is set, but the run spec has no experts (experts.num_experts = 0); remove it, as "
            "ds_configs/zero2.json and zero3.json do, or raise num_experts"
        )
        return 1
    size = section.get("autoep_size", AUTO)
    if size == AUTO:
        size = math.gcd(num_ranks, num_experts)
    elif not isinstance(size, int) or size < 1 or num_ranks % size or num_experts % size:
        problems.append(
            f"expert_parallel.autoep_size = {json.dumps(size)} must divide the number of ranks = {num_ranks} and "
            f'experts.num_experts = {num_experts}; write "auto" for the largest that does'
        )
        return 1
    section["autoep_size"] = size
    of_this_run = {
        "route_norm": spec.experts.top_k > 1,  # as in RoutedExperts
        "use_grouped_mm": on_gpu,  # kernels of CUDA and Triton
    }
    _merge(section, _ADOPTED_LAYER | of_this_run, "expert_parallel.", problems)
    if size == 1:
        del values["expert_parallel"]
    return size

"""Whole weights out of a sharded engine, under the names that the plain PyTorch modules have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine


def master_partitions(engine: DeepSpeedEngine) -> list[Tensor]:
    """This rank's flat fp32 tensors that the optimiser updates; over all ranks they hold each weight once."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO-3
        return list(optimizer.fp32_partitioned_groups_flat)
    return list(optimizer.single_partition_of_fp32_groups)  # ZeRO-1 and 2


def gathered_weights(engine: DeepSpeedEngine) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the objective, whole, in fp32, one at a time; a collective over all ranks.

    AutoEP's expert weights are joined over the ranks that share them and given their own names back.
    """
    gate_up: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        weight = _whole(parameter)
        if not _is_expert(parameter):
            yield name.replace(".router.gate.", ".gate."), weight
            continue
        layer, _, part = name.rpartition(".")
        if part == "w2":
            yield f"{layer}.down_proj", weight
            continue
        gate_up[part] = weight
        if len(gate_up) == 2:
            yield f"{layer}.gate_up_proj", torch.cat([gate_up.pop("w1"), gate_up.pop("w3")], dim=1)


@torch.no_grad()
def _whole(parameter: nn.Parameter) -> Tensor:
    from deepspeed.utils import groups, safe_get_full_fp32_param

    weight = safe_get_full_fp32_param(parameter).detach().float()
    if not _is_expert(parameter):
        return weight
    group = groups._get_expert_parallel_group(getattr(parameter, "group_name"))  # noqa: B009 (set by AutoEP)
    parts = [torch.empty_like(weight) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, weight.contiguous(), group=group)
    return torch.cat(parts)


def _is_expert(parameter: nn.Parameter) -> bool:
    return getattr(parameter, "ds_zero_placement_family", None) == "autoep_expert"

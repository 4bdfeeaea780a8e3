"""Which values of which weight a rank's optimiser updates.

DeepSpeed flattens the weights, spreads them over ranks, and puts its own layers in the place of our experts. This is
the one place that knows how. Pieces are named as plain PyTorch names the weights, so what they say holds for any number
of ranks, with and without expert parallelism, in every ZeRO stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from mdseq.model.pieces import Piece

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine

MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam, as torch names them


@dataclass(frozen=True)
class Partition:
    """A flat fp32 tensor of this rank.

    Attributes:
        weights: Its values.
        pieces: What they are; what lies between pieces is padding.
        state: What Adam keeps of it, as torch names it: moments, flat as the weights, and "step"; empty before the
            first step.
    """

    weights: Tensor
    pieces: tuple[Piece, ...]
    state: dict[str, Tensor]

    def moment(self, name: str) -> Tensor:
        """One of MOMENTS; zeros before the first step."""
        return self.state[name] if name in self.state else torch.zeros_like(self.weights)


def partitions_of(engine: DeepSpeedEngine) -> list[Partition]:
    """All that this rank's optimiser updates; the pieces of all ranks are every weight, each value once."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    optimizer, state = engine.optimizer, engine.basic_optimizer.state
    if engine.zero_optimization_stage() == 3:
        flats, groups = optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups
        fragments = _partitioned_fragments
    else:
        flats, groups = optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups
        fragments = _sliced_fragments
    return [
        Partition(
            flat.detach(),
            tuple(
                piece
                for parameter, start, numel, offset in fragments(group)
                for piece in _plain_pieces(names[id(parameter)], parameter, start, numel, offset)
            ),
            state[flat],
        )
        for flat, group in zip(flats, groups, strict=True)
    ]


@torch.no_grad()
def publish_weights(engine: DeepSpeedEngine) -> None:
    """Make the partitions' values those that the next forward pass uses; a collective over all ranks."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() < 3:
        optimizer.update_lp_params()
        return
    optimizer.checkpoint_event_prologue()
    for flat, used in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat, strict=True):
        used.copy_(flat)
    optimizer.checkpoint_event_epilogue()


Fragment = tuple[Any, int, int, int]
"""A parameter, the first of its values, how many, and where the first lies in the flat tensor."""


def _partitioned_fragments(group: list[Any]) -> Iterator[Fragment]:
    """ZeRO-3: the same share of every parameter, the last ranks' padded."""
    offset = 0
    for parameter in group:
        share = parameter.partition_numel()
        start = share * parameter.ds_zero_partition_rank
        numel = min(share, parameter.ds_numel - start)
        if numel > 0:
            yield parameter, start, numel, offset
        offset += share


def _sliced_fragments(group: list[Any]) -> Iterator[Fragment]:
    """ZeRO-1 and 2: a slice of all parameters one after another."""
    for parameter in group:
        mapping = parameter._hp_mapping
        if mapping is not None:
            here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
            yield parameter, here.start, here.numel, there.start


def _plain_pieces(name: str, parameter: Any, start: int, numel: int, offset: int) -> Iterator[Piece]:
    """A fragment in terms of the module that DeepSpeed was given."""
    if not _is_expert(parameter):
        yield Piece(name.replace(".router.gate.", ".gate."), start, numel, offset)
        return
    layer, _, part = name.rpartition(".")
    shape = getattr(parameter, "ds_shape", parameter.shape)
    expert_numel = shape[1:].numel()
    start += expert_numel * shape[0] * dist.get_rank(_experts_group(parameter))
    if part == "w2":
        yield Piece(f"{layer}.down_proj", start, numel, offset)
        return
    # An expert's gate (w1) and up (w3) projections follow each other in gate_up_proj.
    end = start + numel
    while start < end:
        expert, within = divmod(start, expert_numel)
        count = min(end - start, expert_numel - within)
        yield Piece(f"{layer}.gate_up_proj", (2 * expert + (part == "w3")) * expert_numel + within, count, offset)
        start, offset = start + count, offset + count


def _is_expert(parameter: Any) -> bool:
    """Whether it belongs to experts that are spread over ranks."""
    return getattr(parameter, "ds_zero_placement_family", None) == "autoep_expert"


def _experts_group(parameter: Any) -> dist.ProcessGroup:
    from deepspeed.utils import groups

    return groups._get_expert_parallel_group(parameter.group_name)

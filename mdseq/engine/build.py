"""Starting and stopping DeepSpeed: process group, device, engine."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from mdseq.engine.arrival import ARRIVAL_SECONDS, meet_ranks
from mdseq.engine.config import EngineConfig

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine as DeepSpeedEngine  # for other floors' annotations too
    from torch import nn


def start_processes(arrival_seconds: float = ARRIVAL_SECONDS) -> torch.device:
    """Join the process group that the launcher's variables describe, or a group of one without a launcher.

    Args:
        arrival_seconds: How long to wait for all ranks.

    Returns:
        The device of this rank.

    Raises:
        Separated: They have not all come.
    """
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.constants import default_pg_timeout

    # DeepSpeed calls collectives by names that newer versions of torch are renaming.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if "RANK" not in os.environ:
        os.environ |= {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "0",  # whichever is free: nobody else needs to know
        }
    local_rank = int(os.environ["LOCAL_RANK"])
    if on_gpu:
        torch.cuda.set_device(local_rank)
    else:
        # DeepSpeed's shared-memory all-reduce takes a minute to compile and leaves 66 MiB a rank in /dev/shm.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        ranks_here = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    backend = "nccl" if on_gpu else "gloo"
    world_size = int(os.environ["WORLD_SIZE"])
    if not dist.is_initialized():
        dist.init_process_group(
            backend,
            store=meet_ranks(arrival_seconds),
            rank=int(os.environ["RANK"]),
            world_size=world_size,
            timeout=default_pg_timeout,
            # As DeepSpeed does it: where the device is not said, torch guesses it from the rank among all nodes.
            device_id=device if on_gpu and world_size > 1 else None,
        )
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
    return device


def stop_processes() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def build_engine(objective: nn.Module, config: EngineConfig) -> DeepSpeedEngine:
    """Wrap the objective: `engine(batch)` is its loss, `engine.backward` and `engine.step` train it.

    The objective must have been built from the same seed on every rank: DeepSpeed spreads experts without comparing
    them. Matrices take the configured weight decay; vectors (norms, biases, the absorbing state) none.
    """
    import deepspeed

    if config.values["bf16"]["enabled"]:
        # What stays in float32, products with the vocabulary above all, may be as exact as TF32: 11 bits, not 8.
        torch.backends.cuda.matmul.allow_tf32 = True
    parameters = [p for p in objective.parameters() if p.requires_grad]
    groups = [
        {"name": "matrices", "params": [p for p in parameters if p.ndim >= 2]},
        {"name": "vectors", "params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    engine, *_ = deepspeed.initialize(
        model=objective, model_parameters=groups, config=config.values, dist_init_required=False
    )
    for module in engine.module.modules():
        if getattr(module, "use_grouped_mm", False):  # experts of AutoEP
            module.register_forward_pre_hook(_multiply_unaligned_experts_one_by_one)
    return engine


def _multiply_unaligned_experts_one_by_one(experts: Any, _inputs: object) -> None:
    """torch's grouped product refuses weights that do not start at a multiple of 16 bytes.

    Under ZeRO-3 they may start anywhere: shares of all weights follow each other in one buffer. After DeepSpeed's own
    hook, which makes the weights whole.
    """
    experts.use_grouped_mm = all(weight.data_ptr() % 16 == 0 for weight in experts.parameters(recurse=False))

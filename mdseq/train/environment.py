"""Where and with what a run is computed: what one wants to know when its numbers cannot be had again elsewhere."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, TypeVar

import torch

from mdseq import __version__

ROOT = Path(__file__).parent.parent.parent
EARLIER = "earlier_starts"
GIT_SECONDS = 10.0
_SLURM = ("JOB_ID", "ARRAY_TASK_ID", "JOB_NAME", "JOB_NODELIST", "JOB_PARTITION", "RESTART_COUNT")
# What steers a run from outside its spec and its ds_config.
_STEERING = (
    "NCCL_", "GLOO_", "UCX_", "FI_", "TORCH_", "TORCHINDUCTOR_", "TORCHELASTIC_", "PYTORCH_", "TRITON_", "CUDA_",
    "CUBLAS_", "DS_", "OMP_", "MKL_", "MASTER_", "HF_HOME", "TMPDIR",
)  # fmt: skip
_SECRET = re.compile("TOKEN|KEY|SECRET|PASSW|CREDENTIAL|AUTH", re.IGNORECASE)

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Where a rank runs.

    Attributes:
        host: Its node's name.
        gpu: Its GPU's name and memory; empty without one.
    """

    host: str
    gpu: str

    @classmethod
    def of(cls, device: torch.device) -> Place:
        """Of this rank, which computes on `device`."""
        gpu = ""
        if device.type == "cuda":
            found = torch.cuda.get_device_properties(device)
            gpu = f"{found.name}, {found.total_memory / 2**30:.1f} GiB"
        return cls(platform.node(), gpu)


def environment(places: Sequence[Place]) -> dict[str, Any]:
    """Of this start, as rank 0 sees it; what cannot be found out is null, and fails nothing.

    Args:
        places: Of all ranks, in their order.
    """
    slurm = {name: os.environ[name] for name in (f"SLURM_{key}" for key in _SLURM) if name in os.environ}
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": _found(_packages),
        "git": _found(lambda: git_state(ROOT)),
        "cpu": {
            "model": _found(_cpu_model),
            "cores": os.cpu_count(),
            "usable_cores": _found(lambda: len(os.sched_getaffinity(0))),
            "memory_gib": _found(lambda: round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)),
        },
        "cuda": _found(_cuda) if any(place.gpu for place in places) else None,
        "num_ranks": len(places),
        "nodes": _nodes(places),
        "slurm": slurm or None,
        "variables": steering_variables(os.environ),
    }


def with_earlier(now: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """This start's environment, and in it those of earlier starts that the file at `path` holds, oldest first."""
    if not path.is_file():
        return {**now, EARLIER: []}
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        before = json.loads(text)
        return {**now, EARLIER: [*before.pop(EARLIER, []), before]}
    except (ValueError, AttributeError, TypeError):  # not what a run has written; kept as it is
        return {**now, EARLIER: [text]}


def steering_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """Those that steer a run, but none that may be a secret."""
    return {
        name: value
        for name, value in sorted(variables.items())
        if name.startswith(_STEERING) and not _SECRET.search(name)
    }


def git_state(checkout: Path) -> dict[str, Any] | None:
    """Its commit, its branch and how many files differ from the commit; None if it is no checkout."""
    if not (checkout / ".git").exists():  # a package installed into another project's checkout is none
        return None
    command = ["git", "-C", str(checkout), "--no-optional-locks", "status", "--porcelain=v2", "--branch"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=GIT_SECONDS).stdout.splitlines()
    header = dict(line.removeprefix("# branch.").split(" ", 1) for line in lines if line.startswith("# branch."))
    changed = sum(not line.startswith("#") for line in lines)
    return {"commit": header["oid"], "branch": header["head"], "is_clean": not changed, "num_changed_files": changed}


def _packages() -> dict[str, str]:
    """mdseq, what it requires, and the compiler of its kernels, as far as they are installed."""
    try:
        required = [line for line in requires("mdseq") or [] if "extra ==" not in line]
    except PackageNotFoundError:  # runs from a checkout that is not installed
        required = []
    names = [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in required]
    found = {"mdseq": __version__}
    for name in dict.fromkeys(("torch", "triton", "deepspeed", *names)):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _cpu_model() -> str:
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    return next(line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name"))


def _cuda() -> dict[str, Any]:
    return {
        "cuda": torch.version.cuda,
        "nccl": _found(lambda: ".".join(map(str, torch.cuda.nccl.version()))),
        "driver": _found(lambda: Path("/sys/module/nvidia/version").read_text(encoding="utf-8").strip()),
    }


def _nodes(places: Sequence[Place]) -> dict[str, Any]:
    """By node: its ranks, and their GPUs in the same order."""
    nodes: dict[str, Any] = {}
    for rank, place in enumerate(places):
        node = nodes.setdefault(place.host, {"ranks": [], "gpus": []})
        node["ranks"].append(rank)
        node["gpus"] += [place.gpu] if place.gpu else []
    return nodes


def _found(look: Callable[[], T]) -> T | None:
    try:
        return look()
    except Exception:  # whatever it is, a run is worth more than this
        return None

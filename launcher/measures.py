"""The measuring part of preflight: all ranks of a group, at the same time."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from launcher.figures import RankReport
from launcher.links import links_of
from mdseq import __version__
from mdseq.data.corpus import Corpus
from mdseq.engine.agreement import Agreement
from mdseq.errors import UserError
from mdseq.files import nearest_existing
from mdseq.train.watch import Limit, Watch

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
REPETITIONS = 5
DISK_BYTES, DISK_TRIES = 16 * 2**20, 3
# A collective that takes longer has met a rank or a link that is as good as dead.
COMMUNICATION_SECONDS = 60.0
# A check that takes longer hangs, as file systems may; nothing can end it but the process.
CHECK_SECONDS = 120.0
# File systems over a network may show a new file to other nodes late.
VISIBLE_SECONDS = 10.0


class Notes:
    """What a rank has found so far; an error in one check does not keep it from the next, where others wait for it."""

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}
        self.facts: dict[str, str] = {}
        self.errors: dict[str, str] = {}
        self.num_checks = 0

    @contextmanager
    def checking(self, check: str) -> Iterator[None]:
        """Inside, an exception becomes the check's error."""
        self.num_checks += 1
        try:
            yield
        except UserError as error:
            self.errors[check] = str(error)
        except Exception as error:
            self.errors[check] = f"{check}: {type(error).__name__}: {error}"


def measure(device: torch.device, data: Path | None, output: Path) -> list[RankReport]:
    """Make every check; all ranks of the process group call this.

    Args:
        device: This rank's.
        data: The dataset to train on, if any.
        output: The run folder; it is not made.

    Returns:
        The reports of all ranks, on every rank.
    """
    agreement, notes = Agreement(), Notes()
    clock_skew = clock_skew_seconds(agreement)
    nodes = agreement.gather(platform.node())
    with Watch(lambda: notes.num_checks, Limit(CHECK_SECONDS, f"no check has ended for {CHECK_SECONDS:g} s")):
        measure_alone(agreement, notes, device, data, output)
        check_output_is_shared(agreement, notes, output)
        if agreement.num_ranks > 1:
            communicate(agreement, notes, device, nodes)
    report = RankReport(
        agreement.rank,
        nodes[agreement.rank],
        describe(device),
        notes.figures,
        notes.facts,
        {name: value for name, value in os.environ.items() if name.startswith(("NCCL_", "GLOO_"))},
        clock_skew,
        notes.errors,
    )
    return agreement.gather(report)


def measure_alone(agreement: Agreement, notes: Notes, device: torch.device, data: Path | None, output: Path) -> None:
    """What needs no other rank; all do it at once, so that what they share is shared as in training."""
    checks: dict[str, Callable[[], dict[str, float]]] = {
        "memory": lambda: free_memory(device),
        "matrix products": lambda: matrix_products(device),
        "disk": lambda: disk(output),
    }
    for check, figures in checks.items():
        agreement.wait()
        with notes.checking(check):
            notes.figures |= figures()
    with notes.checking("versions"):
        notes.facts |= versions()
    if data is not None:
        with notes.checking("dataset"):
            notes.facts["dataset"] = Corpus.open(data, "train").manifest.fingerprint[:12]


def describe(device: torch.device) -> str:
    """The GPU's name, or how many threads the CPU computes with."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, threads: {torch.get_num_threads()}"


# On each rank alone


def free_memory(device: torch.device) -> dict[str, float]:
    """Of the device, the host and its shared memory."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    kib = next(int(fields[1]) for fields in lines if fields[0] == "MemAvailable:")
    found = {"host_memory_gib": kib * 1024 / GIB, "shared_memory_gib": shutil.disk_usage("/dev/shm").free / GIB}
    if device.type == "cuda":
        found["device_memory_gib"] = torch.cuda.mem_get_info(device)[0] / GIB
    return found


def matrix_products(device: torch.device) -> dict[str, float]:
    """The rate of dense products, in bf16 on a GPU and fp32 on a CPU."""
    size, dtype, products = (8192, torch.bfloat16, 10) if device.type == "cuda" else (1024, torch.float32, 1)
    # Random, for a GPU multiplies constants in less power, and so faster; and nobody else's random numbers are used up.
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, dtype=dtype, device=device, generator=generator) for _ in range(2))
    out = torch.empty_like(a)

    def multiply() -> None:
        for _ in range(products):
            torch.mm(a, b, out=out)

    return {"matrix_products_tflops": products * 2 * size**3 / _best_seconds(multiply, device) / 1e12}


def disk(output: Path) -> dict[str, float]:
    """Write, sync and read back a file where the run folder will be.

    Raises:
        UserError: It cannot be written, or other bytes come back.
    """
    folder = nearest_existing(output)
    content = os.urandom(DISK_BYTES)  # a file system cannot compress it
    try:
        # On a file system that others use, the fastest of a few tries tells most.
        tries = [_write_and_read(folder, content) for _ in range(DISK_TRIES)]
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(f"cannot write in {folder}: {error.strerror}; choose another --output") from None
    write_seconds, read_seconds = (min(seconds) for seconds in zip(*tries, strict=True))
    return {
        "disk_write_mb_per_second": DISK_BYTES / write_seconds / 1e6,
        "disk_read_mb_per_second": DISK_BYTES / read_seconds / 1e6,
        "disk_free_gib": free / GIB,
    }


def _write_and_read(folder: Path, content: bytes) -> tuple[float, float]:
    """The seconds that each took."""
    with tempfile.TemporaryFile(dir=folder) as file:  # has no name that could stay behind
        start = time.perf_counter()
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter()
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # or it would be read from memory
        file.seek(0)
        start_reading = time.perf_counter()
        found = file.read()
        read = time.perf_counter()
    if found != content:
        raise UserError(f"a file written in {folder} is read back with other bytes; choose another --output")
    return written - start, read - start_reading


def versions() -> dict[str, str]:
    """Of all that must be the same on every node."""
    driver = Path("/sys/module/nvidia/version")
    on_gpu = torch.cuda.is_available()
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
        "mdseq": __version__,
        "source files": _digest_of_sources(),
        "CUDA": torch.version.cuda or "none",
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else "none",
        "driver": driver.read_text().strip() if driver.exists() else "none",
    }
    commit = _commit()
    return found | {"commit": commit} if commit else found  # a node may lack git


def _digest_of_sources() -> str:
    """A commit does not tell of files that somebody has changed on one node."""
    paths = sorted(path for package in ("mdseq", "launcher") for path in (ROOT / package).rglob("*.py"))
    return sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:12]


def _commit() -> str:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return ""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


# On all ranks together


def clock_skew_seconds(agreement: Agreement) -> float:
    """How far this rank's clock is ahead of rank 0's.

    Every rank reads its clock between two barriers, and rank 0 once before and once after them: a reading belongs to
    the midpoint, give or take half the time in between. The narrowest of a few tries counts.
    """
    tries = []
    for _ in range(REPETITIONS):
        before = time.time()
        agreement.wait()
        here = time.time()
        agreement.wait()
        after = time.time()
        first_before, first_after = agreement.gather((before, after))[0]
        tries.append((first_after - first_before, here - (first_before + first_after) / 2))
    return min(tries)[1]


def check_output_is_shared(agreement: Agreement, notes: Notes, output: Path) -> None:
    """Whether every rank sees a file that rank 0 writes where the run folder will be."""
    with ExitStack() as stack:
        marker = None
        if agreement.rank == 0 and "disk" not in notes.errors:
            before = signal.signal(signal.SIGTERM, _leave)  # not before the file is gone
            stack.callback(signal.signal, signal.SIGTERM, before)
            with notes.checking("output"):
                folder = nearest_existing(output)
                file = stack.enter_context(tempfile.NamedTemporaryFile(prefix=".preflight-", dir=folder))
                marker = os.path.relpath(file.name, output.absolute())
        marker = agreement.gather(marker)[0]
        if marker is not None:
            with notes.checking("output"):
                _wait_for(Path(os.path.normpath(output.absolute() / marker)))
        agreement.wait()


def _leave(number: int, _: object) -> NoReturn:
    sys.exit(128 + number)


def _wait_for(path: Path) -> None:
    end = time.monotonic() + VISIBLE_SECONDS
    while not path.exists():
        if time.monotonic() > end:
            raise UserError(
                f"a file that rank 0 has written in {path.parent} cannot be seen here after {VISIBLE_SECONDS:g} s; "
                "choose an --output on a file system that all nodes share"
            )
        time.sleep(0.05)


def communicate(agreement: Agreement, notes: Notes, device: torch.device, nodes: Sequence[str]) -> None:
    """Measure all-reduce, all-to-all and single links, with what training communicates through."""
    group = dist.new_group(timeout=timedelta(seconds=COMMUNICATION_SECONDS))
    buffers: list[torch.Tensor] = []
    with notes.checking("buffers"):
        num_bytes = (256 if device.type == "cuda" else 8) * 2**20
        num_floats = num_bytes // 4 // agreement.num_ranks * agreement.num_ranks
        buffers = [torch.zeros(num_floats, device=device) for _ in range(2)]
    if not agreement.all(bool(buffers)):
        return
    together: dict[str, Callable[..., dict[str, float]]]
    together = {"all-reduce": all_reduce, "all-to-all": all_to_all, "links": partial(link_rates, agreement, nodes)}
    for check, figures in together.items():
        agreement.wait()
        with notes.checking(check):
            notes.figures |= figures(group, *buffers)
        if agreement.any(check in notes.errors):  # the ranks may be out of step with each other
            return
    dist.destroy_process_group(group)


def all_reduce(group: dist.ProcessGroup, sent: torch.Tensor, _: torch.Tensor) -> dict[str, float]:
    """Bus bandwidth: what each rank of a ring sends per second, 2 (n-1)/n of the buffer; and how many small ones."""
    num_ranks = group.size()
    small = torch.zeros(1, device=sent.device)
    large_seconds = _best_seconds(lambda: dist.all_reduce(sent, group=group), sent.device)
    small_seconds = _best_seconds(lambda: dist.all_reduce(small, group=group), sent.device, repetitions=50)
    traffic = 2 * (num_ranks - 1) / num_ranks * sent.nbytes
    return {"all_reduce_gb_per_second": traffic / large_seconds / 1e9, "all_reduces_per_second": 1 / small_seconds}


def all_to_all(group: dist.ProcessGroup, sent: torch.Tensor, received: torch.Tensor) -> dict[str, float]:
    """What a rank sends to the others per second, (n-1)/n of the buffer."""
    num_ranks = group.size()
    seconds = _best_seconds(lambda: dist.all_to_all_single(received, sent, group=group), sent.device)
    return {"all_to_all_gb_per_second": (num_ranks - 1) / num_ranks * sent.nbytes / seconds / 1e9}


def link_rates(
    agreement: Agreement, nodes: Sequence[str], group: dist.ProcessGroup, sent: torch.Tensor, received: torch.Tensor
) -> dict[str, float]:
    """Two ranks at a time send each other the buffer; per second and direction."""
    rates = {}
    links = links_of(nodes)
    for turn in sorted({link.turn for link in links}):
        agreement.wait()
        for link in links:
            if link.turn != turn or agreement.rank not in (link.rank, link.peer):
                continue
            peer = link.peer if agreement.rank == link.rank else link.rank
            seconds = _best_seconds(partial(_exchange, group, peer, sent, received), sent.device)
            if agreement.rank == link.rank:
                rates[link.figure] = sent.nbytes / seconds / 1e9
    return rates


def _exchange(group: dist.ProcessGroup, peer: int, sent: torch.Tensor, received: torch.Tensor) -> None:
    sending = dist.P2POp(dist.isend, sent, peer, group)
    receiving = dist.P2POp(dist.irecv, received, peer, group)
    for work in dist.batch_isend_irecv([sending, receiving]):
        work.wait()


def _best_seconds(action: Callable[[], object], device: torch.device, repetitions: int = REPETITIONS) -> float:
    """The shortest time that it took, but for the first, which sets things up."""
    tries = []
    for _ in range(1 + repetitions):
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        tries.append(time.perf_counter() - start)
    return min(tries[1:])

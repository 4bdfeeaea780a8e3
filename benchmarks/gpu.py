"""Milliseconds on a GPU, and what it does at most in the same run; on a CPU, dry runs of the same paths."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mdseq.errors import UserError

Run = Callable[..., Tensor]


@dataclass(frozen=True)
class Bench:
    """Where to measure and how."""

    device: str
    dtype: torch.dtype
    warmups: int
    repeats: int

    @classmethod
    def of(cls, dry: bool, warmups: int = 5, repeats: int = 20) -> Bench:
        """In bf16 on the GPU; or a dry run, whose figures have no meaning.

        Raises:
            UserError: There is no GPU, and no dry run was asked for.
        """
        if dry:
            return cls("cpu", torch.float32, warmups=0, repeats=1)
        if not torch.cuda.is_available():
            raise UserError(
                "no CUDA GPU here: run this where torch.cuda.is_available(), or try the script itself on the CPU with "
                "--dry_run"
            )
        return cls("cuda", torch.bfloat16, warmups, repeats)

    def __str__(self) -> str:
        if self.dry:
            return "dry run on the CPU: every path, figures without meaning"
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"

    @property
    def dry(self) -> bool:
        return self.device == "cpu"

    def milliseconds(self, run: Callable[[], object]) -> float:
        """The median of several runs after some to warm up, by CUDA events."""
        for _ in range(self.warmups):
            run()
        if self.dry:
            started = time.perf_counter()
            run()
            return (time.perf_counter() - started) * 1e3
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(self.repeats)]
        for start, end in events:
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in events)

    def forward(self, function: Run, inputs: Sequence[Tensor]) -> float:
        with torch.no_grad():
            return self.milliseconds(lambda: function(*inputs))

    def backward(self, function: Run, inputs: Sequence[Tensor]) -> float:
        """Of the backward pass alone."""
        inputs = [x.detach().requires_grad_() for x in inputs]
        out = function(*inputs)
        grad = torch.randn_like(out)
        return self.milliseconds(lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True))

    def both(self, function: Run, inputs: Sequence[Tensor]) -> float:
        inputs = [x.detach().requires_grad_() for x in inputs]
        grad = torch.randn_like(function(*inputs))
        return self.milliseconds(lambda: torch.autograd.grad(function(*inputs), inputs, grad))

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype)


@dataclass(frozen=True)
class Ceilings:
    """What the GPU does at most in the same run: a product of large matrices, and a large copy, read and written."""

    product_flops: float
    copy_bytes: float

    @classmethod
    def measured(cls, bench: Bench) -> Ceilings:
        size, num_bytes = (256, 2**16) if bench.dry else (8192, 2**32)
        a, b = bench.random(size, size), bench.random(size, size)
        product = bench.milliseconds(lambda: a @ b)
        source = torch.empty(num_bytes // 2, device=bench.device, dtype=torch.int16)
        target = torch.empty_like(source)
        copy = bench.milliseconds(lambda: target.copy_(source))
        return cls(2 * size**3 / product * 1e3, 2 * num_bytes / copy * 1e3)

    def __str__(self) -> str:
        return f"product {self.product_flops / 1e12:,.0f} TFLOP/s, copy {self.copy_bytes / 1e12:.2f} TB/s"

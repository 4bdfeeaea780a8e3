"""What happens around steps: metrics and progress, samples, checkpoints."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mdseq.data.format import Kind
from mdseq.data.lengths import LengthTable
from mdseq.data.tokenizer import Tokenizer
from mdseq.engine.checkpoint import CheckpointManifest, CheckpointWriter, remove_old_checkpoints
from mdseq.generate.prompts import PREDICTED, Prompt
from mdseq.generate.sampler import SamplerOptions, usual_solver
from mdseq.generate.text import TextGenerator
from mdseq.model.saved import CONFIG_FILE, ModelConfig
from mdseq.report.metrics import MetricsWriter
from mdseq.train.held_out import Probe, Validation
from mdseq.train.loop import Trainer
from mdseq.train.run_folder import RunFolder


class ValidationHook:
    """Every few steps and at the end: the loss of held-out rows. Before the other hooks, which note it."""

    def __init__(self, validation: Validation, interval_steps: int) -> None:
        self.validation = validation
        self.interval_steps = interval_steps

    def after_step(self, trainer: Trainer) -> None:
        if trainer.step % self.interval_steps == 0 or trainer.is_last_step:
            trainer.valid_loss = self.validation.loss(trainer)

    def close(self) -> None:
        """Nothing to release."""


class MetricsHook:
    """After the first step, then every few: sums the statistics over ranks; rank 0 prints and writes the metrics."""

    def __init__(self, writer: MetricsWriter | None, interval_steps: int) -> None:
        self.writer = writer
        self.interval_steps = interval_steps
        self._started: tuple[float, int, int] | None = None

    def after_step(self, trainer: Trainer) -> None:
        if self._started is None:  # the first step's time is start-up
            self._started = (time.monotonic(), trainer.tokens, trainer.step)
            self._since = self._started
        due = trainer.step % self.interval_steps == 0 or trainer.step == 1 or trainer.is_last_step
        if not due and trainer.valid_loss is None:
            return
        statistics = trainer.objective.statistics
        dist.all_reduce(statistics.tally)
        means = statistics.take()
        balance = trainer.objective.balance
        load = balance.take_load().tolist() if balance is not None else []
        now = time.monotonic()
        seconds, tokens = now - self._since[0], trainer.tokens - self._since[1]
        self._since = (now, trainer.tokens, trainer.step)
        if self.writer is None or not means:  # no step since the last report was taken
            return
        metrics = {
            "step": trainer.step,
            **means,
            **({} if trainer.valid_loss is None else {"valid_loss": trainer.valid_loss}),
            "tokens": trainer.tokens,
            "tokens_per_second": tokens / seconds if seconds and tokens else 0.0,
            "grad_norm": trainer.guard.gradient_norm,
            "skipped_steps": trainer.guard.skipped,
            "learning_rate": trainer.learning_rate,
            **({} if trainer.spread is None else trainer.spread.metrics()),
            "peak_memory_gib": _peak_memory_bytes(trainer.device) / 2**30,
            "expert_load": load,
        }
        self.writer.write(metrics)
        self._print(trainer, metrics, now)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()

    def _print(self, trainer: Trainer, metrics: dict[str, Any], now: float) -> None:
        assert self._started is not None
        steps = trainer.spec.schedule.steps
        taken = trainer.step - self._started[2]
        pace = f"{metrics['tokens_per_second']:,.0f} tokens/s  "
        left = f"left {_duration((steps - trainer.step) * (now - self._started[0]) / taken)}" if taken else "warming up"
        load = max((max(share) * len(share) for share in metrics["expert_load"]), default=0.0)
        print(
            f"step {trainer.step:>{len(str(steps))}}/{steps}  loss {metrics['loss']:.4f}  "
            + (f"valid {metrics['valid_loss']:.4f}  " if "valid_loss" in metrics else "")
            + f"grad {metrics['grad_norm']:.2f}  lr {metrics['learning_rate']:.2e}  "
            + (f"busiest expert {load:.2f}x  " if load else "")
            + (pace if taken else "")
            + f"{metrics['peak_memory_gib']:.1f} GiB  {left}",
            flush=True,
        )


class CheckpointHook:
    """Saves every few steps and at the end; keeps the newest.

    Args:
        run: Where to.
        writer: Of checkpoints.
        manifest: What each one says of the run.
        model: And of its weights.
        probe: Whose loss it notes.
        files: More to put in, by name.
    """

    def __init__(
        self,
        run: RunFolder,
        writer: CheckpointWriter,
        manifest: CheckpointManifest,
        model: ModelConfig,
        probe: Probe,
        files: Mapping[str, bytes],
    ) -> None:
        self.run = run
        self.writer = writer
        self.manifest = manifest
        self.model = model
        self.probe = probe
        self.files = files

    def after_step(self, trainer: Trainer) -> None:
        checkpoint, last = trainer.spec.checkpoint, trainer.is_last_step
        self._announce(self.writer.complete(), trainer)
        if trainer.step % checkpoint.interval_steps and not last:
            return
        self._announce(self.writer.finish(), trainer)
        manifest = replace(
            self.manifest, step=trainer.step, probe_loss=self.probe.loss(trainer), valid_loss=trainer.valid_loss
        )
        files = {**self.files, CONFIG_FILE: self.model.at_step(trainer.step).to_json().encode()}
        self.writer.start(manifest, trainer.state_dict(), files)
        if last or not checkpoint.background:
            self._announce(self.writer.finish(), trainer)

    def close(self) -> None:
        """Nothing to release: what a failed run was writing is not a checkpoint."""

    def _announce(self, path: Path | None, trainer: Trainer) -> None:
        if path is not None and trainer.agreement.rank == 0:
            remove_old_checkpoints(self.run.checkpoints, trainer.spec.checkpoint)
            print(f"saved {path}", flush=True)


class SampleHook:
    """Every few steps: generates text with the current weights, into samples/ and TensorBoard.

    All ranks generate the same, for experts and shards are spread over them; rank 0 writes. A model of pairs is given
    sources of the corpus, and writes as much as they ask for; a model of texts writes from nothing.
    """

    def __init__(
        self,
        run: RunFolder,
        writer: MetricsWriter | None,
        tokenizer: Tokenizer,
        kind: Kind,
        lengths: LengthTable,
        sources: Sequence[str],
    ) -> None:
        self.run = run
        self.writer = writer
        self.tokenizer = tokenizer
        self.kind = kind
        self.lengths = lengths
        self.sources = sources

    def after_step(self, trainer: Trainer) -> None:
        report, steps = trainer.spec.report, trainer.spec.schedule.steps
        if not report.sample_interval_steps or (trainer.step % report.sample_interval_steps and trainer.step != steps):
            return
        objective = trainer.objective
        objective.eval()
        with torch.no_grad():
            model = objective.model()
            generator = TextGenerator(model, self.tokenizer, self.kind, lengths=self.lengths)
            length = PREDICTED if self.kind == "pair" else report.sample_length
            prompts = [Prompt(source, length, i) for i, source in enumerate(self.sources)]
            options = SamplerOptions(report.sample_solver_steps, usual_solver(model), seed=trainer.spec.seed)
            texts = generator.generate(prompts, options)
        objective.train()
        if self.writer is not None:
            page = "\n".join(
                f"--- source: {source!r}\n{text}" for source, text in zip(self.sources, texts, strict=True)
            )
            (self.run.samples / f"step-{trainer.step:08d}.txt").write_text(page + "\n", encoding="utf-8")
            self.writer.write_text("samples", page, trainer.step)

    def close(self) -> None:
        """Nothing to release."""


def _peak_memory_bytes(device: torch.device) -> int:
    """The most that this rank has held so far: on its GPU, or of the process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"

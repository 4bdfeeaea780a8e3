"""From a validated spec to a running trainer: the one place where all parts of a run meet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from mdseq.data.clean_ends import CleanEnds
from mdseq.data.corpus import Corpus
from mdseq.data.format import TOKENIZER_FILE
from mdseq.data.lengths import LengthTable
from mdseq.data.loader import Loader
from mdseq.data.tokenizer import SpecialToken, Tokenizer
from mdseq.diffusion.objective import DiffusionObjective
from mdseq.engine.build import build_engine, start_processes, stop_processes
from mdseq.engine.checkpoint import CheckpointManifest, load_checkpoint
from mdseq.engine.config import EngineConfig
from mdseq.engine.ema import WeightAverage
from mdseq.errors import UserError
from mdseq.model.denoiser import DenoiserConfig
from mdseq.model.saved import ModelConfig
from mdseq.report.metrics import MetricsWriter
from mdseq.spec import RunSpec
from mdseq.train.attention import choose_attention
from mdseq.train.hooks import CheckpointHook, MetricsHook, SampleHook
from mdseq.train.loop import Hook, Trainer
from mdseq.train.rows import Rows
from mdseq.train.run_folder import RunFolder, check_same_run


@dataclass(frozen=True)
class RunPlan:
    """A run that has passed every check that needs no process group.

    Attributes:
        resume_from: The checkpoint to continue, or None.
    """

    spec: RunSpec
    engine: EngineConfig
    corpus: Corpus
    rows: Rows
    tokenizer: Tokenizer
    run: RunFolder
    resume_from: Path | None


def plan_run(spec: RunSpec, engine: EngineConfig, output: Path, resume: str) -> RunPlan:
    """Open the data, choose the checkpoint and check that the output can be written; writes nothing.

    Raises:
        UserError: Whatever stands in the way.
    """
    if not spec.data.path:
        raise UserError("no dataset: give --data DIR (or data.path), a folder made by `make prep`")
    corpus = Corpus.open(Path(spec.data.path), "train")
    rows = Rows.of(corpus, spec)
    tokenizer = Tokenizer.load(Path(spec.data.path) / TOKENIZER_FILE)
    run = RunFolder(output)
    run.check_usable()
    found = run.find_checkpoint(resume)
    if found is not None:
        check_same_run(*found, spec, engine, corpus.manifest.fingerprint)
    return RunPlan(spec, engine, corpus, rows, tokenizer, run, found[0] if found else None)


def train(plan: RunPlan) -> None:
    """Run to the end; every rank calls this."""
    device = start_processes()
    try:
        trainer = _build_trainer(plan, device)
        trainer.run(_build_hooks(plan, trainer))
    finally:
        stop_processes()


def _build_trainer(plan: RunPlan, device: torch.device) -> Trainer:
    spec, corpus = plan.spec, plan.corpus
    attention = choose_attention(spec, device)
    if dist.get_rank() == 0:
        print(f"attention engine: {attention.engine} ({attention.reason})", flush=True)
    torch.manual_seed(spec.seed)  # the same initial weights on every rank
    objective = DiffusionObjective(spec, corpus.manifest.vocab_size, device)
    engine = build_engine(objective, plan.engine)
    loader = Loader(
        corpus,
        plan.rows.packing,
        plan.rows.order,
        spec.data.row_length,
        spec.data.batch_size,
        spec.data.micro_batch_size,
        dist.get_rank(),
        dist.get_world_size(),
        CleanEnds.of(spec) if corpus.manifest.kind == "text" else None,
        device,
    )
    trainer = Trainer(spec, engine, loader, WeightAverage(engine, spec.optimiser.ema_decay), device)
    if plan.resume_from is not None:
        trainer.load_state_dict(load_checkpoint(plan.resume_from, engine, trainer.average))
    return trainer


def _build_hooks(plan: RunPlan, trainer: Trainer) -> list[Hook]:
    """Metrics first, so that a checkpoint's step has been logged when it is saved."""
    spec, manifest = plan.spec, plan.corpus.manifest
    writer = None
    if dist.get_rank() == 0:
        plan.run.write_description(spec, plan.engine)
        writer = MetricsWriter(plan.run.path, trainer.step)
        start = f"continuing {plan.resume_from}" if plan.resume_from else f"starting {plan.run.path} from the beginning"
        print(f"{start}: step {trainer.step} of {spec.schedule.steps}\n{plan.rows.describe()}", flush=True)
    checkpoint = CheckpointManifest(
        step=trainer.step,
        num_ranks=plan.engine.num_ranks,
        expert_parallel_size=plan.engine.expert_parallel_size,
        zero_stage=plan.engine.zero_stage,
        dataset_fingerprint=manifest.fingerprint,
        spec=spec.model_dump(mode="json"),
    )
    lengths = LengthTable.of(plan.corpus)
    model = ModelConfig(
        denoiser=DenoiserConfig.of(spec, manifest.vocab_size),
        noise_schedule=spec.diffusion.noise_schedule,
        num_timesteps=spec.diffusion.num_timesteps,
        noise_factor=spec.diffusion.noise_factor,
        estimate=spec.diffusion.estimate,
        gamma=spec.diffusion.gamma * spec.diffusion.absorbing,
        document_kind=manifest.kind,
        row_length=spec.data.row_length,
        step=trainer.step,
        condition_dropout=spec.diffusion.condition_dropout,
        lengths=lengths.to_dict(),
    )
    tokenizer_path = Path(spec.data.path) / TOKENIZER_FILE
    return [
        MetricsHook(writer, spec.report.log_interval_steps),
        SampleHook(plan.run, writer, plan.tokenizer, manifest.kind, lengths, _sample_sources(plan)),
        CheckpointHook(plan.run, checkpoint, model, tokenizer_path),
    ]


def _sample_sources(plan: RunPlan) -> list[str]:
    """Sources for the samples: of the first pairs, or nothing for texts."""
    corpus, count = plan.corpus, plan.spec.report.num_samples
    if corpus.manifest.kind == "text":
        return [""] * count
    sources = []
    for document in range(min(count, corpus.num_documents)):
        ids = corpus.tokens(document, 0, corpus.target_start(document))
        sources.append(plan.tokenizer.decode([i for i in ids.tolist() if i >= len(SpecialToken)]))
    return sources

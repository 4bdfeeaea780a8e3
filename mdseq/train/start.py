"""From a validated spec to a running trainer: the one place where all parts of a run meet."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from mdseq.data.clean_ends import CleanEnds
from mdseq.data.corpus import Corpus
from mdseq.data.format import TOKENIZER_FILE
from mdseq.data.lengths import LengthTable, check_sources
from mdseq.data.loader import Loader
from mdseq.data.tokenizer import SpecialToken, Tokenizer
from mdseq.diffusion.objective import DiffusionObjective
from mdseq.diffusion.schedule import NoiseSchedule
from mdseq.engine.agreement import Agreement
from mdseq.engine.arrival import has_lost_ranks
from mdseq.engine.build import build_engine, start_processes, stop_processes
from mdseq.engine.checkpoint import CheckpointManifest, CheckpointWriter, damaged_files, load_checkpoint
from mdseq.engine.config import EngineConfig
from mdseq.engine.ema import WeightAverage
from mdseq.engine.partitions import partitions_of
from mdseq.errors import Separated, UserError
from mdseq.model.denoiser import DenoiserConfig
from mdseq.model.saved import ModelConfig
from mdseq.report.metrics import MetricsWriter
from mdseq.spec import RunSpec
from mdseq.train.attention import choose_attention
from mdseq.train.environment import Place
from mdseq.train.held_out import Probe, Validation
from mdseq.train.hooks import CheckpointHook, MetricsHook, SampleHook, ValidationHook
from mdseq.train.loop import Hook, Trainer, start_limit
from mdseq.train.memory import is_out_of_memory, out_of_memory
from mdseq.train.rows import Rows
from mdseq.train.run_folder import RunFolder, check_same_run
from mdseq.train.status import StatusHook
from mdseq.train.stragglers import StragglerHook
from mdseq.train.watch import Hear, Watch


@dataclass(frozen=True)
class RunPlan:
    """A run that has passed every check that needs no process group.

    Attributes:
        resume_from: Checkpoints to continue, the first that is undamaged; none for a fresh start.
        changes: How they differ from what is to be run, which has been allowed; a line each.
    """

    spec: RunSpec
    engine: EngineConfig
    corpus: Corpus
    rows: Rows
    tokenizer: Tokenizer
    run: RunFolder
    resume_from: list[tuple[Path, CheckpointManifest]]
    changes: list[str]


def plan_run(
    spec: RunSpec, engine: EngineConfig, output: Path, resume: str = "auto", allow_changes: bool = False
) -> RunPlan:
    """Open the data, choose the checkpoint and check that the output can be written; writes nothing.

    Args:
        spec, engine: What to run.
        output: The run folder.
        resume: "auto", "never" or a checkpoint.
        allow_changes: Continue even if the checkpoint is of another spec or dataset, as far as its weights fit.

    Raises:
        UserError: Whatever stands in the way.
    """
    if not spec.data.path:
        raise UserError("no dataset: give --data DIR (or data.path), a folder made by `make prep`")
    corpus = Corpus.open(Path(spec.data.path), "train")
    check_sources(corpus, spec.data.lengths_of)
    NoiseSchedule.of(spec.diffusion)
    rows = Rows.of(corpus, spec)
    tokenizer = Tokenizer.load(Path(spec.data.path) / TOKENIZER_FILE)
    run = RunFolder(output)
    run.check_usable()
    found = run.find_checkpoints(resume)
    changes = check_same_run(*found[0], spec, corpus.manifest.fingerprint, allow_changes) if found else []
    return RunPlan(spec, engine, corpus, rows, tokenizer, run, found, changes)


def train(plan: RunPlan) -> int:
    """Run to the end; every rank calls this.

    Returns:
        The signal that has ended the run early, or 0.

    Raises:
        Separated: Not all ranks have come, or one is gone.
        UserError: A mistake that shows only now.
        TrainingDiverged: Too many steps in a row could not be taken.
        MemoryError: There is not enough; with what to lower.
    """
    device = start_processes(plan.spec.guard.arrival_seconds)
    try:
        return _train(plan, Agreement(), device)
    except Exception as error:
        if has_lost_ranks(error):
            # Where each of those that are left stands, is long to tell; why, the lost one has told.
            reason = str(error).splitlines()[0]
            raise Separated(f"another rank is gone; see what that one tells, here or on its node ({reason})") from error
        if not is_out_of_memory(error):
            raise
        vocab_size = plan.corpus.manifest.vocab_size
        raise MemoryError(out_of_memory(plan.spec, plan.engine, vocab_size, on_gpu=device.type == "cuda")) from error
    finally:
        stop_processes()


def _train(plan: RunPlan, agreement: Agreement, device: torch.device) -> int:
    with ExitStack() as stack:
        with Watch(lambda: 0, start_limit(plan.spec.guard, "not ready for the first step")):
            stack.enter_context(agreement.on_rank_0(plan.run.lock()))
            trainer, hooks, hear = _prepare(plan, agreement, device)
        trainer.run(hooks, hear)
        # Launchers kill the others when one is gone: nobody leaves before rank 0 has told how it ended.
        agreement.all(True)
        return trainer.stopped_by


def _prepare(plan: RunPlan, agreement: Agreement, device: torch.device) -> tuple[Trainer, list[Hook], Hear | None]:
    """The trainer where its checkpoint left it, its hooks, and who hears of the ranks' heartbeats."""
    spec, corpus = plan.spec, plan.corpus
    attention = choose_attention(spec, device)
    if dist.get_rank() == 0:
        print(f"attention engine: {attention.engine} ({attention.reason})", flush=True)
    torch.manual_seed(spec.seed)  # the same initial weights on every rank
    objective = DiffusionObjective(spec, corpus.manifest.vocab_size, device)
    shapes = {name: parameter.shape for name, parameter in objective.named_parameters()}
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
    partitions = partitions_of(engine)
    average = WeightAverage(partitions, spec.optimiser.ema_decay)
    trainer = Trainer(spec, engine, loader, partitions, average, agreement, device)
    probe = Probe(corpus, plan.rows, spec, device)
    _restore(plan, trainer, probe, shapes)
    writer = CheckpointWriter(plan.run.checkpoints, partitions, average, shapes, agreement)
    hooks, hear = _build_hooks(plan, trainer, probe, writer), None
    if dist.get_rank() == 0:
        status = StatusHook(plan.run.path, trainer.step, spec.schedule.steps, dist.get_world_size())
        hooks, hear = [*hooks, status], status.hear
    return trainer, hooks, hear


def _restore(plan: RunPlan, trainer: Trainer, probe: Probe, shapes: Mapping[str, torch.Size]) -> None:
    """Load the newest undamaged checkpoint of those that may be continued."""
    spec, show = plan.spec, dist.get_rank() == 0
    problem = ""
    for path, manifest in plan.resume_from:
        damaged = damaged_files(path, manifest, trainer.agreement)
        if damaged:
            problem = f"{path} is damaged, and not continued: {', '.join(damaged)} no longer what was saved"
            if show:
                print(problem, flush=True)
            continue
        trainer.load_state_dict(load_checkpoint(path, trainer.engine, trainer.partitions, trainer.average, shapes))
        if not plan.changes:
            probe.check(trainer, manifest.probe_loss)
        if show:
            moved = f" ({manifest.spread}; now {plan.engine.spread})" if manifest.spread != plan.engine.spread else ""
            print(f"continuing {path}{moved}: step {trainer.step} of {spec.schedule.steps}", flush=True)
            if plan.changes:
                print("although it is of another run:\n" + "\n".join(plan.changes), flush=True)
        return
    if problem:
        raise UserError(
            f"{problem}, and there is no older one; bring the file back, or start anew with another --output"
        )
    if show:
        print(f"starting {plan.run.path} from the beginning: {spec.schedule.steps} steps", flush=True)


def _build_hooks(plan: RunPlan, trainer: Trainer, probe: Probe, checkpoints: CheckpointWriter) -> list[Hook]:
    """Metrics first, so that a checkpoint's step has been logged when it is saved."""
    spec, manifest = plan.spec, plan.corpus.manifest
    places = trainer.agreement.gather(Place.of(trainer.device))
    writer = None
    files: dict[str, bytes] = {}
    if dist.get_rank() == 0:
        print(plan.rows.describe(), flush=True)
        files = plan.run.describe(spec, plan.engine, places)
        writer = MetricsWriter(plan.run.path, trainer.step)
        files[TOKENIZER_FILE] = (Path(spec.data.path) / TOKENIZER_FILE).read_bytes()
    checkpoint = CheckpointManifest(
        step=trainer.step,
        probe_loss=0.0,
        valid_loss=None,
        spread=plan.engine.spread,
        dataset_fingerprint=manifest.fingerprint,
        spec=spec.model_dump(mode="json"),
    )
    lengths = LengthTable.of(plan.corpus, spec.data.lengths_of)
    model = ModelConfig(
        denoiser=DenoiserConfig.of(spec, manifest.vocab_size),
        noise_schedule=spec.diffusion.noise_schedule,
        num_timesteps=spec.diffusion.num_timesteps,
        noise_factor=spec.diffusion.noise_factor,
        min_signal=spec.diffusion.min_signal,
        estimate=spec.diffusion.estimate,
        gamma=spec.diffusion.gamma * spec.diffusion.absorbing,
        absorbing_schedule=spec.diffusion.absorbing_schedule,
        document_kind=manifest.kind,
        row_length=spec.data.row_length,
        step=trainer.step,
        condition_dropout=spec.diffusion.condition_dropout,
        lengths=lengths.to_dict(),
    )
    validation = _validation(plan, trainer)
    return [
        *([ValidationHook(validation, spec.report.valid_interval_steps)] if validation else []),
        StragglerHook(),
        MetricsHook(writer, spec.report.log_interval_steps),
        SampleHook(plan.run, writer, plan.tokenizer, manifest.kind, lengths, _sample_sources(plan)),
        CheckpointHook(plan.run, checkpoints, checkpoint, model, probe, files),
    ]


def _validation(plan: RunPlan, trainer: Trainer) -> Validation | None:
    """If it is wanted, and there are rows to hold out."""
    spec, splits = plan.spec, plan.corpus.manifest.splits
    if not spec.report.valid_interval_steps or "valid" not in splits or not splits["valid"].documents:
        return None
    held_out = Corpus.open(Path(spec.data.path), "valid")
    return Validation(held_out, spec, dist.get_rank(), dist.get_world_size(), trainer.device)


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

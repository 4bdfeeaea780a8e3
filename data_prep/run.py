"""A build from end to end: plan, vocabulary, duplicates, shards, and only then does the dataset appear.

Everything is written into a folder beside the destination, `NAME.partial`, which is renamed when it is complete. A
build that is stopped, by whatever, is taken up by the same command where it stopped.
"""

from __future__ import annotations

import errno
import fcntl
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from data_prep.cluster import run_on_slurm
from data_prep.contamination import Contamination
from data_prep.duplicates import find_duplicates
from data_prep.finish import Tally, appear, write_manifest
from data_prep.jobs import BuildFolder, ShardJobs
from data_prep.plan import Plan, differences, evaluation_documents, make_plan, survey_file
from data_prep.pool import Pool
from data_prep.progress import Stage
from data_prep.spec import ClusterSpec, PrepSpec
from data_prep.vocabulary import allot, train_vocabulary
from mdseq.data.format import MANIFEST_FILE, PLAN_FILE, TOKENIZER_FILE, Manifest
from mdseq.data.tokenizer import Tokenizer
from mdseq.errors import UserError
from mdseq.files import remove_temporaries, sync_folder, write_whole


@dataclass(frozen=True)
class Where:
    """Who does the work: processes of this machine, or with `slurm_tasks` Slurm job arrays for all but the planning."""

    workers: int
    slurm_tasks: int = 0


@dataclass(frozen=True)
class Built:
    """A dataset, and whether it was there already, built of the same inputs in the same way."""

    manifest: Manifest
    was_there: bool


def build(spec: PrepSpec, out: Path, where: Where) -> Built:
    """Build the dataset `out`, or finish what an earlier call has begun.

    Raises:
        UserError: What stands in the way, a change of inputs or options among them; what is finished is kept.
    """
    model = _given_model(spec)
    if out.exists():
        return Built(_same_dataset(spec, model, out), was_there=True)
    with _partial(out) as folder, Pool(where.workers) as pool:
        plan = _planned(spec, model, folder, pool)
        _write_evaluation(plan, folder)
        _write_vocabulary(plan, model, folder, pool)
        runner = _Runner(plan, folder, pool, where, spec.cluster)
        _drop_duplicates(runner)
        tally = Tally(plan, spec.cleaning, folder)
        runner.run("encode", "encoding", folder.finished, tally.add)
        manifest = write_manifest(tally)
        appear(folder, out)
    return Built(manifest, was_there=False)


def plan_build(spec: PrepSpec, out: Path, workers: int) -> Plan:
    """Do no more than the planning of a build. Raises UserError like `build`."""
    model = _given_model(spec)
    if out.exists():
        raise UserError(_exists(out))
    with _partial(out) as folder, Pool(workers) as pool:
        return _planned(spec, model, folder, pool)


def train_tokenizer(spec: PrepSpec, path: Path, workers: int) -> Tokenizer:
    """Train the vocabulary of a dataset alone, into a file. Raises UserError like `build`."""
    if path.exists():
        raise UserError(_exists(path))
    with _partial(path) as folder, Pool(workers) as pool:
        plan = _planned(spec, None, folder, pool)
        _write_evaluation(plan, folder)
        _write_vocabulary(plan, None, folder, pool)
        folder.tokenizer.rename(path)
        sync_folder(path.parent)
        shutil.rmtree(folder.path)
    return Tokenizer.load(path)


def _exists(out: Path) -> str:
    return f"OUT {out} exists and is never overwritten; remove it, or choose another OUT"


def _given_model(spec: PrepSpec) -> bytes | None:
    """The vocabulary that the spec names, checked."""
    if not spec.vocabulary.tokenizer:
        return None
    path = Path(spec.vocabulary.tokenizer)
    path = path / TOKENIZER_FILE if path.is_dir() else path
    tokenizer = Tokenizer.load(path)
    sampled = [source for source in spec.sources if source.sampling]
    if sampled and not tokenizer.is_unigram:
        raise UserError(
            f"sources.{sampled[0].name}.sampling = {sampled[0].sampling} needs probabilities, and {path} has none, for "
            "it is no unigram model; give another vocabulary.tokenizer, or sampling = 0"
        )
    return path.read_bytes()


def _same_dataset(spec: PrepSpec, model: bytes | None, out: Path) -> Manifest:
    """The dataset that is already there. Raises UserError when it is another than the one asked for."""
    if not (out / PLAN_FILE).is_file() or not (out / MANIFEST_FILE).is_file():
        raise UserError(_exists(out))
    changes = _changes(_load_plan(out / PLAN_FILE), spec, model, out / TOKENIZER_FILE)
    if changes:
        raise UserError(f"{_exists(out)}. It was built otherwise:\n" + "\n".join(f"  {change}" for change in changes))
    shutil.rmtree(BuildFolder(out).work, ignore_errors=True)  # a build killed at its very end leaves it
    return Manifest.load(out)


def _changes(plan: Plan, spec: PrepSpec, model: bytes | None, tokenizer: Path) -> list[str]:
    changes = differences(plan, spec)
    if model is not None and tokenizer.is_file() and tokenizer.read_bytes() != model:
        changes.append(f"vocabulary.tokenizer: {spec.vocabulary.tokenizer} is another model now")
    return changes


@contextmanager
def _partial(out: Path) -> Iterator[BuildFolder]:
    """The folder of the build, held by this process alone; turns the system's refusals into UserErrors."""
    folder = BuildFolder(out.with_name(f"{out.name}.partial"))
    try:
        if folder.path.exists() and not folder.lock.exists() and any(folder.path.iterdir()):
            raise UserError(f"{folder.path} holds files that are not a build's; move them, or choose another OUT")
        folder.work.mkdir(parents=True, exist_ok=True)
        lock = folder.lock.open("w")
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise _disk_full(out) from None
        raise UserError(
            f"cannot write OUT {out}: {error.strerror} ({error.filename}); choose an OUT in a writable folder"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another build is writing {folder.path}; wait for it, or choose another OUT") from None
        try:
            remove_temporaries(folder.path)
            remove_temporaries(folder.work)
            yield folder
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _disk_full(out) from None
            raise UserError(f"cannot build {out}: {error.strerror or error} ({error.filename})") from None
        finally:
            if not folder.plan.exists() and folder.path.exists():  # it never began
                shutil.rmtree(folder.path)


def _disk_full(out: Path) -> UserError:
    return UserError(
        f"no space left for OUT {out}; what is finished is kept: make room, and the same command goes on where it "
        "stopped"
    )


def _load_plan(path: Path) -> Plan:
    try:
        return Plan.model_validate_json(path.read_bytes())
    except ValidationError:
        raise UserError(f"{path} is not a plan of this release; remove {path.parent}, and build again") from None


def _planned(spec: PrepSpec, model: bytes | None, folder: BuildFolder, pool: Pool) -> Plan:
    """The plan that an earlier call has made, if it fits; else a new one."""
    if folder.plan.is_file():
        plan = _load_plan(folder.plan)
        changes = _changes(plan, spec, model, folder.tokenizer)
        if changes:
            raise UserError(
                f"{folder.path} holds an unfinished build of something else:\n"
                + "\n".join(f"  {change}" for change in changes)
                + f"\n  restore these to go on with it, or remove {folder.path} to begin anew"
            )
        return plan
    with Stage("planning: reading and hashing the inputs", unit="files") as stage:

        def survey(files: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
            stage.expect(len(files))
            return pool.map(survey_file, files, stage.advance)

        plan = make_plan(spec, survey)
    write_whole(folder.plan, (plan.model_dump_json() + "\n").encode())
    return plan


def _write_evaluation(plan: Plan, folder: BuildFolder) -> None:
    if not plan.evaluation or folder.contamination.exists():
        return
    try:
        contamination = Contamination.of(evaluation_documents(plan), plan.spec.cleaning.evaluation_ngram)
    except UnicodeDecodeError as error:
        raise UserError(f"cleaning.evaluation names a file that is not UTF-8 ({error}); convert it first") from None
    contamination.save(folder.contamination)


def _write_vocabulary(plan: Plan, model: bytes | None, folder: BuildFolder, pool: Pool) -> None:
    if folder.tokenizer.is_file():
        return
    if model is None:
        vocabulary = plan.spec.vocabulary
        with Stage("sampling text for the vocabulary", unit="shards") as stage:
            tasks = _samples(plan)
            stage.expect(len(tasks))
            sampled = pool.run(folder.path, "sample", tasks, on_result=lambda task, result: stage.advance(1))
        with Stage(f"training a vocabulary of {vocabulary.size:,} tokens"):
            model = train_vocabulary(chain.from_iterable(sampled), vocabulary.size, vocabulary.model)
    write_whole(folder.tokenizer, model)


def _samples(plan: Plan) -> list[tuple[int, int]]:
    """(shard, characters) of each shard that the vocabulary is trained on."""
    of_source: dict[str, list[int]] = {}
    for index, shard in enumerate(plan.shards):
        of_source.setdefault(str(shard.source), []).append(index)
    sizes = {source: [plan.shards[index].text_bytes for index in indices] for source, indices in of_source.items()}
    allotted = allot(sizes, plan.spec.vocabulary.size)
    return [
        (index, characters)
        for source, indices in of_source.items()
        for index, characters in zip(indices, allotted[source], strict=True)
        if characters
    ]


def _drop_duplicates(runner: _Runner) -> None:
    plan, folder = runner.plan, runner.folder
    cleaning = plan.spec.cleaning
    if (cleaning.exact_duplicates == "keep" and not cleaning.near_duplicates) or folder.dropped.exists():
        return
    runner.run("sign", "looking for duplicates", folder.signatures)
    paths = [folder.signatures(shard) for shard in range(len(plan.shards))]
    find_duplicates(paths, cleaning.near_duplicates, folder.dropped)


class _Runner:
    """Runs a job over all shards, the largest first: on the cores of this machine, or as a Slurm job array."""

    def __init__(self, plan: Plan, folder: BuildFolder, pool: Pool, where: Where, cluster: ClusterSpec) -> None:
        self.plan = plan
        self.folder = folder
        self._pool = pool
        self._where = where
        self._cluster = cluster

    def run(
        self,
        job: str,
        title: str,
        result_path: Callable[[int], Path],
        on_result: Callable[[int, Any], None] = lambda shard, result: None,
    ) -> None:
        """Do a job; `result_path` gives what exists when a shard's is done, `on_result` gets each shard's result."""
        with Stage(title, self.plan.text_bytes) as stage:
            if self._where.slurm_tasks:
                self._run_on_slurm(job, result_path, stage)
            tasks = [(shard,) for shard in largest_first(self.plan)]
            advance = stage.advance if not self._where.slurm_tasks else lambda _: None
            self._pool.run(self.folder.path, job, tasks, advance, lambda task, result: on_result(task[0], result))

    def _run_on_slurm(self, job: str, result_path: Callable[[int], Path], stage: Stage) -> None:
        waiting = dict(enumerate(self.plan.shards))

        def look() -> None:
            for shard in [shard for shard in waiting if result_path(shard).exists()]:
                stage.advance(waiting.pop(shard).text_bytes)

        num_tasks = min(self._where.slurm_tasks, len(self.plan.shards))
        task = partial(run_task, self.folder.path.absolute(), job, num_tasks)
        run_on_slurm(task, num_tasks, self._cluster, self.folder.work / "slurm", f"mdseq-{job}", look)
        look()


def run_task(folder: Path, job: str, num_tasks: int, task: int) -> None:
    """Task number `task` of a job array: every num_tasks-th shard."""
    jobs = ShardJobs(folder)
    for shard in largest_first(jobs.plan)[task::num_tasks]:
        getattr(jobs, job)(shard)


def largest_first(plan: Plan) -> list[int]:
    """All shards, so ordered that the last ones to finish are short."""
    return sorted(range(len(plan.shards)), key=lambda shard: -plan.shards[shard].text_bytes)

"""Submit a run to Slurm: `python -m launcher.slurm --ds_config JSON --spec TOML --data DIR [section.key=value ...]`.

Everything that training would refuse is refused here, before anything is queued. `cluster` of the spec says what the
job asks for; `--print` shows the script, docs/clusters.md what happens in it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launcher.job import Job, Training, evaluation_job, preparation_job, training_job
from launcher.run import add_run_options, run_folder
from launcher.sweep import Sweep
from mdseq.errors import UserError, exit_status
from mdseq.slurm import ENDED, job_states, require_log_folder, require_slurm, submission_environment
from mdseq.spec import RunSpec, load_spec


@dataclass(frozen=True)
class Submission:
    """What is asked for, checked.

    Attributes:
        spec: Of the first variant; all have the same cluster.
        jobs: In their order; each waits for the one before.
        folder: Where their scripts and logs go.
    """

    spec: RunSpec
    jobs: Sequence[Job]
    folder: Path


def main(arguments: Sequence[str]) -> int:
    options = _parse(arguments)
    return exit_status(lambda: _run(options), "interrupted; `squeue --me` lists what has been submitted")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m launcher.slurm", description=__doc__.splitlines()[0])
    add_run_options(parser)
    parser.add_argument("--nodes", type=int, metavar="N", help="short for cluster.nodes=N")
    parser.add_argument("--gpus", type=int, metavar="N", help="of each node; short for cluster.gpus_per_node=N")
    parser.add_argument("--prep", type=Path, metavar="PATH", help="text, or a prep spec: first a job that makes --data")
    parser.add_argument("--evaluate", action="store_true", help="then a job that bounds the held-out likelihood")
    parser.add_argument("--after", metavar="JOB", help="wait until this job has ended well")
    parser.add_argument("--print", action="store_true", help="show the job scripts, and submit nothing")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="changes to the spec; a=1,2,3 makes an array of runs"
    )
    return parser.parse_intermixed_args(arguments)


def _run(options: argparse.Namespace) -> None:
    submission = _prepare(options)
    if options.print:
        print("\n".join(job.script() for job in submission.jobs), end="")
        return
    require_slurm("run launcher/run.py here, or --print the script")
    _refuse_twice(submission.folder)
    submission.folder.mkdir(parents=True, exist_ok=True)  # Slurm makes none
    before = options.after
    for job in submission.jobs:
        try:
            before = _submit(job, submission, before)
        except UserError:
            with suppress(OSError):  # they are not empty, and were there before
                submission.folder.rmdir()
                submission.folder.parent.rmdir()
            raise
        log = str(submission.folder / job.log).replace("%j", before).replace("%A", before)
        print(f"job {before}: {job.purpose}; log {log}" + (" (%a: number of the task)" if "%a" in log else ""))
    print("`squeue --me` lists the queue, `scancel JOB` calls a job off, `mdseq status RUN` tells how a run is doing")


def _prepare(options: argparse.Namespace) -> Submission:
    """Check everything that can be checked from here."""
    given = [f"cluster.nodes={options.nodes}"] if options.nodes is not None else []
    given += [f"cluster.gpus_per_node={options.gpus}"] if options.gpus is not None else []
    sweep = Sweep.of([*options.overrides, *given])
    data = [f"data.path={options.data}"] if options.data is not None else []
    specs = [load_spec(options.spec, [*sweep.common, *variant.overrides, *data]).spec for variant in sweep.variants]
    spec = specs[0]
    if any(other.cluster != spec.cluster for other in specs):
        raise UserError("the runs of an array share one [cluster]; submit those that differ in it one by one")
    if any(other.data.path != spec.data.path for other in specs):
        raise UserError("the runs of an array share one dataset; submit those that differ in data.path one by one")
    output = run_folder(options.output, options.spec)
    require_log_folder(output)
    for variant, of_variant in zip(sweep.variants, specs, strict=True):
        _check(options, of_variant, output / variant.name)
    training = Training(
        ds_config=options.ds_config,
        spec=options.spec,
        data=Path(spec.data.path),
        output=output,
        resume=options.resume,
        allow_changes=options.allow_changes,
        sweep=sweep,
    )
    jobs = [training_job(training, spec.cluster)]
    if options.prep is not None:
        jobs.insert(0, preparation_job(options.prep, training, spec.cluster))
    if options.evaluate:
        jobs.append(evaluation_job(training, spec.cluster))
    return Submission(spec, jobs, training.logs)


def _check(options: argparse.Namespace, spec: RunSpec, output: Path) -> None:
    """As launcher/run.py does; data that is still to be made is taken on trust."""
    from mdseq.engine.config import load_engine_config
    from mdseq.train.run_folder import RunFolder
    from mdseq.train.start import plan_run

    engine = load_engine_config(options.ds_config, spec, spec.cluster.num_ranks, spec.cluster.gpus_per_node > 0)
    if options.prep is None:
        plan_run(spec, engine, output, options.resume, options.allow_changes)
        return
    if not spec.data.path:
        raise UserError("--prep makes a dataset; say where by --data DIR")
    if not options.prep.exists():
        raise UserError(f"there is nothing at --prep {options.prep}; give text, or a prep spec (docs/prep_spec.md)")
    RunFolder(output).check_usable()


def _refuse_twice(folder: Path) -> None:
    """Raise UserError if a job of this run waits or runs: two would write to one folder."""
    submitted = sorted(script.stem for script in folder.glob("*.sh") if script.stem.isdigit())
    states = (job_states(",".join(submitted)) or {}) if submitted else {}
    for job, state in states.items():
        if state not in ENDED:
            raise UserError(
                f"{folder.parent} has a job already: {job} is {state}; wait for it, call it off by `scancel {job}`, or "
                "choose another --output"
            )


def _submit(job: Job, submission: Submission, before: str | None) -> str:
    """Queue a job behind another; its number."""
    waiting = [f"--dependency={job.dependency}:{before}", "--kill-on-invalid-dep=yes"] if before else []
    script = job.script()
    answer = subprocess.run(
        ["sbatch", "--parsable", *waiting],
        input=script,
        env=submission_environment(submission.spec.cluster.named()),
        capture_output=True,
        text=True,
        check=False,
    )
    if answer.returncode:
        raise UserError(f"Slurm refused the job; see [cluster] of the spec, and --print:\n{answer.stderr.strip()}")
    number = answer.stdout.strip().partition(";")[0]
    (submission.folder / f"{number}.sh").write_text(script, encoding="utf-8")
    return number


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

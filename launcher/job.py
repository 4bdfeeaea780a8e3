"""The scripts that Slurm is given. All that comes from a user is quoted, but for `cluster.setup`, which is shell."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.sweep import Sweep
from mdseq.slurm import JOBS_FOLDER, NODES_VARIABLE, import_line, job_name
from mdseq.spec import ClusterSpec

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Job:
    """One job, or one array of them.

    Attributes:
        purpose: For people.
        options: Of sbatch.
        lines: What the job does, after the set-up that all jobs have.
        cluster: Whose set-up that is.
        folder: For its log.
        dependency: On the job before: "afterok", or "aftercorr" for each task of an array on that of the same number.
    """

    purpose: str
    options: Sequence[str]
    lines: Sequence[str]
    cluster: ClusterSpec
    folder: Path
    num_tasks: int = 1
    dependency: str = "afterok"

    @property
    def log(self) -> str:
        """Name of its log, in Slurm's patterns."""
        return "%j.log" if self.num_tasks == 1 else "%A_%a.log"

    def script(self) -> str:
        """As sbatch reads it."""
        named = [f"--{key}={value}" for key, value in self.cluster.named().items()]
        array = [f"--array=0-{self.num_tasks - 1}"] if self.num_tasks > 1 else []
        options = [*self.options, *array, *_overruled(named, self.options), f"--output={self.folder / self.log}"]
        options += ["--open-mode=append", *self.cluster.options]
        return "\n".join(
            [
                "#!/bin/bash",
                *(f"#SBATCH {shlex.quote(option)}" for option in options),
                "",
                f"# {' '.join(self.purpose.split())}. docs/clusters.md tells what happens here.",
                "set -euo pipefail",
                f"cd -- {shlex.quote(str(Path.cwd()))}",
                *self.cluster.setup,
                import_line(),
                *self.lines,
                "",
            ]
        )


@dataclass(frozen=True)
class Training:
    """A run, or several of one array, as launcher/run.py is told of it.

    Attributes:
        output: The run folder; of an array, the folder of all of them.
        sweep: Of one run or several.
    """

    ds_config: Path
    spec: Path | None
    data: Path
    output: Path
    resume: str
    allow_changes: bool
    sweep: Sweep

    @property
    def name(self) -> str:
        """For Slurm's tables."""
        return job_name(f"mdseq-{self.output.name}")

    @property
    def logs(self) -> Path:
        return self.output / JOBS_FOLDER

    @property
    def num_runs(self) -> int:
        return len(self.sweep.variants)


def training_job(training: Training, cluster: ClusterSpec) -> Job:
    """Trains, saves before its time is up, and queues itself again until all steps are taken."""
    lines = [
        # Here, for a container may lack Slurm's commands.
        f'export {NODES_VARIABLE}="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)"',
        *([] if cluster.gpus_per_node else ["export DS_ACCELERATOR=cpu"]),
        *_choice(training),
        f"on_nodes=({_on_nodes(training, cluster)})",
        "",
    ]
    spec = ["--spec", str(training.spec)] if training.spec is not None else []
    supervise = _quoted(sys.executable, "-m", "launcher.supervise", "--restarts", cluster.restarts)
    script = [ROOT / "launcher/run.py", "--ds_config", training.ds_config, *spec]
    script += ["--resume", training.resume] if training.resume != "auto" else []
    script += ["--allow_changes"] if training.allow_changes else []
    script += ["--preflight"] if cluster.preflight else []
    overrides = _quoted(*training.sweep.common) + (' "${overrides[@]}"' if training.num_runs > 1 else "")
    lines += [
        f'exec {supervise} --run "$run" --requeue {cluster.save_seconds} -- \\',
        f'    "${{on_nodes[@]}}" {_quoted(*script)} --output "$run" {overrides}'.rstrip(),
    ]
    options = [
        f"--job-name={training.name}",
        *_resources(cluster, cluster.nodes, cluster.gpus_per_node),
        f"--time={cluster.time_minutes}",
        f"--signal=B:USR1@{cluster.save_seconds}",
        "--requeue",
    ]
    each = f"{_count(cluster.gpus_per_node, 'GPU')} each" if cluster.gpus_per_node else "without GPUs"
    runs = f"{training.num_runs} runs in" if training.num_runs > 1 else "trains"
    purpose = f"{runs} {training.output} on {_count(cluster.nodes, 'node')}, {each}"
    return Job(purpose, options, lines, cluster, training.logs, training.num_runs)


def preparation_job(source: Path, training: Training, cluster: ClusterSpec) -> Job:
    """Makes the dataset, on one node; a build that was stopped goes on."""
    build = _quoted(sys.executable, "-m", "data_prep", "build", source, "--out", training.data)
    partition = cluster.cpu_partition
    if partition:  # whose nodes are others than those that the options are about
        cluster = cluster.model_copy(update={"options": ()})
    options = [
        f"--job-name={training.name}-prep",
        *([f"--partition={partition}"] if partition else []),
        *_resources(cluster, 1, 0),
        f"--time={cluster.time_minutes}",
        "--requeue",
    ]
    purpose = f"makes {training.data} of {source}"
    return Job(purpose, options, [f'exec {build} --workers "$SLURM_CPUS_ON_NODE"'], cluster, training.logs)


def evaluation_job(training: Training, cluster: ClusterSpec) -> Job:
    """Bounds the likelihood of held-out documents, on one node, into the run folder."""
    evaluate = _quoted(sys.executable, "-m", "mdseq", "evaluate", "likelihood")
    lines = [
        *_choice(training),
        f'exec {evaluate} "$run" --data {_quoted(training.data)} --output "$run/likelihood-$SLURM_JOB_ID.json"',
    ]
    options = [
        f"--job-name={training.name}-evaluate",
        *_resources(cluster, 1, min(1, cluster.gpus_per_node)),
        f"--time={cluster.time_minutes}",
        "--requeue",
    ]
    tasks = training.num_runs
    dependency = "aftercorr" if tasks > 1 else "afterok"
    return Job(f"evaluates {training.output}", options, lines, cluster, training.logs, tasks, dependency)


def _resources(cluster: ClusterSpec, nodes: int, gpus: int) -> list[str]:
    memory = f"{round(1000 * cluster.memory_gb_per_node)}M" if cluster.memory_gb_per_node else "0"
    cpus = f"--cpus-per-task={cluster.cpus_per_node}" if cluster.cpus_per_node else "--exclusive"
    gres = [f"--gpus-per-node={gpus}"] if gpus else []
    return [f"--nodes={nodes}", "--ntasks-per-node=1", *gres, cpus, f"--mem={memory}"]


def _overruled(named: Sequence[str], options: Sequence[str]) -> list[str]:
    """Those that the job's own options do not say otherwise."""
    own = {option.partition("=")[0] for option in options}
    return [option for option in named if option.partition("=")[0] not in own]


def _choice(training: Training) -> list[str]:
    """Sets `run` and, for those of an array, `overrides`, by the number of the task."""
    if training.num_runs == 1:
        return [f"run={_quoted(training.output)}"]
    settings = [
        f"run={_quoted(training.output / variant.name)} overrides=({_quoted(*variant.overrides)})"
        for variant in training.sweep.variants
    ]
    return [
        'case "$SLURM_ARRAY_TASK_ID" in',
        *(f"    {number}) {setting} ;;" for number, setting in enumerate(settings)),
        "esac",
    ]


def _on_nodes(training: Training, cluster: ClusterSpec) -> str:
    """What starts a script's ranks on all nodes."""
    command: list[object] = ["srun", "--kill-on-bad-exit=1", "--cpu-bind=none"]
    python = sys.executable
    if cluster.container:
        python = "python3"
        folders = [ROOT, Path.cwd(), training.data.absolute(), training.output.absolute().parent]
        mounts = [*dict.fromkeys(str(folder) for folder in folders), *cluster.container_mounts]
        if cluster.container_runtime == "pyxis":
            pairs = [mount if ":" in mount else f"{mount}:{mount}" for mount in mounts]
            command += [f"--container-image={cluster.container}", f"--container-mounts={','.join(pairs)}"]
            command += [f"--container-workdir={Path.cwd()}"]
        else:
            gpus = ["--nv"] if cluster.gpus_per_node else []
            command += ["apptainer", "exec", *gpus, "--bind", ",".join(mounts), "--pwd", Path.cwd(), cluster.container]
    command += [python, "-m", "launcher.node", "--ranks", cluster.ranks_of_node]
    command += ["--network", cluster.network] if cluster.network else []
    command += ["--scratch", cluster.scratch] if cluster.scratch else []
    return _quoted(*command, "--data", training.data)


def _quoted(*words: object) -> str:
    return " ".join(shlex.quote(str(word)) for word in words)


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" + ("" if number == 1 else "s")

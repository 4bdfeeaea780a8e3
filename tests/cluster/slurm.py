"""A real Slurm of two nodes, n1 and n2, on this one machine, that lives as long as the tests need it.

Everything it writes is in one folder: key and socket of munge, configuration, state, logs. Each daemon is in a PID
namespace of its own, so a killed node takes with it all that it runs, and nothing outlives the process that started
the cluster: the kernel kills the daemons when their parent is gone, however it went.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

NODES = ("n1", "n2")
CPUS_A_NODE = 2
START_SECONDS = 15.0

# For a daemon with its offspring: when the first process dies, the kernel kills all of them. The first is a shell,
# which also collects orphans, and dies with the thread that started it.
IN_A_NAMESPACE = ["setpriv", "--pdeathsig", "KILL"]
IN_A_NAMESPACE += ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", '"$@"; exit $?', "sh"]

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log

ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PropagateResourceLimitsExcept=ALL

JobRequeue=1
ReturnToService=2
SlurmdTimeout=5
MessageTimeout=3
KillWait=5
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1

# The nodes promise more than the machine may have: their jobs are small.
SlurmdParameters=config_overrides
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_missing() -> str:
    """Why this machine cannot run a Slurm of its own; empty when it can."""
    if os.geteuid() != 0:
        return "a Slurm of its own needs root"
    needed = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "setpriv", "unshare")
    missing = [program for program in needed if shutil.which(program) is None]
    if missing:
        return f"no {', '.join(missing)}: apt-get install slurm-wlm munge"
    if subprocess.run([*IN_A_NAMESPACE, "true"], capture_output=True).returncode != 0:
        return "this container may not make PID namespaces"
    return ""


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Return as soon as `condition` holds. Raises TimeoutError naming `what` when it does not within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:g} s: {what}")
        time.sleep(0.05)


def processes_that_know(folder: Path) -> list[psutil.Process]:
    """Every process that the environment of a cluster was handed down to: daemons, jobs, and who asks about them."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("SLURM_CONF") == str(folder / "slurm.conf"):
                found.append(process)
    return found


class Slurm:
    """A context: the cluster runs inside. Jobs are run by root, and see the files of this machine.

    Attributes:
        folder: All of its files.
        environment: For whatever is to find this cluster; SLURM_CONF is what tells it.
    """

    def __init__(self) -> None:
        # Not pytest's folder: munge insists that everyone can enter that of its socket, whose path must be short.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.folder.chmod(0o755)
        outer = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "SRUN"))}
        self.environment = outer | {"SLURM_CONF": str(self.folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Slurm:
        try:
            self._configure()
            self._start("munged", self._munged())
            wait_until((self.folder / "munge.socket").exists, START_SECONDS, "munged's socket")
            self._start("slurmctld", ["slurmctld", "-D"])
            for node in NODES:
                self.start_node(node)
            wait_until(lambda: all(self.node_state(node) == "idle" for node in NODES), START_SECONDS, "two idle nodes")
        except BaseException as error:
            self.stop()
            if isinstance(error, TimeoutError):
                raise TimeoutError(f"{error}\n{self._logs()}") from None
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def stop(self) -> None:
        """Kill everything, jobs included."""
        for daemon in reversed(self._daemons.values()):
            daemon.kill()
        for daemon in self._daemons.values():
            daemon.wait()
        self._daemons.clear()

    def run(self, *command: str | Path, seconds: float = 30, folder: Path | None = None) -> str:
        """Run a command that finds this cluster, in `folder`; its output, without the white space around it.

        Raises CalledProcessError when it fails, and TimeoutExpired.
        """
        arguments = [str(argument) for argument in command]
        return subprocess.run(
            arguments,
            env=self.environment,
            cwd=folder or self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
            timeout=seconds,
        ).stdout.strip()

    def sbatch(self, script: str, *options: str) -> str:
        """Submit the lines of a job script; the number of the job. Its output is in `folder`."""
        path = self.folder / f"job-{secrets.token_hex(4)}.sh"
        path.write_text(f"#!/bin/bash\n{script}\n")
        return self.run("sbatch", "--parsable", *options, path)

    def job_states(self, job: str = "") -> dict[str, str]:
        """State of a job, or of each task of an array ("7_0"), by its number; of all jobs when none is named.

        Slurm forgets jobs five minutes after they have ended.
        """
        chosen = ["--jobs", job] if job else []
        lines = self.run("squeue", "--noheader", "--array", "--states=all", "--format=%i %T", *chosen).splitlines()
        return dict(line.split() for line in lines)

    def wait_for(self, job: str, state: str = "COMPLETED", seconds: float = 30) -> None:
        """Return when the job, with all tasks of an array, is in this state.

        Raises TimeoutError, and RuntimeError once one has failed that should not.
        """
        states: dict[str, str] = {}

        def reached() -> bool:
            nonlocal states
            states = self.job_states(job)
            if state != "FAILED" and "FAILED" in states.values():
                raise RuntimeError(f"job {job}: {states}")
            return set(states.values()) == {state}

        try:
            wait_until(reached, seconds, f"job {job} {state}")
        except TimeoutError as error:
            raise TimeoutError(f"{error}, but {states}") from None

    def node_state(self, node: str) -> str:
        """What sinfo says of a node: idle, mixed, allocated, down...; "" while there is no controller to ask."""
        try:
            return self.run("sinfo", "--noheader", "--nodes", node, "--format=%T").rstrip("*")
        except subprocess.CalledProcessError:
            return ""

    def start_node(self, node: str) -> None:
        """Start a node, unless it runs; it takes a second until it is idle."""
        if node in self._daemons:
            return
        self._start(node, ["slurmd", "-D", "-N", node])

    def kill_node(self, node: str) -> None:
        """Kill a node with everything that runs on it, as a power cut would. Slurm sees it in about ten seconds."""
        daemon = self._daemons.pop(node)
        # The kernel empties a killed namespace on its own time; whoever asks next must not see the dying.
        running = psutil.Process(daemon.pid).children(recursive=True)
        daemon.kill()
        daemon.wait()
        _, alive = psutil.wait_procs(running, timeout=20)
        if alive:
            raise RuntimeError(f"{node} was killed, and still runs {alive}")

    def _configure(self) -> None:
        ports = free_ports(1 + len(NODES))
        about = f"NodeHostname=localhost NodeAddr=127.0.0.1 CPUs={CPUS_A_NODE} RealMemory=8000 State=UNKNOWN"
        nodes = [f"NodeName={node} Port={port} {about}" for node, port in zip(NODES, ports[1:], strict=True)]
        (self.folder / "state").mkdir()
        (self.folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                folder=self.folder,
                host=socket.gethostname().partition(".")[0],
                controller_port=ports[0],
                nodes="\n".join(nodes),
            )
        )

    def _munged(self) -> list[str]:
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        options = {
            "socket": "munge.socket",
            "pid-file": "munged.pid",
            "log-file": "munged.log",
            "seed-file": "munge.seed",
        }
        paths = [f"--{option}={self.folder / name}" for option, name in options.items()]
        return ["munged", "--foreground", f"--key-file={key}", *paths]

    def _start(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.output").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                [*IN_A_NAMESPACE, *command],
                env=self.environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C in pytest is not for them
            )

    def _logs(self) -> str:
        lines: list[str] = []
        for path in sorted([*self.folder.glob("*.log"), *self.folder.glob("*.output")]):
            lines += [f"--- {path}", *path.read_text(errors="replace").splitlines()[-20:]]
        return "\n".join(lines)


def free_ports(count: int) -> list[int]:
    """Different ports that nobody listens on just now."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]

"""Every way to start a run on two nodes without Slurm gives the run that two ranks of one node give."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from mdseq.report.status import RunStatus
from tests.cluster.slurm import free_ports, wait_until
from tests.dist.test_training import DS_CONFIGS, TINY, losses, run

ROOT = Path(__file__).parents[2]
RUN = ["data.micro_batch_size=2", "schedule.steps=5"]
HOSTS = ("127.0.0.1", "127.0.0.2")
PYTHON = sys.executable

# Of both nodes, by the port of the run and a folder: the commands, each with its variables.
Launches = Callable[[int, Path], list[tuple[list[str], dict[str, str]]]]


def by_hand(port: int, folder: Path) -> list[tuple[list[str], dict[str, str]]]:
    hosts = folder / "hosts"
    hosts.write_text("n1 slots=1\nn2 slots=1\n")
    common = [PYTHON, "-m", "deepspeed.launcher.runner", "--hostfile", str(hosts), "--no_ssh"]
    where = ["--master_addr", HOSTS[0], "--master_port", str(port)]
    return [([*common, "--node_rank", str(node), *where], {}) for node in (0, 1)]


def by_node(port: int, folder: Path) -> list[tuple[list[str], dict[str, str]]]:
    common = [PYTHON, "-m", "launcher.node", "--nodes", "n1,n2", "--address", HOSTS[0]]
    return [([*common, "--node", str(node)], {}) for node in (0, 1)]


def by_torchrun(port: int, folder: Path) -> list[tuple[list[str], dict[str, str]]]:
    common = [PYTHON, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    where = ["--master_addr", HOSTS[0], "--master_port", str(port)]
    return [([*common, "--node_rank", str(node), *where], {}) for node in (0, 1)]


def by_variables(port: int, folder: Path) -> list[tuple[list[str], dict[str, str]]]:
    common = {"LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": HOSTS[0]}
    return [([PYTHON], common | {"RANK": str(node), "MASTER_PORT": str(port)}) for node in (0, 1)]


@pytest.fixture(scope="module")
def expected(text_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    return losses(run(text_dataset, tmp_path_factory.mktemp("one") / "run", 2, "zero3_experts", *RUN))


def train(launches: Launches, folder: Path, dataset: Path) -> None:
    """Start both nodes' commands, and wait for them."""
    script = [ROOT / "launcher/run.py", "--ds_config", DS_CONFIGS / "zero3_experts.json", "--data", dataset]
    script += ["--output", folder / "run", *TINY, *RUN]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    (port,) = free_ports(1)
    logs = [folder / f"{node}.log" for node in (0, 1)]
    processes = []
    for (command, variables), log in zip(launches(port, folder), logs, strict=False):
        with log.open("wb") as output:
            processes.append(
                subprocess.Popen(
                    [*command, *map(str, script)],
                    cwd=ROOT,
                    env=environment | variables,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        statuses = [process.wait(120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert statuses == [0] * len(processes), "\n".join(log.read_text() for log in logs if log.exists())


@pytest.mark.slow
@pytest.mark.parametrize("launches", [by_hand, by_node, by_torchrun, by_variables])
def test_each_node_started_by_itself(launches: Launches, text_dataset, tmp_path, expected) -> None:
    train(launches, tmp_path, text_dataset)
    assert torch.equal(losses(tmp_path / "run"), expected)
    status = RunStatus.read(tmp_path / "run")
    assert status is not None
    assert (status.state, len(status.ranks)) == ("finished", 2)


@pytest.fixture
def ssh_options(tmp_path: Path) -> Iterator[str]:
    """Of an ssh that reaches both addresses without a password: a server of our own, and a key for it."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("pdsh", "sshd", "ssh-keygen"))):
        pytest.skip("needs root, pdsh and sshd: apt-get install pdsh openssh-server")
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / key], check=True)
    (port,) = free_ports(1)
    configuration = tmp_path / "sshd_config"
    configuration.write_text(
        f"Port {port}\n{''.join(f'ListenAddress {host}' + chr(10) for host in HOSTS)}HostKey {tmp_path}/host\n"
        f"AuthorizedKeysFile {tmp_path}/user.pub\nPidFile none\nStrictModes no\nUsePAM no\nPermitRootLogin yes\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)  # it insists
    server = subprocess.Popen([shutil.which("sshd") or "", "-D", "-e", "-f", configuration], stderr=subprocess.DEVNULL)
    options = (
        f"-p {port} -i {tmp_path}/user -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    )
    try:
        reach = ["ssh", *options.split(), HOSTS[1], "true"]
        wait_until(lambda: subprocess.run(reach, capture_output=True, check=False).returncode == 0, 15, "sshd")
        yield options
    finally:
        server.kill()
        server.wait()


@pytest.mark.slow
def test_a_hostfile_over_ssh(ssh_options: str, text_dataset, tmp_path, expected, monkeypatch) -> None:
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", ssh_options)
    (tmp_path / "hosts").write_text("".join(f"{host} slots=1\n" for host in HOSTS))
    # What pdsh hands on to the nodes.
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".deepspeed_env").write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\nGLOO_SOCKET_IFNAME=lo\n")

    def by_pdsh(port: int, folder: Path) -> list[tuple[list[str], dict[str, str]]]:
        command = [PYTHON, "-m", "deepspeed.launcher.runner", "--hostfile", str(folder / "hosts"), "--no_ssh_check"]
        return [([*command, "--master_addr", HOSTS[0], "--master_port", str(port)], {})]

    train(by_pdsh, tmp_path, text_dataset)
    assert torch.equal(losses(tmp_path / "run"), expected)

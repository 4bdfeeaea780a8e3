"""Building a dataset, training, generation and evaluation need no network: here there is none but the loopback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
NAMESPACE = ["unshare", "--map-root-user", "--net"]

WITHOUT_NETWORK = """
import fcntl, os, socket, struct, sys
os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
from pathlib import Path

with socket.socket() as any_socket:  # a new namespace has a loopback, which is down; ranks meet on it
    IFF_UP, SIOCSIFFLAGS = 0x1, 0x8914
    fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", IFF_UP))
assert [name for _, name in socket.if_nameindex()] == ["lo"]

from data_prep.__main__ import main as data_prep
from launcher.run import main as train
from mdseq.cli import main as mdseq

folder, ds_config = sys.argv[1:]
os.chdir(folder)
Path("texts").mkdir()
for number in range(20):
    Path(f"texts/{number}.txt").write_text("\\n".join(f"Verse {n} of the old song {number * n}." for n in range(60)))
assert data_prep(["build", "texts", "--out", "data", "--vocab", "512", "--workers", "1"]) == 0
tiny = ["model.embedding_dim=16", "model.hidden_dim=32", "model.num_heads=2", "model.num_layers=2",
        "experts.feedforward_dim=32", "data.row_length=64", "data.batch_size=4", "data.micro_batch_size=4"]
assert train(["--ds_config", ds_config, "--spec", "quickstart", "--data", "data", "--output", "run", *tiny,
              "schedule.steps=2"]) == 0
assert mdseq(["generate", "run", "--num", "1", "--length", "8", "--steps", "2"]) == 0
assert mdseq(["evaluate", "likelihood", "run", "--data", "data", "--split", "train", "--documents", "1",
              "--samples", "1"]) == 0
assert mdseq(["report", "run"]) == 0
print("all done without a network")
"""


def can_make_namespaces() -> bool:
    try:
        return subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not can_make_namespaces(), reason="no network namespace can be made here (unshare --net)")
def test_everything_works_without_a_network(tmp_path: Path) -> None:
    command = [*NAMESPACE, sys.executable, "-c", WITHOUT_NETWORK, str(tmp_path), str(ROOT / "ds_configs" / "cpu.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("all done without a network\n")

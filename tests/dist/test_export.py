"""Weights leave a run as they are, whole, and load without DeepSpeed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mdseq
from mdseq.cli import main
from mdseq.sparse import Documents
from tests.dist.ranks import run_ranks
from tests.dist.test_training import DS_CONFIGS, run, state


@pytest.fixture(scope="module")
def trained(text_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of two ranks that share the experts under ZeRO-3."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    return run(text_dataset, folder, 2, "zero3_experts", "schedule.steps=3", "data.micro_batch_size=2")


def export(run: Path, output: Path, *more: str) -> int:
    return main(["export", str(run), "--output", str(output), *more])


@pytest.mark.parametrize(("flag", "which"), [("--ema", "average"), ("--no-ema", "weights"), (None, "average")])
def test_what_is_exported_is_what_was_saved(trained, tmp_path, flag, which):
    assert export(trained, tmp_path / "out", *([flag] if flag else [])) == 0
    expected = state(trained, 3, which)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_large_model_is_exported_in_shards_that_load_as_one(trained, tmp_path):
    assert export(trained, tmp_path / "whole") == 0
    assert export(trained, tmp_path / "shards", "--shard_gib", "0.00002") == 0
    files = sorted((tmp_path / "shards").glob("model-*.safetensors"))
    assert len(files) > 3
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == sum(w.nbytes for f in files for w in load_file(f).values())
    ours, theirs = (mdseq.load(tmp_path / name).state_dict() for name in ("shards", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def outputs_of_the_engine(checkpoint: Path, dataset: Path) -> torch.Tensor:
    """The denoiser's output for some input, inside DeepSpeed, with the weights that training had reached."""
    from mdseq.data.corpus import Corpus
    from mdseq.diffusion.objective import DiffusionObjective
    from mdseq.engine.build import build_engine, start_processes
    from mdseq.engine.checkpoint import load_checkpoint
    from mdseq.engine.config import load_engine_config
    from mdseq.engine.ema import WeightAverage
    from mdseq.engine.partitions import partitions_of
    from mdseq.spec import load_spec

    start_processes()
    spec = load_spec(checkpoint / "spec.toml", []).spec
    objective = DiffusionObjective(spec, Corpus.open(dataset, "train").manifest.vocab_size)
    shapes = {name: parameter.shape for name, parameter in objective.named_parameters()}
    engine = build_engine(objective, load_engine_config(DS_CONFIGS / "zero3_experts.json", spec, 2, on_gpu=False))
    partitions = partitions_of(engine)
    load_checkpoint(checkpoint, engine, partitions, WeightAverage(partitions, 0.9), shapes)
    denoiser = engine.module.denoiser
    with torch.no_grad():
        return logits(denoiser)


def logits(denoiser: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    z_blz = torch.randn(2, 24, 16, generator=generator)
    time_bl = 1000 * torch.rand(2, 24, generator=generator)
    f_blz = denoiser(z_blz, time_bl, Documents.whole(torch.tensor([24, 17]), 24))
    words = denoiser.vocabulary()
    return f_blz @ words.embedding_vz.T + words.bias_v


def test_the_exported_denoiser_computes_what_the_engine_computes(trained, text_dataset, tmp_path):
    assert export(trained, tmp_path / "out", "--no-ema") == 0
    with torch.no_grad():
        expected = logits(mdseq.load(tmp_path / "out"))
    for found in run_ranks(2, outputs_of_the_engine, trained / "checkpoints" / "step-00000003", text_dataset):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_an_exported_model_generates_without_deepspeed(trained, tmp_path):
    assert export(trained, tmp_path / "out") == 0
    program = (
        "import sys; from mdseq.cli import main; "
        "status = main(['generate', sys.argv[1], '--length', '8', '--steps', '2']); "
        "assert 'deepspeed' not in sys.modules; sys.exit(status)"
    )
    printed = [
        subprocess.run([sys.executable, "-c", program, folder], capture_output=True, text=True, check=True).stdout
        for folder in (tmp_path / "out", trained)
    ]
    assert printed[0] == printed[1]


def test_the_card_says_where_the_weights_come_from(trained, tmp_path):
    assert export(trained, tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    for words in ("after 3 optimiser steps", "dataset fingerprint", "| loss |", "num_experts = 4", "mdseq.load"):
        assert words in card


def test_mistakes(trained, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    damaged = Path(shutil.copytree(trained, tmp_path / "damaged"))
    file = damaged / "checkpoints" / "step-00000003" / "rank-0000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    for source, output, expected in (
        (tmp_path / "nowhere", "out", "no run folder at"),
        (trained, "there", "is there already, and nothing is overwritten"),
        (damaged, "out", "is damaged: rank-0000.safetensors"),
    ):
        assert export(source, tmp_path / output) == 2
        assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert export(trained, tmp_path / "exported") == 0
    capsys.readouterr()
    assert export(tmp_path / "exported", tmp_path / "again") == 2
    assert "not a whole checkpoint" in capsys.readouterr().err


MEASURE = """
import sys, threading, time
from pathlib import Path
import torch
from mdseq.model.saved import load_model, save_model, read_weights
from mdseq.engine.export import export_model

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

def watch():
    global peak
    while running:
        peak = max(peak, anonymous())
        time.sleep(0.001)

export_model(Path(sys.argv[1]), Path(sys.argv[2]), "average", 2**24)  # everything is imported, and allocators warm
before = peak = anonymous(); running = True
thread = threading.Thread(target=watch); thread.start()
export_model(Path(sys.argv[1]), Path(sys.argv[3]), "average", 2**24)
running = False; thread.join()
print(peak - before)
"""


def test_export_holds_one_shard_and_not_the_model(text_dataset, tmp_path):
    large = ["model.hidden_dim=256", "model.num_layers=12", "model.num_heads=4", "schedule.steps=1"]
    folder = run(text_dataset, tmp_path / "run", 2, "zero3_experts", "data.micro_batch_size=2", *large,
                 "experts.feedforward_dim=256")  # fmt: skip
    weights = state(folder, 1)
    largest, total = max(w.nbytes for w in weights.values()), sum(w.nbytes for w in weights.values())
    command = [sys.executable, "-c", MEASURE, folder, tmp_path / "a", tmp_path / "b"]
    held = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert total > 3 * 2**24
    assert held <= 1.2 * (largest + 2**24)

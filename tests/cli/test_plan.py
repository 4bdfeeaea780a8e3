"""`mdseq plan` tables ways to spread a run, and says in one message what is wrong with the request."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mdseq.cli import main
from mdseq.data.format import Manifest

BIG = [
    "optimiser.precision=bf16", "model.hidden_dim=4096", "model.num_heads=32", "model.num_layers=24",
    "experts.feedforward_dim=8192",
]  # fmt: skip


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *arguments]) == 0
    return " ".join(capsys.readouterr().out.split())


def test_a_table_for_each_number_of_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    out = planned(capsys, "moe_diffuseq", "--gpus", "8,64", "optimiser.precision=bf16")
    assert "258,855,424 parameters, 88,986,112 active for a token; vocabulary of 16,384; bf16" in out
    assert "8 GPUs: 16 rows of 4,096, 2 micro-batches of 1 a rank, 65,536 tokens a step" in out
    assert "64 GPUs: 64 rows of 4,096, 1 micro-batch of 1 a rank" in out
    assert "data.batch_size = 16 is no multiple of 1 x 64; this is the nearest" in out
    assert out.count("<-") == 2
    assert out.count("take ds_configs/zero2.json") == 2


def test_the_vocabulary_is_that_of_the_data(capsys: pytest.CaptureFixture[str], text_dataset: Path) -> None:
    size = Manifest.load(text_dataset).vocab_size
    assert f"vocabulary of {size}; " in planned(capsys, "quickstart", "--gpus", "1", f"data.path={text_dataset}")
    assert "vocabulary of 7; " in planned(
        capsys, "quickstart", "--gpus", "1", f"data.path={text_dataset}", "--vocab_size", "7"
    )


def test_data_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "quickstart", "--gpus", "1", "data.path=nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_the_sum_is_that_of_the_parts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "sa_diffuseq", "--gpus", "4"]) == 0
    lines = capsys.readouterr().out.replace("<-", "").splitlines()
    rows = [line.split() for line in lines if re.match(r" *[123] +\d", line)]
    assert len(rows) == 3
    for _, *numbers in rows:
        assert float(numbers[6]) == pytest.approx(sum(map(float, numbers[:6])), abs=0.03)


def test_where_nothing_fits_it_says_what_to_lower(capsys: pytest.CaptureFixture[str]) -> None:
    out = planned(capsys, "moe_diffuseq", *BIG, "--gpus", "2", "--gpu_memory_gib", "24")
    assert "nothing fits with a tenth to spare; the least is ds_configs/zero3_offload.json" in out
    assert "<-" not in out
    out = planned(capsys, "moe_diffuseq", "--gpus", "2", "--gpu_memory_gib", "2")
    assert "model.activation_checkpointing = recompute saves about" in out
    assert "data.row_length = 2048 instead of 4096 saves about" in out


def test_the_vocabulary_counts(capsys: pytest.CaptureFixture[str]) -> None:
    counts = []
    for size in ("1000", "2000"):
        first, *_ = planned(capsys, "moe_diffuseq", "--gpus", "1", "--vocab_size", size).split()
        counts.append(int(first.replace(",", "")))
    assert counts[1] - counts[0] == 1000 * (128 + 1)


@pytest.mark.parametrize(
    ("gpus", "message"),
    [
        ("8,x", "'x' is not a whole number; give 1 or more"),
        ("0", "0 is not allowed; give 1 or more"),
        ("", "'' is not a whole number; give 1 or more"),
    ],
)
def test_a_wrong_number_of_gpus(gpus: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["plan", "moe_diffuseq", "--gpus", gpus])
    assert exit_.value.code == 2
    assert f"argument --gpus: {message}" in capsys.readouterr().err


def test_a_wrong_spec_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "moe_diffuseq", "--gpus", "8", "model.num_heads=5"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "model.num_heads = 5 must divide" in captured.err

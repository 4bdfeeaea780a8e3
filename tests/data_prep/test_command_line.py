"""The commands as a user types them."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.__main__ import main
from mdseq.data.format import Manifest
from tests.data_prep.conftest import contents, decoded, texts, write_jsonl

ROOT = Path(__file__).parents[2]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number:02}.txt").write_text(f"River {number} runs past the mill.\n" * (number + 1))
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """Run a command that succeeds; returns what it prints."""

    def run_it(*arguments: object) -> str:
        status = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert status == 0, printed.err
        return printed.out

    return run_it


def test_build_verify_stats_show(data: Path, tmp_path: Path, run) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "out"
    build = ("build", data, "--out", out, "--vocab", "600", "--valid-fraction=0.2", "--workers", "1")
    printed = run(*build)
    assert "train" in printed
    assert "fingerprint" in printed
    assert "the text supports" in printed
    assert "nothing to do" in run(*build)
    assert "intact: 12 documents" in run("verify", out)
    printed = run("stats", out)
    assert "median" in printed
    assert (tmp_path / "out.png").stat().st_size > 10_000
    shown = run("show", out, "0")
    assert "00.txt" in shown
    assert "<BOS>River 0 runs past the mill.\n<EOS>" in shown


def test_plan_is_what_build_goes_on_from(data: Path, tmp_path: Path, run) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "out"
    arguments = (data, "--out", out, "--vocab", "600", "--workers", "1")
    assert "12" in run("plan", *arguments)
    planned = (tmp_path / "out.partial" / "plan.json").read_bytes()
    run("build", *arguments)
    assert (out / "plan.json").read_bytes() == planned


def test_a_tokenizer_alone_is_the_one_that_a_build_would_train(data: Path, tmp_path: Path, run) -> None:  # type: ignore[no-untyped-def]
    run("tokenizer", data, "--out", tmp_path / "own.model", "--vocab", "600", "--workers", "1")
    run("build", data, "--out", tmp_path / "trained", "--vocab", "600", "--workers", "1")
    run("build", data, "--out", tmp_path / "given", "--tokenizer", tmp_path / "own.model", "--workers", "1")
    run("build", data, "--out", tmp_path / "reused", "--tokenizer", tmp_path / "given", "--workers", "1")
    built = [Manifest.load(tmp_path / name).fingerprint for name in ("trained", "given", "reused")]
    assert built == [built[0]] * 3
    assert not (tmp_path / "own.model.partial").exists()


def test_named_and_weighted_sources(data: Path, tmp_path: Path, run) -> None:  # type: ignore[no-untyped-def]
    more = write_jsonl(tmp_path / "more.jsonl", texts(30))
    run(
        "build", f"rivers={data}", more, "--out", tmp_path / "out", "--vocab", "600", "--workers", "1",
        "--weight", "rivers=3", "--weight", "more=1", "splits.valid_fraction=0", "cleaning.min_characters=40",
    )  # fmt: skip
    manifest = Manifest.load(tmp_path / "out")
    assert {name: source.weight for name, source in manifest.sources.items()} == {"rivers": 3, "more": 1}
    assert manifest.sources["more"].rejected["too_short"] > 0


def test_options_of_records(tmp_path: Path, run, tokenizer_path: Path) -> None:  # type: ignore[no-untyped-def]
    data = write_jsonl(tmp_path / "qa.jsonl", [{"q": "Where?", "context": "By the mill.", "a": "mill"}] * 2)
    run(
        "build", data, "--out", tmp_path / "out", "--tokenizer", tokenizer_path, "--workers", "1", "--split", "train",
        "--source", "{q}\\n{context}", "--target", "a",
    )  # fmt: skip
    assert decoded(tmp_path / "out") == [("Where?\nBy the mill.", "mill")] * 2
    talk = write_jsonl(tmp_path / "talk.jsonl", [{"turns": [["A", "hi"], ["B", "ho"]]}])
    run(
        "build", talk, "--out", tmp_path / "talk", "--tokenizer", tokenizer_path, "--workers", "1", "--split", "train",
        "--turns", "turns", "--turn", "{0}: {1}\\n", "--last_turn_is_target",
    )  # fmt: skip
    assert decoded(tmp_path / "talk") == [("A: hi\n", "B: ho\n")]


def test_pairs_are_built_of_source_trees(tmp_path: Path, run, tokenizer_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "mill.py").write_text('def turn(wheel):\n    """Turn the wheel once."""\n    return wheel + 1\n')
    run("pairs", tmp_path / "mill.py", "--out", tmp_path / "pairs.jsonl")
    record = json.loads((tmp_path / "pairs.jsonl").read_text())
    assert (record["src"], record["trg"]) == ("def turn(wheel):\n    return wheel + 1", "Turn the wheel once.")
    run(
        "build", tmp_path / "pairs.jsonl", "--out", tmp_path / "out", "--tokenizer", tokenizer_path, "--workers", "1",
        "--split", "train",
    )  # fmt: skip
    assert Manifest.load(tmp_path / "out").kind == "pair"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["build", "absent", "--out", "OUT"], "absent does not exist"),
        (
            ["build", "", "--out", "OUT"],
            "1 problem in the prep spec:\n  sources.0.path.0 = '' (from file) String should",
        ),
        (["build", "DATA", "--out", "DATA"], "is never overwritten"),
        (["build", "DATA", "--out", "OUT", "--workers", "0"], "WORKERS=0"),
        (["build", "DATA", "--out", "OUT", "--vocab", "100"], "vocabulary.size = 100 (from command line) should be"),
        (["build", "DATA", "--out", "OUT", "--valid_fraction", "1"], "splits.valid_fraction = 1"),
        (["build", "DATA", "--out", "OUT", "cleaning.normalize=NFC"], "did you mean cleaning.normalise?"),
        (["build", "DATA", "--out", "OUT", "--weight", "novels=1"], "no source has that name; allowed: text"),
        (["build", "DATA", "DATA", "--out", "OUT"], "two sources are called text"),
        (["build", "a=DATA", "b=DATA", "--weight", "a=1", "--out", "OUT"], "sources without a weight: b"),
        (["build", "DATA", "--out", "OUT", "--source", "q"], "a pair needs both source and target"),
        (["build", "DATA", "--out", "OUT", "--text", "{q!r}"], "must name a field"),
        (["build", "DATA", "--out", "OUT", "--tokenizer", "absent"], "cannot read the tokenizer absent"),
        (["build", "DATA", "--out", "OUT", "--cluster", "slurm", "--tasks", "0"], "--tasks 0 is not allowed"),
        (["build", "absent.toml", "--out", "OUT"], "cannot read absent.toml"),
        (["build", "absent.toml", "DATA", "--out", "OUT"], "another DATA cannot be given beside it"),
        (["build", "splits.valid_fraction=0.5", "--out", "OUT"], "give DATA"),
        (["tokenizer", "DATA", "--out", "DATA"], "is never overwritten"),
        (["verify", "DATA"], "it has no manifest.json"),
        (["stats", "absent"], "no dataset folder absent"),
        (["show", "DATA", "0"], "it has no manifest.json"),
        (["pairs", "DATA", "--out", "OUT"], ".jsonl"),
    ],
)
def test_mistakes_are_one_message(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    before = contents(tmp_path)
    places = {"DATA": str(data), "OUT": str(tmp_path / "out")}
    words = [
        word.replace("DATA", places["DATA"]) if word.endswith("DATA") else places.get(word, word) for word in arguments
    ]
    assert main(words) == 2
    message = capsys.readouterr().err
    assert next(line for line in message.splitlines() if not line.endswith("...")).startswith("error: ")
    assert complaint in message
    assert contents(tmp_path) == before


def test_a_reader_that_has_seen_enough_is_no_mistake(data: Path, tmp_path: Path, run) -> None:  # type: ignore[no-untyped-def]
    (data / "long.txt").write_text("river\n" * 100_000)
    out = tmp_path / "out"
    run("build", data, "--out", out, "--vocab", "600", "--valid_fraction", "0", "--workers", "1")
    show = f"set -o pipefail; {shlex.quote(sys.executable)} -m data_prep show {shlex.quote(str(out))} 12 | head -1"
    done = subprocess.run(["bash", "-c", show], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "long.txt" in done.stdout


def test_an_unknown_option_is_named(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["build", str(data), "--out", str(tmp_path / "out"), "--vocabulary", "600"])
    assert exit.value.code == 2
    assert "--vocabulary" in capsys.readouterr().err

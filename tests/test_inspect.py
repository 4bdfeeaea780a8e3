"""`mdseq inspect attention` draws what a spec means, and says in one message what is wrong with the request."""

from __future__ import annotations

from pathlib import Path

import pytest

from mdseq.cli import main
from mdseq.spec import load_spec

SMALL = ["model.num_layers=2", "attention.window=4"]
PNG = b"\x89PNG"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def inspect(*arguments: str) -> int:
    return main(["inspect", "attention", *arguments])


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert inspect(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_a_preset_with_changes(capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect("quickstart", *SMALL, "attention.dilation=[1,[1,4]]", "--length", "64") == 0
    out = capsys.readouterr().out
    assert "quickstart: attention over 64 tokens, one document" in out
    assert "1 | 4" in out
    assert Path("quickstart-attention.png").read_bytes().startswith(PNG)


def test_a_row_of_the_data_or_of_the_documents_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect("quickstart", *SMALL, "data.row_length=48", "--output", "one.png") == 0
    assert "48 tokens, one document" in capsys.readouterr().out
    assert inspect("quickstart", *SMALL, "--documents", "30,1,20", "--output", "three.png") == 0
    assert "51 tokens, 3 documents" in capsys.readouterr().out
    assert sorted(path.name for path in Path().iterdir()) == ["one.png", "three.png"]


def test_a_run_folder_is_read_and_keeps_its_picture(capsys: pytest.CaptureFixture[str]) -> None:
    run = Path("runs", "mine")
    run.mkdir(parents=True)
    changes = [*SMALL, "attention.dilation=[2, [1, 4]]", "attention.full_every=2"]
    (run / "spec.toml").write_text(load_spec(Path("quickstart"), changes).spec.to_toml(), encoding="utf-8")
    for _ in range(2):  # like the report of a run, it is drawn anew
        assert inspect(str(run), "--length", "40") == 0
    assert "mine: attention over 40 tokens" in capsys.readouterr().out
    assert (run / "attention.png").read_bytes().startswith(PNG)


def test_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    Path("own.toml").write_text("[attention]\nnum_source_global = 3\n", encoding="utf-8")
    assert inspect("own.toml", *SMALL, "--length", "40") == 0
    assert "own: attention over 40 tokens" in capsys.readouterr().out
    assert Path("own-attention.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent"], "no spec at absent; give a TOML file or one of the presets"),
        (["quickstart", "attention.widow=3"], "did you mean attention.window?"),
        (["quickstart", "attention.dilation=[[1, 2, 3]]"], "model.num_heads = 4 does not divide"),
        (
            ["quickstart", *SMALL, "--output", "absent/x.png"],
            "cannot write absent/x.png: No such file or directory; choose another --output",
        ),
        (["quickstart", *SMALL, "--output", "."], "--output . exists and is never overwritten"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert message in complaint(capsys, *arguments)


def test_a_file_of_the_user_is_not_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.png").write_bytes(b"a holiday")
    assert "mine.png exists" in complaint(capsys, "quickstart", "--output", "mine.png")
    assert Path("mine.png").read_bytes() == b"a holiday"


@pytest.mark.parametrize("options", [["--length", "0"], ["--documents", "3,0"], ["--length", "9", "--documents", "3"]])
def test_impossible_rows(capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        inspect("quickstart", *options)
    assert exit_.value.code == 2
    assert capsys.readouterr().err.startswith("usage:")

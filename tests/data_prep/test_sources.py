"""Which files are read, in which order, and as what."""

import subprocess
from pathlib import Path

import pytest

from data_prep.sources import find_files
from data_prep.spec import SourceSpec
from mdseq.errors import UserError


def find(path: Path | str, **keys: object) -> list[tuple[str, str]]:
    files = find_files(SourceSpec(name="here", path=(str(path),), **keys))  # type: ignore[arg-type]
    return [(file.name, file.format) for file in files]


def names(path: Path | str, **keys: object) -> list[str]:
    return [name for name, _ in find(path, **keys)]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    files = {
        "b.txt": "text",
        "a/readme.MD": "markdown",
        "a/guide.rst": "more",
        "code.py": "x = 1\n",
        "tests/test_code.py": "assert 1\n",
        ".git/config": "[core]",
        ".hidden.txt": "no",
        "__pycache__/code.txt": "no",
        "a/node_modules/x.txt": "no",
        "lib/site-packages/y.txt": "no",
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return tmp_path


def test_folder_of_text(tree: Path) -> None:
    assert names(tree) == names(tree, format="text") == ["a/guide.rst", "a/readme.MD", "b.txt"]


def test_source_tree(tree: Path) -> None:
    everything = ["a/guide.rst", "a/readme.MD", "b.txt", "code.py", "tests/test_code.py"]
    assert names(tree, format="code") == everything
    assert names(tree, format="code", exclude=("tests", "*.md", "*.MD")) == ["a/guide.rst", "b.txt", "code.py"]
    assert names(tree, format="code", exclude=("a/*", "*.txt")) == ["code.py", "tests/test_code.py"]


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("a.txt", "text"), ("a.md.zst", "text"), ("a.JSONL", "jsonl"), ("a.ndjson.xz", "jsonl"), ("a.csv.bz2", "csv"),
        ("a.tsv", "csv"), ("a.parquet", "parquet"), ("a.arrow", "arrow"), ("a.feather", "arrow"),
    ],
)  # fmt: skip
def test_format_by_suffix(tmp_path: Path, name: str, format: str) -> None:
    (tmp_path / name).touch()
    assert find(tmp_path) == [(name, format)]


def test_records_are_preferred_to_the_text_beside_them(tree: Path) -> None:
    (tree / "part.jsonl.gz").touch()
    (tree / "part.parquet").touch()
    assert names(tree) == ["part.jsonl.gz", "part.parquet"]
    assert names(tree, format="jsonl") == ["part.jsonl.gz"]
    assert names(tree, format="lines") == ["a/guide.rst", "a/readme.MD", "b.txt"]


def test_one_file(tree: Path) -> None:
    assert find(tree / "b.txt") == [("b.txt", "text")]
    assert find(tree / "code.py", format="text") == [("code.py", "text")]
    assert find(tree / "code.py", format="jsonl") == [("code.py", "jsonl")]
    with pytest.raises(UserError, match=r"nothing to read .*format = code"):
        find(tree / "code.py")
    with pytest.raises(UserError, match=r"absent does not exist; give .* \(sources.here\)"):
        find(tree / "absent")


def test_globs_and_lists_of_paths(tree: Path) -> None:
    (tree / "deep" / "er").mkdir(parents=True)
    for name in ("1.jsonl", "deep/2.jsonl", "deep/er/3.jsonl"):
        (tree / name).touch()
    assert names(tree / "*.jsonl") == ["1.jsonl"]
    assert names(tree / "**" / "*.jsonl") == ["1.jsonl", "deep/2.jsonl", "deep/er/3.jsonl"]
    assert names(tree / "deep" / "[0-9].jsonl") == ["2.jsonl"]
    source = SourceSpec(name="two", path=(str(tree / "deep"), str(tree / "1.jsonl"), str(tree / "deep")))
    assert [file.name for file in find_files(source)] == ["2.jsonl", "er/3.jsonl", "1.jsonl"]
    with pytest.raises(UserError, match="does not exist"):
        find(tree / "*.parquet")


GITIGNORES = {
    ".gitignore": "*.log\n/build\nkept/*\n!kept/this.txt\nonly_folder/\n# comment\n\\#hash\n",
    "sub/.gitignore": "!important.log\nlocal.txt\n",
}
FILES = (
    "a.py", "b.log", "build/out.py", "sub/build/out.py", "sub/important.log", "sub/other.log", "sub/local.txt",
    "local.txt",
    "kept/this.txt", "kept/that.txt", "only_folder/x.py", "sub/only_folder", "sub/deep/important.log", "#hash",
)  # fmt: skip


def test_gitignore_files_are_read_as_git_reads_them(tmp_path: Path) -> None:
    for name, content in {**dict.fromkeys(FILES, "x"), **GITIGNORES}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    listed = ["git", "-C", tmp_path, "ls-files", "-z", "--others", "--exclude-standard"]
    by_git = subprocess.run(listed, check=True, capture_output=True, text=True).stdout.split("\0")
    visible = sorted(name for name in by_git if name and not Path(name).name.startswith("."))
    assert "sub/important.log" in visible
    assert len(visible) < len(FILES)
    assert names(tmp_path, format="code") == visible


def test_split_by_name(tmp_path: Path) -> None:
    wanted = {"train-00.jsonl": "train", "dev.jsonl": "valid", "validation_1.jsonl": "valid", "TEST.jsonl.gz": "test"}
    for name in wanted:
        (tmp_path / name).touch()
    files = find_files(SourceSpec(name="s", path=(str(tmp_path),), split="name"))
    assert {file.name: file.split for file in files} == wanted
    assert {file.split for file in find_files(SourceSpec(name="s", path=(str(tmp_path),), split="test"))} == {"test"}
    assert {file.split for file in find_files(SourceSpec(name="s", path=(str(tmp_path),)))} == {None}
    (tmp_path / "trainer.jsonl").touch()
    with pytest.raises(UserError, match=r"trainer.jsonl: its name does not begin with train, valid"):
        find_files(SourceSpec(name="s", path=(str(tmp_path),), split="name"))

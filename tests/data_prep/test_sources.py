"""Which files are read, and what becomes of each record."""

import gzip
import json
from pathlib import Path

import pytest

from data_prep.clean import screen
from data_prep.sources import Document, Rejection, find_sources, read_source
from mdseq.errors import UserError


def records(path: Path, format: str = "auto", text_key: str = "text") -> list[Document | Rejection]:
    sources = find_sources(path, format, exclude=())
    return [screen(record) for source in sources for record in read_source(source, text_key)]


def names(path: Path, format: str, exclude: tuple[str, ...] = ()) -> list[str]:
    return [source.name for source in find_sources(path, format, exclude)]


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
    assert names(tree, "auto") == names(tree, "text") == ["a/guide.rst", "a/readme.MD", "b.txt"]


def test_source_tree(tree: Path) -> None:
    everything = ["a/guide.rst", "a/readme.MD", "b.txt", "code.py", "tests/test_code.py"]
    assert names(tree, "code") == everything
    assert names(tree, "code", exclude=("tests", "*.md", "*.MD")) == ["a/guide.rst", "b.txt", "code.py"]
    assert names(tree, "code", exclude=("a/*", "*.txt")) == ["code.py", "tests/test_code.py"]


def test_auto_prefers_records_to_the_text_beside_them(tree: Path) -> None:
    (tree / "part.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n'))
    assert names(tree, "auto") == ["part.jsonl.gz"]


def test_one_file(tree: Path) -> None:
    assert names(tree / "b.txt", "auto") == ["b.txt"]
    assert names(tree / "code.py", "text") == ["code.py"]
    with pytest.raises(UserError, match=r"nothing to read .*FORMAT=code"):
        find_sources(tree / "code.py", "auto", exclude=())
    with pytest.raises(UserError, match="does not exist"):
        find_sources(tree / "absent", "auto", exclude=())


def test_text_is_exact(tmp_path: Path) -> None:
    text = "\ufeffline\r\n\n  indented\ttab \n"
    (tmp_path / "plain.txt").write_bytes(text.encode())
    (tmp_path / "packed.txt.gz").write_bytes(gzip.compress(text.encode()))
    assert records(tmp_path) == [Document("packed.txt.gz", 0, text), Document("plain.txt", 0, text)]


def test_files_that_are_not_text(tmp_path: Path) -> None:
    (tmp_path / "binary.so").write_bytes(b"\x7fELF\0\1")
    (tmp_path / "empty.py").write_bytes(b"")
    (tmp_path / "latin.py").write_bytes("é".encode("latin-1"))
    assert [record.reason for record in records(tmp_path, "code") if isinstance(record, Rejection)] == [
        "binary",
        "empty",
        "not_utf8",
    ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"text": "a\\n b"}', ("a\n b", None)),
        (b'{"src": "a", "trg": "b", "id": 3}', ("a", "b")),
        (b'{"text": "a", "src": "b", "trg": "c"}', ("a", None)),
        (b'{"text": "a"', "not_json"),
        (b"[" * 100_000, "not_json"),
        (b'{"text": ' + b"9" * 5000 + b"}", "not_json"),
        (b'{"text": "\xff"}', "not_utf8"),
        (b'["a"]', "not_an_object"),
        (b'{"src": "a"}', "missing_field"),
        (b'{"text": 3}', "not_a_string"),
        (b'{"text": null}', "not_a_string"),
        (b'{"src": "a", "trg": ["b"]}', "not_a_string"),
        (b'{"src": "a", "trg": null}', "not_a_string"),
        (b'{"text": " \\n"}', "empty"),
        (b'{"src": "a", "trg": ""}', "empty"),
        (b'{"text": "\\ud800"}', "invalid_unicode"),
        (b'{"text": "a\\u0000b"}', ("a\0b", None)),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_record(tmp_path: Path, line: bytes, expected: tuple[str, str | None] | str) -> None:
    (tmp_path / "records.jsonl").write_bytes(b"\n" + line + b"\n")
    (record,) = records(tmp_path)
    assert (record.source, record.line) == ("records.jsonl", 2)
    if isinstance(record, Document):
        assert (record.text, record.target) == expected
    else:
        assert record.reason == expected
        assert len(record.excerpt) <= 200
        record.excerpt.encode()


def test_text_key(tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").write_text(json.dumps({"body": "a", "text": "b"}))
    assert records(tmp_path, text_key="body") == [Document("records.jsonl", 1, "a")]


@pytest.mark.parametrize("cut", [5, -5])
def test_truncated_gzip_is_an_error(tmp_path: Path, cut: int) -> None:
    (tmp_path / "part.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 100)[:cut])
    with pytest.raises(UserError, match=r"part.jsonl.gz is not a whole gzip file"):
        records(tmp_path)

"""Whatever a file holds, a build ends with a dataset or a message; a record is a document or a counted rejection."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data_prep import audit
from mdseq.errors import UserError
from tests.data_prep.conftest import Build, decoded

FILES = (
    "a.txt",
    "a.jsonl",
    "a.csv",
    "a.parquet",
    "a.arrow",
    "a.txt.gz",
    "a.jsonl.zst",
    "a.csv.xz",
    "a.txt.bz2",
    "a.py",
)
BEAR_ALL = ("cleaning.max_faulty_fraction=1", "cleaning.max_filtered_fraction=1")

fuzz = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "src", "trg"]) | st.text(), inner)
    ),
    max_leaves=8,
)


def built_or_refused(build_dataset: Build, data: Path, out: Path, **options: object) -> list[tuple[str, ...]] | None:
    """The documents of the dataset, after its books are checked; None where there is a message instead."""
    try:
        manifest = build_dataset(data, out, *BEAR_ALL, **options)
    except UserError:
        assert not out.exists()
        return None
    documents = decoded(out)
    (source,) = manifest.sources.values()
    assert source.read == len(documents) + sum(source.rejected.values())
    assert audit.verify(out) == len(documents)
    return documents


@fuzz
@given(name=st.sampled_from(FILES), content=st.binary(max_size=2000))
@example(name="a.jsonl", content=b"")
@example(name="a.jsonl", content=b"\0" * 500)
@example(name="a.jsonl", content=b'{"text": "\\ud800"}\n{"text": "a\\u0000"}\r\n')
@example(name="a.csv", content=b"text\r\na\r\n\r\n")
@example(name="a.txt", content=b"a\r\nb\0\xed\xa0\x80")
@example(name="a.txt.gz", content=gzip.compress(b"text" * 1000)[:-9])
def test_any_bytes(build_dataset: Build, tmp_path_factory: pytest.TempPathFactory, name: str, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / name).write_bytes(content)
    format = "code" if name == "a.py" else "auto"
    documents = built_or_refused(build_dataset, folder / name, folder / "out", format=format, path_header="")
    if name in ("a.txt", "a.py") and documents:
        assert documents == [(content.decode(),)]


@fuzz
@given(records=st.lists(json_values, min_size=1, max_size=8), pairs=st.booleans())
def test_any_json(
    build_dataset: Build, tmp_path_factory: pytest.TempPathFactory, records: list[object], pairs: bool
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    fields = {"source": "src", "target": "trg"} if pairs else {"text": "text"}
    names = ["src", "trg"] if pairs else ["text"]
    documents = built_or_refused(build_dataset, folder / "a.jsonl", folder / "out", **fields)
    wanted = []
    for record in records:
        parts = [record.get(name) if isinstance(record, dict) else None for name in names]
        if all(isinstance(part, str) and part.strip() and is_unicode(part) for part in parts):
            wanted.append(tuple(parts))
    assert sorted(documents or []) == sorted(wanted)


def is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


@fuzz
@given(texts=st.lists(st.none() | st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=8))
def test_any_table(build_dataset: Build, tmp_path_factory: pytest.TempPathFactory, texts: list[str | None]) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    table = pa.table({"text": pa.array(texts, pa.string())})
    pq.write_table(table, folder / "a.parquet")
    with pa.ipc.new_file(folder / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    found = [
        built_or_refused(build_dataset, folder / f"a.{format}", folder / f"out-{format}")
        for format in ("parquet", "arrow")
    ]
    kept = sorted((text,) for text in texts if text and text.strip())
    assert [sorted(documents or []) for documents in found] == [kept, kept]


@fuzz
@given(content=st.binary(max_size=300), cut=st.integers(0, 400))
@example(content=b"\x80", cut=24)  # a text of the first row is not UTF-8
def test_a_damaged_table_is_a_message_or_whole(
    build_dataset: Build, tmp_path_factory: pytest.TempPathFactory, content: bytes, cut: int
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    for name in ("a.parquet", "a.arrow"):
        path = folder / name
        table = pa.table({"text": ["past the mill"] * 20})
        if name == "a.parquet":
            pq.write_table(table, path)
        else:
            with pa.ipc.new_file(path, table.schema) as writer:
                writer.write_table(table)
        whole = path.read_bytes()
        path.write_bytes(whole[:cut] + content + whole[cut + len(content) :])
        built_or_refused(build_dataset, path, folder / f"out-{path.suffix[1:]}")


def test_a_line_of_200_megabytes(build_dataset: Build, tmp_path: Path) -> None:
    line = b"x" * 1_000_000
    with (tmp_path / "a.jsonl").open("wb") as file:
        file.write(b'{"text": "before"}\n{"text": "')
        for _ in range(200):
            file.write(line)
        file.write(b'"}\n{"text": "after"}\n')
    documents = built_or_refused(build_dataset, tmp_path / "a.jsonl", tmp_path / "out")
    assert documents == [("before",), ("after",)]


def test_a_text_that_is_one_long_line(build_dataset: Build, tmp_path: Path) -> None:
    text = "river" * 400_000
    (tmp_path / "a.txt").write_text(text)
    assert built_or_refused(build_dataset, tmp_path / "a.txt", tmp_path / "out") == [(text,)]

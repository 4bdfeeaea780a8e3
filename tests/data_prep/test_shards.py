"""A shard holds what it was given, whether documents share a batch or one alone is larger than a batch may be."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import shards
from data_prep.shards import ShardWriter
from mdseq.data.format import TokenDtype, file_sha256, shard_schema

documents_of = st.lists(st.lists(st.lists(st.integers(0, 65_535), max_size=12), max_size=4), max_size=12)


def write(path: Path, documents: list[list[list[int]]], dtype: TokenDtype) -> pa.Table:
    """Each document is appended in its chunks."""
    writer = ShardWriter(path, dtype, "fingerprint", "novels", ("a.txt", "b.txt"))
    for number, chunks in enumerate(documents):
        for chunk in chunks:
            writer.append(np.array(chunk, dtype=np.int32))
        writer.end_document(1, bytes([number]) * 16, "ab"[number % 2] + ".txt", number, text_bytes=10 * number)
    entry, text_bytes = writer.close()
    assert text_bytes == 10 * sum(range(len(documents)))
    assert (entry.file, entry.bytes, entry.sha256) == (path.name, path.stat().st_size, file_sha256(path))
    with pa.memory_map(str(path)) as file:
        table = pa.ipc.open_file(file).read_all()
    assert (entry.documents, entry.tokens) == (table.num_rows, sum(map(len, table["tokens"].to_pylist())))
    return table


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@given(documents=documents_of)
def test_documents_of_any_size(
    tmp_path_factory: pytest.TempPathFactory, dtype: TokenDtype, documents: list[list[list[int]]]
) -> None:
    folder = tmp_path_factory.mktemp("shard")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "MAX_BATCH_TOKENS", 20)
        patch.setattr(shards, "MAX_BATCH_DOCUMENTS", 3)
        table = write(folder / "train-00000.arrow", documents, dtype)
    assert table.schema.equals(shard_schema(dtype, "fingerprint"), check_metadata=True)
    assert table["tokens"].to_pylist() == [[token for chunk in document for token in chunk] for document in documents]
    numbers = range(len(documents))
    assert table["row"].to_pylist() == list(numbers)
    assert table["document_id"].to_pylist() == [bytes([number]) * 16 for number in numbers]
    assert table["origin"].to_pylist() == ["ab"[number % 2] + ".txt" for number in numbers]
    assert set(table["source"].to_pylist()) <= {"novels"}
    assert [path.name for path in folder.iterdir()] == ["train-00000.arrow"]


def test_batches_are_cut_by_documents_and_by_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_BATCH_TOKENS", 10)
    monkeypatch.setattr(shards, "MAX_BATCH_DOCUMENTS", 3)
    sizes = [1, 1, 1, 1, 6, 5, 12, 2, 25]
    write(tmp_path / "a.arrow", [[[7] * size] for size in sizes], "uint16")
    with pa.memory_map(str(tmp_path / "a.arrow")) as file:
        reader = pa.ipc.open_file(file)
        lengths = [
            [len(tokens) for tokens in reader.get_batch(index).column("tokens").to_pylist()]
            for index in range(reader.num_record_batches)
        ]
    assert lengths == [[1, 1, 1], [1, 6], [5], [12], [2], [25]]


def test_the_same_documents_are_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_BATCH_TOKENS", 10)
    for name, chunks in (("a", [[1] * 30, [2] * 5]), ("b", [[1]] * 30 + [[2, 2], [], [2, 2, 2]])):
        write(tmp_path / f"{name}.arrow", [chunks], "uint16")
    assert (tmp_path / "a.arrow").read_bytes() == (tmp_path / "b.arrow").read_bytes()


def test_nothing_has_the_shards_name_before_it_is_whole(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "a.arrow", "uint16", "fingerprint", "novels", ("a.txt",))
    writer.append(np.array([1, 2, 3]))
    writer.end_document(1, bytes(16), "a.txt", 0, 3)
    assert not (tmp_path / "a.arrow").exists()
    writer.close()
    assert (tmp_path / "a.arrow").exists()

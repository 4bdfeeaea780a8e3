"""The rows of a run are those that its spec asks for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mdseq.data.corpus import Corpus
from mdseq.errors import UserError
from mdseq.spec import RunSpec
from mdseq.train.rows import Rows
from tests.data.datasets import Shard, write_dataset

LENGTHS = {"novels": [40, 30, 50, 24], "letters": [6, 10, 7, 9]}


def corpus_of(folder: Path, kind: str = "text", weights: dict[str, float] | None = None) -> Corpus:
    sources = {name: [Shard(np.full(sum(lengths), 9, dtype=np.uint16), lengths)] for name, lengths in LENGTHS.items()}
    return Corpus.open(write_dataset(folder, {"train": sources}, kind, weights), "train")


def spec_of(**data: object) -> RunSpec:
    return RunSpec.model_validate({"data": {"row_length": 64, **data}})


def test_without_weights_all_sources_are_one(tmp_path: Path) -> None:
    rows = Rows.of(corpus_of(tmp_path), spec_of())
    assert rows.packing.num_rows == 3
    assert rows.describe() == "all sources: 3 rows, 8.33% padding, 3.3 documents a row, 25.0% of the documents cut"
    assert sorted(rows.order.rows(0, 3).tolist()) == [0, 1, 2]


@pytest.mark.parametrize("weights", [{"novels": 3.0, "letters": 1.0}, None])
def test_weights_of_the_dataset_or_of_the_run(tmp_path: Path, weights: dict[str, float] | None) -> None:
    mixture = {} if weights else {"novels": 30, "letters": 10}
    rows = Rows.of(corpus_of(tmp_path, weights=weights), spec_of(packing="whole", mixture=mixture))
    novels, letters = rows.describe().splitlines()
    assert novels.startswith("novels, 75.0% of the rows read: 3 rows, 25.00% padding, 1.3 documents a row")
    assert letters.startswith("letters, 25.0% of the rows read: 1 rows, 50.00% padding, 4.0 documents a row")
    taken = np.bincount(rows.order.rows(0, 1024))
    assert taken[:3].sum() == 768
    assert taken[3] == 256
    assert rows.packing.pieces(np.array([3])).document.tolist() == [4, 5, 6, 7]


def test_a_source_can_be_left_out(tmp_path: Path) -> None:
    rows = Rows.of(corpus_of(tmp_path), spec_of(mixture={"novels": 0, "letters": 1}))
    assert rows.packing.num_rows == 1
    assert rows.packing.pieces(np.array([0])).document.tolist() == [4, 5, 6, 7]


def test_a_source_without_a_weight_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no weight for letters; .*: novels, letters"):
        Rows.of(corpus_of(tmp_path), spec_of(mixture={"novels": 1}))


def test_pairs_are_not_cut(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"set data.packing=whole"):
        Rows.of(corpus_of(tmp_path, "pair"), spec_of())


def test_the_window_is_that_of_the_spec(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path)
    orders = [Rows.of(corpus, spec_of(row_length=8, shuffle_window=window)).order for window in (2, 64)]
    assert orders[0].rows(0, 22).tolist() != orders[1].rows(0, 22).tolist()

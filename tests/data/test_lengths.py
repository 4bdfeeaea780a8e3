"""How long targets are, told from the lengths of the training data."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdseq.data import lengths
from mdseq.data.corpus import Corpus
from mdseq.data.lengths import NUM_QUANTILES, RIDGE, LengthTable, worth_of_tokens
from mdseq.errors import UserError


NONE = np.empty(0)


def tokens(count: int) -> np.ndarray:
    return np.zeros(count, np.int64)


def slow_table(sources: list[float], targets: list[int], worth_v: np.ndarray = NONE) -> LengthTable:
    """Bin by bin and quantile by quantile, by the definition: linear between the sorted values."""
    bins = defaultdict(list)
    for source, target in zip(sources, targets, strict=True):
        bins[math.floor(2 * math.log2(source))].append((math.log2(source), target))
    rows = []
    for number in sorted(bins):
        ordered = sorted(target for _, target in bins[number])
        quantiles = []
        for q in range(NUM_QUANTILES):
            place = q / (NUM_QUANTILES - 1) * (len(ordered) - 1)
            low, part = int(place), place - int(place)
            high = min(low + 1, len(ordered) - 1)
            quantiles.append(ordered[low] * (1 - part) + ordered[high] * part)
        rows.append((statistics.fmean(source for source, _ in bins[number]), tuple(quantiles)))
    return LengthTable("pair", tuple(worth_v.tolist()), tuple(source for source, _ in rows), tuple(quantiles for _, quantiles in rows))


def test_the_table_is_that_of_the_definition() -> None:
    rng = np.random.default_rng(0)
    source_n, target_n = rng.integers(1, 5000, 700), rng.integers(1, 900, 700)
    table, slow = LengthTable.of_lengths("pair", NONE, source_n, target_n), slow_table(source_n.tolist(), target_n.tolist())
    assert table.sources_k == pytest.approx(slow.sources_k)
    assert np.array(table.quantiles_kq) == pytest.approx(np.array(slow.quantiles_kq))


def test_a_corpus_of_pairs(pair_dataset: Path) -> None:
    """Counted document by document."""
    corpus = Corpus.open(pair_dataset, "train")
    starts = [corpus.target_start(document) for document in range(corpus.num_documents)]
    targets = [corpus.length(document) - start for document, start in enumerate(starts)]
    sources = [corpus.tokens(document, 0, start) for document, start in enumerate(starts)]
    table = LengthTable.of(corpus)
    worth_v = worth_of_tokens(sources, np.array(targets), corpus.manifest.vocab_size)
    slow = slow_table([max(1.0, sum(map(float, worth_v[source]))) for source in sources], targets, worth_v)
    assert table.kind == "pair"
    assert table.worth_v == slow.worth_v
    assert table.sources_k == pytest.approx(slow.sources_k)
    assert np.array(table.quantiles_kq) == pytest.approx(np.array(slow.quantiles_kq))


def test_of_many_sources_some_are_read(pair_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many tokens as are allowed, from documents all over the corpus."""
    corpus, read = Corpus.open(pair_dataset, "train"), []
    tokens_of = corpus.tokens
    monkeypatch.setattr(corpus, "tokens", lambda n, *where: read.append(n) or tokens_of(n, *where))
    total = sum(corpus.target_start(document) for document in range(corpus.num_documents))
    monkeypatch.setattr(lengths, "MAX_TOKENS", total // 4)
    table = LengthTable.of(corpus)
    assert corpus.num_documents / 5 - 1 < len(read) < corpus.num_documents / 4 + 1
    assert read == list(range(0, corpus.num_documents, read[1]))
    assert table.at(tokens_of(0, 0, corpus.target_start(0)), 0.5) > 1


@settings(max_examples=30)
@given(st.integers(0, 1000), st.integers(1, 60), st.integers(1, 12), st.booleans())
def test_worth_is_that_of_ridge_regression(seed: int, num_documents: int, vocab_size: int, alike: bool) -> None:
    """By the normal equations, with every count in a matrix."""
    rng = np.random.default_rng(seed)
    sources = [rng.integers(0, vocab_size, rng.integers(1, 30)) for _ in range(num_documents)]
    target_n = np.full(num_documents, 7) if alike else rng.integers(1, 60, num_documents)
    count_nv = np.stack([np.bincount(source, minlength=vocab_size) for source in sources])
    average = target_n.sum() / count_nv.sum()
    left_vv = count_nv.T @ count_nv + RIDGE * np.eye(vocab_size)
    expected_v = average + np.linalg.solve(left_vv, count_nv.T @ (target_n - average * count_nv.sum(axis=1)))
    assert worth_of_tokens(sources, target_n, vocab_size) == pytest.approx(expected_v, rel=2e-3, abs=2e-3)


def test_tokens_that_stand_for_many_make_a_target_long() -> None:
    """Of 8 source tokens, each 5 is three tokens of the target, and each 6 one."""
    fives = np.random.default_rng(0).integers(0, 9, 600)
    sources, target_n = [np.array([5] * n + [6] * (8 - n)) for n in fives], 8 + 2 * fives
    worth_v = worth_of_tokens(sources, target_n, 10)
    table = LengthTable.of_lengths("pair", worth_v, [worth_v[source].sum() for source in sources], target_n)
    for n in range(9):
        assert table.at(np.array([5] * n + [6] * (8 - n)), 0.5) == pytest.approx(8 + 2 * n, abs=1.5)


def test_lengths_follow_the_source_between_bins_and_stop_at_the_ends() -> None:
    source_n = np.repeat([8, 64], 101)
    target_n = np.concatenate([np.arange(100, 201), np.arange(400, 501)])
    table = LengthTable.of_lengths("pair", np.ones(1), source_n, target_n)
    assert [table.at(tokens(source), 0.5) for source in (0, 1, 8, 64, 5000)] == [150, 150, 150, 450, 450]
    assert table.at(tokens(22), 0.5) == pytest.approx(300, abs=8)  # half-way on the scale of logarithms
    assert [table.at(tokens(8), uniform) for uniform in (0.0, 0.25, 1.0)] == [100, 125, 200]


def test_texts_are_as_long_as_documents_less_what_is_given() -> None:
    length_n = np.arange(100, 201)
    table = LengthTable.of_lengths("text", NONE, np.ones_like(length_n), length_n)
    assert table.at(tokens(1), 0.5) == 150  # the BOS alone
    assert table.at(tokens(51), 0.5) == 100  # 50 tokens given, none of the documents is shorter
    assert table.at(tokens(151), 0.5) == 25  # of those that are longer than 150: 150 to 200
    assert table.at(tokens(151), 0.0) == 1  # never nothing
    assert table.at(tokens(1000), 0.5) == 150  # longer than all of them: nothing is known


def test_draws_have_the_distribution_of_the_data() -> None:
    rng = np.random.default_rng(1)
    target_n = rng.lognormal(5, 0.5, 4000).astype(int) + 1
    table = LengthTable.of_lengths("pair", np.ones(1), np.full(4000, 30), target_n)
    drawn = [table.at(tokens(30), uniform) for uniform in rng.random(4000)]
    for q in (0.1, 0.3, 0.5, 0.7, 0.9):
        assert np.quantile(drawn, q) == pytest.approx(np.quantile(target_n, q), rel=0.05)


def test_the_table_of_a_corpus_of_texts(corpus_of) -> None:
    lengths = [11, 21, 31, 41, 51]
    table = LengthTable.of(corpus_of(lengths))
    assert table.quantiles_kq[0][0] == 10  # less the BOS
    assert table.quantiles_kq[0][-1] == 50
    assert table.at(tokens(1), 0.5) == 30


def test_the_table_of_some_sources_of_a_corpus(corpus_of) -> None:
    """Source a has 6 documents, b 6 and c 2; asked for in any order, twice or not."""
    lengths = [10, 12, 14, 16, 18, 20, *[90] * 6, 40, 44]
    corpus = corpus_of(lengths, target_starts=[4] * 14, documents_per_source=6, kind="pair")

    def quantiles(table: LengthTable) -> np.ndarray:
        return np.array(table.quantiles_kq)

    def of(lengths: list[int]) -> np.ndarray:
        return quantiles(LengthTable.of(corpus_of(lengths, target_starts=[4] * len(lengths), kind="pair")))

    assert quantiles(LengthTable.of(corpus, ["b"])) == pytest.approx(of(lengths[6:12]))
    assert quantiles(LengthTable.of(corpus, ["c"])) == pytest.approx(of(lengths[12:]))
    assert quantiles(LengthTable.of(corpus, ("c", "a", "c"))) == pytest.approx(of([*lengths[12:], *lengths[:6]]))
    assert quantiles(LengthTable.of(corpus, ["a", "b", "c"])) == pytest.approx(of(lengths))
    assert LengthTable.of(corpus, ["a", "b", "c"]) == LengthTable.of(corpus)


def test_a_source_that_is_not_there(corpus_of) -> None:
    corpus = corpus_of([10, 12, 14], documents_per_source=2)
    with pytest.raises(UserError, match=r"data\.lengths_of: .* of pears, plums; allowed: a, b"):
        LengthTable.of(corpus, ["pears", "a", "plums"])


def test_it_is_json() -> None:
    table = LengthTable.of_lengths("pair", np.array([0.5, 1.25]), np.array([3, 9, 9]), np.array([1, 2, 5]))
    values = table.to_dict()
    assert json.loads(json.dumps(values)) == values
    assert LengthTable.from_dict(values) == table

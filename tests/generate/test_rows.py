"""Rows are laid out as they are asked for, and batched by length."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mdseq.data.tokenizer import SpecialToken
from mdseq.generate import rows as rows_module
from mdseq.generate.rows import Row, by_length, fill
from mdseq.generate.sampler import SamplerOptions, Samples
from tests.generate.models import tiny_model

VOCAB = 30
GIVEN = np.array([SpecialToken.BOS, 7, 8, 9])


def test_a_row_of_parts() -> None:
    row = Row.of([GIVEN, 3, np.array([11]), 1], sample_id=5, source_length=2)
    assert row.tokens_l.tolist() == [SpecialToken.BOS, 7, 8, 9, 0, 0, 0, 11, 0]
    assert row.target_l.nonzero()[0].tolist() == [4, 5, 6, 8]
    assert (len(row), row.sample_id, row.source_length) == (9, 5, 2)


def test_what_the_sampler_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fake(model, tokens_bl, target_bl, documents, sample_b, options, observe):
        calls.append((tokens_bl, target_bl, documents, sample_b, observe))
        return Samples(tokens_bl + 1, torch.zeros_like(sample_b))

    monkeypatch.setattr(rows_module, "sample", fake)
    rows = [Row.of([GIVEN, 3], 5, 0), Row.of([GIVEN[:2], 2, GIVEN[1:]], 9, 2)]
    filled = fill(tiny_model(VOCAB), rows, SamplerOptions())
    ((tokens_bl, target_bl, documents, sample_b, observe),) = calls
    for b, row in enumerate(rows):
        assert tokens_bl[b, : len(row)].tolist() == row.tokens_l.tolist()
        assert target_bl[b, : len(row)].tolist() == row.target_l.tolist()
        assert (tokens_bl[b, len(row) :] == SpecialToken.PAD).all()
        assert not target_bl[b, len(row) :].any()
        assert documents.real_bl[b].sum() == len(row)
        assert filled[b].tolist() == (row.tokens_l + 1).tolist()
    assert documents.position_bl.tolist() == [[0, 1, 2, 3, 4, 5, 6], [0, 1, 1, 2, 3, 4, 5]]
    assert sample_b.tolist() == [5, 9]
    assert observe is None


def test_given_tokens_are_kept_and_gaps_are_filled() -> None:
    row = Row.of([GIVEN, 5, GIVEN[1:], 2, GIVEN[1:]], 0, 0)
    (tokens_l,) = fill(tiny_model(VOCAB), [row], SamplerOptions(num_calls=3))
    assert (tokens_l[~row.target_l] == row.tokens_l[~row.target_l]).all()
    assert not np.isin(tokens_l[row.target_l], [SpecialToken.PAD, SpecialToken.BOS, SpecialToken.SEP]).any()


def test_batches_hold_what_is_of_about_the_same_length() -> None:
    lengths = [5, 90, 7, 88, 6, 91, 4]
    batches = list(by_length(lengths, lambda length: length, 3))
    assert batches == [[91, 90, 88], [7, 6, 5], [4]]
    assert list(by_length([], len, 3)) == []

"""The leading tokens of each source are global, and nothing else is."""

from __future__ import annotations

import torch

from mdseq.model.source import mark_source
from mdseq.sparse import Documents
from mdseq.sparse.documents import NO_DOCUMENT


def packed() -> tuple[Documents, torch.Tensor]:
    """Three documents of 4, 1 and 0 source tokens and 2, 2 and 3 target tokens, then padding."""
    document_bl = torch.tensor([[0] * 6 + [1] * 3 + [2] * 3 + [NO_DOCUMENT] * 2])
    position_bl = torch.tensor([[*range(6), *range(3), *range(3), 0, 0]])
    target_bl = torch.tensor([[0, 0, 0, 0, 1, 1, 0, 1, 1, 1, 1, 1, 0, 0]]).bool()
    return Documents(document_bl, position_bl, num_documents=3), target_bl


def test_leading_source_tokens_are_marked() -> None:
    documents, target_bl = packed()
    for count, marked in ((1, [0, 6]), (2, [0, 1, 6]), (9, [0, 1, 2, 3, 6])):
        found = mark_source(documents, target_bl, count)
        assert found.global_bl is not None
        assert found.global_bl[0].nonzero().flatten().tolist() == marked
        assert len(marked) <= found.num_global_tokens <= 14


def test_the_bound_needs_no_look_at_the_marks() -> None:
    documents, target_bl = packed()
    assert mark_source(documents, target_bl, 2).num_global_tokens == 6
    assert mark_source(documents, target_bl, 9).num_global_tokens == 14


def test_marked_tokens_move_and_are_not_added() -> None:
    documents, target_bl = packed()
    before, after = documents.layout(), mark_source(documents, target_bl, 2).layout()
    assert before.num_global == 0
    assert after.document_bs[0, : after.num_global].tolist() == [0, 0, 1, -1, -1, -1]
    assert before.real_bs.sum() == after.real_bs.sum() == 12


def test_without_global_source_tokens_the_layouts_stay_shared() -> None:
    documents, target_bl = packed()
    assert mark_source(documents, target_bl, 0) is documents

"""Batches hold exactly what the plan says, however ranks and micro-batches share the step."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mdseq.data.batch import Batch
from mdseq.data.corpus import Corpus
from mdseq.data.loader import Loader
from mdseq.data.order import RowOrder
from mdseq.data.packing import SplitPacking, WholePacking
from mdseq.data.prefix import CleanPrefix
from mdseq.data.tokenizer import SpecialToken

FIRST_TOKEN = 5
LENGTHS = [7, 3, 12, 5, 2, 2, 9, 4, 16, 6, 3, 3]
TARGET_STARTS = [1, 2, 8, 1, 1, 1, 3, 2, 11, 1, 2, 1]
FIELDS = ("tokens_bl", "document_bl", "position_bl", "target_bl", "row_b")


def read(corpus: Corpus, step: int, micro_batch_size: int, num_ranks: int, row_length: int = 8) -> list[list[Batch]]:
    """Micro-batches of every rank."""
    packing = SplitPacking(corpus, row_length)
    order = RowOrder(packing.num_rows, seed=1)
    batches = []
    for rank in range(num_ranks):
        loader = Loader(corpus, packing, order, row_length, 4, micro_batch_size, rank, num_ranks)
        batches.append(loader.micro_batches(step))
        loader.close()
    return batches


@pytest.mark.parametrize(("micro_batch_size", "num_ranks"), [(4, 1), (2, 1), (1, 1), (2, 2), (1, 2), (1, 4)])
def test_layout_of_ranks_does_not_change_the_step(corpus_of: Any, micro_batch_size: int, num_ranks: int) -> None:
    corpus = corpus_of(LENGTHS, TARGET_STARTS)
    for step in range(5):
        ((reference,),) = read(corpus, step, micro_batch_size=4, num_ranks=1)
        by_rank = read(corpus, step, micro_batch_size, num_ranks)
        in_order = [batch for accumulation in zip(*by_rank, strict=True) for batch in accumulation]
        for field in FIELDS:
            together = torch.cat([getattr(batch, field) for batch in in_order])
            torch.testing.assert_close(together, getattr(reference, field), rtol=0, atol=0)
        for batch in in_order:
            assert batch.step == step
            assert batch.totals.micro_batches == len(in_order)
            assert (batch.totals.rows, batch.totals.tokens) == (
                reference.totals.rows,
                reference.totals.tokens,
            )
            assert batch.totals.target_tokens == reference.totals.target_tokens
            assert batch.totals.documents == reference.totals.documents


@given(st.integers(0, 20), st.integers(1, 30))
def test_batch_agrees_with_the_corpus(corpus_of: Any, step: int, row_length: int) -> None:
    corpus = corpus_of(LENGTHS, TARGET_STARTS)
    packing = SplitPacking(corpus, row_length)
    ((batch,),) = read(corpus, step, micro_batch_size=4, num_ranks=1, row_length=row_length)
    for b, row in enumerate(batch.row_b.tolist()):
        slot = 0
        for index, piece in enumerate(packing.row(row)):
            for position in range(piece.stop - piece.start):
                in_document = piece.start + position
                assert batch.tokens_bl[b, slot] == FIRST_TOKEN + corpus.offsets[piece.document] + in_document
                assert batch.document_bl[b, slot] == index
                assert batch.position_bl[b, slot] == position
                assert batch.target_bl[b, slot] == (in_document >= corpus.target_starts[piece.document])
                slot += 1
        assert torch.all(batch.tokens_bl[b, slot:] == SpecialToken.PAD)
        assert torch.all(batch.document_bl[b, slot:] == -1)
        assert torch.all(batch.position_bl[b, slot:] == 0)
        assert not torch.any(batch.target_bl[b, slot:])


def test_totals_are_sums_over_the_global_batch(corpus_of: Any) -> None:
    for step in range(6):
        batches = [b for rank in read(corpus_of(LENGTHS, TARGET_STARTS), step, 1, num_ranks=2) for b in rank]
        totals = batches[0].totals
        assert totals.rows == sum(len(batch.row_b) for batch in batches)
        assert totals.tokens == sum(int((batch.document_bl >= 0).sum()) for batch in batches)
        assert totals.target_tokens == sum(int(batch.target_bl.sum()) for batch in batches)
        assert totals.documents == sum(batch.num_documents for batch in batches)
        assert totals.micro_batches == len(batches)


def test_whole_documents_keep_source_and_target(corpus_of: Any) -> None:
    corpus = corpus_of(LENGTHS, TARGET_STARTS)
    packing = WholePacking(corpus, row_length=16, max_documents_per_row=3)
    order = RowOrder(packing.num_rows, seed=0, shuffle=False)
    loader = Loader(corpus, packing, order, 16, packing.num_rows, packing.num_rows, rank=0, num_ranks=1)
    (batch,) = loader.micro_batches(0)
    loader.close()
    assert batch.totals.target_tokens == sum(LENGTHS) - sum(TARGET_STARTS)
    assert batch.num_documents == 3


def test_steps_may_be_asked_for_in_any_order(corpus_of: Any) -> None:
    corpus = corpus_of(LENGTHS)
    packing = SplitPacking(corpus, 8)
    loader = Loader(corpus, packing, RowOrder(packing.num_rows, seed=1), 8, 4, 4, rank=0, num_ranks=1)
    for step in (0, 1, 2, 7, 1, 2):
        (batch,) = loader.micro_batches(step)
        assert batch.step == step
        np.testing.assert_array_equal(batch.row_b, loader.order.rows(step, 4))
    loader.close()


def test_to_moves_every_tensor(corpus_of: Any) -> None:
    ((batch,),) = read(corpus_of(LENGTHS), 0, micro_batch_size=4, num_ranks=1)
    moved = batch.to("meta")
    assert all(getattr(moved, field).device.type == "meta" for field in FIELDS)
    assert (moved.step, moved.totals, moved.num_documents) == (batch.step, batch.totals, batch.num_documents)


@given(st.integers(0, 50))
def test_a_clean_prefix_is_counted_out_and_is_the_same_for_every_layout(corpus_of: Any, step: int) -> None:
    corpus = corpus_of([40, 25, 60, 33, 50])
    packing = SplitPacking(corpus, 32)
    batches = {}
    for num_ranks in (1, 2):
        for rank in range(num_ranks):
            loader = Loader(
                corpus, packing, RowOrder(packing.num_rows, seed=1), 32, 4, 4 // num_ranks, rank, num_ranks,
                prefix=CleanPrefix(seed=3, max_share=0.5),
            )  # fmt: skip
            batches[num_ranks, rank] = loader.micro_batches(step)[0]
            loader.close()
    whole, halves = batches[1, 0], [batches[2, 0], batches[2, 1]]
    assert torch.equal(whole.target_bl, torch.cat([half.target_bl for half in halves]))
    assert whole.totals.target_tokens == int(whole.target_bl.sum()) == halves[0].totals.target_tokens


def test_a_clean_prefix_leaves_half_of_the_pieces_alone_and_at_most_max_share_of_the_others() -> None:
    shares = CleanPrefix(seed=0, max_share=0.4).shares(step=1, rows=np.arange(500), num_pieces=4)
    assert 0.45 < (shares == 0).mean() < 0.55
    assert 0.39 < shares.max() <= 0.4

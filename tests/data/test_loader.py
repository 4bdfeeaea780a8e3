"""Batches hold exactly what the plan says, however ranks and micro-batches share the step."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mdseq.data.batch import Batch
from mdseq.data.clean_ends import CleanEnds
from mdseq.data.corpus import Corpus
from mdseq.data.loader import Loader
from mdseq.data.mixture import MixedOrder
from mdseq.data.order import RowOrder
from mdseq.data.packing import JoinedPacking, Packing, Pieces, SplitPacking, WholePacking
from mdseq.data.tokenizer import SpecialToken
from mdseq.errors import UserError
from mdseq.sparse import Documents

LENGTHS = [7, 3, 12, 5, 2, 2, 9, 4, 16, 6, 3, 3]
TARGET_STARTS = [1, 2, 8, 1, 1, 1, 3, 2, 11, 1, 2, 1]
FIELDS = ("tokens_bl", "document_bl", "position_bl", "target_bl", "row_b", "first_document_b")


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
        lengths = [row[row > 0].tolist() for batch in in_order for row in batch.source_length_bm]
        assert lengths == [row[row > 0].tolist() for row in reference.source_length_bm]
        for batch in in_order:
            assert batch.step == step
            assert batch.totals.micro_batches == len(in_order)
            assert (batch.totals.rows, batch.totals.tokens) == (
                reference.totals.rows,
                reference.totals.tokens,
            )
            assert batch.totals.target_tokens == reference.totals.target_tokens
            assert batch.totals.documents == reference.totals.documents


def packings(corpus: Corpus, row_length: int) -> list[Packing]:
    split, whole = SplitPacking(corpus, row_length), WholePacking(corpus, max(16, row_length), 3)
    return [split, whole, JoinedPacking([split, whole])]


@given(st.integers(0, 20), st.integers(1, 30), st.integers(0, 2))
def test_batch_agrees_with_the_corpus(corpus_of: Any, step: int, row_length: int, packing_index: int) -> None:
    """Token by token, and document by document of each row."""
    corpus = corpus_of(LENGTHS, TARGET_STARTS)
    packing = packings(corpus, row_length)[packing_index]
    order = RowOrder(packing.num_rows, seed=1)
    with closing(Loader(corpus, packing, order, max(16, row_length), 4, 4, rank=0, num_ranks=1)) as loader:
        (batch,) = loader.micro_batches(step)
    most, seen = 0, 0
    for b, row in enumerate(batch.row_b.tolist()):
        pieces = packing.pieces(np.array([row]))
        assert batch.first_document_b[b] == seen, "documents of the rows before"
        slot, seen = 0, seen + len(pieces)
        for index in range(len(pieces)):
            document, start = int(pieces.document[index]), int(pieces.start[index])
            for position in range(int(pieces.length[index])):
                in_document = start + position
                assert batch.tokens_bl[b, slot] == corpus.tokens(document)[in_document]
                assert batch.document_bl[b, slot] == index
                assert batch.position_bl[b, slot] == position
                assert batch.target_bl[b, slot] == (in_document >= TARGET_STARTS[document])
                slot += 1
            before = max(TARGET_STARTS[document] - start, 0)
            assert batch.source_length_bm[b, index] == min(before, int(pieces.length[index]))
        most = max(most, len(pieces))
        assert torch.all(batch.tokens_bl[b, slot:] == SpecialToken.PAD)
        assert torch.all(batch.document_bl[b, slot:] == -1)
        assert torch.all(batch.position_bl[b, slot:] == 0)
        assert not torch.any(batch.target_bl[b, slot:])
    assert batch.num_documents == most


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


def test_a_mixture_reads_the_rows_of_its_sources(corpus_of: Any) -> None:
    """Whichever packing a source has: its rows come as often as its share, and their numbers tell them apart."""
    corpus = corpus_of(LENGTHS, TARGET_STARTS, documents_per_source=6)
    parts = [SplitPacking(corpus, 16, corpus.sources["a"]), WholePacking(corpus, 16, 3, corpus.sources["b"])]
    order = MixedOrder([part.num_rows for part in parts], [Fraction(1, 4), Fraction(3, 4)], seed=0)
    with closing(Loader(corpus, JoinedPacking(parts), order, 16, 1024, 512, rank=0, num_ranks=1)) as loader:
        batches = loader.micro_batches(0)
    rows = torch.cat([batch.row_b for batch in batches])
    assert (rows < parts[0].num_rows).sum() == 256
    assert len(rows.unique()) == parts[0].num_rows + parts[1].num_rows
    first_tokens = torch.cat([batch.tokens_bl[:, 0] for batch in batches])
    assert torch.equal(rows < parts[0].num_rows, first_tokens < sum(LENGTHS[:6]))


def test_steps_may_be_asked_for_in_any_order(corpus_of: Any) -> None:
    with closing(small_loader(corpus_of)) as loader:
        for step in (0, 1, 2, 7, 1, 2):
            (batch,) = loader.micro_batches(step)
            assert batch.step == step
            np.testing.assert_array_equal(batch.row_b, loader.order.rows(step, 4))


def small_loader(corpus_of: Any) -> Loader:
    corpus = corpus_of(LENGTHS)
    packing = SplitPacking(corpus, 8)
    return Loader(corpus, packing, RowOrder(packing.num_rows, seed=1), 8, 4, 4, rank=0, num_ranks=1)


class WatchedOrder(RowOrder):
    """Says which steps were asked for, waits for `gate`, and fails at step `broken`."""

    def __init__(self, num_rows: int, broken: int | None = None) -> None:
        super().__init__(num_rows, seed=1)
        self.broken = broken
        self.steps: list[int] = []
        self.gate = threading.Event()
        self.gate.set()

    def rows(self, step: int, batch_size: int) -> np.ndarray:
        self.steps.append(step)
        self.gate.wait()
        if step == self.broken:
            raise UserError("the disk is gone")
        return super().rows(step, batch_size)


@contextmanager
def watched_loader(corpus_of: Any, broken: int | None = None) -> Iterator[tuple[Loader, WatchedOrder]]:
    loader = small_loader(corpus_of)
    loader.order = order = WatchedOrder(loader.packing.num_rows, broken)
    yield loader, order
    order.gate.set()
    loader.close()


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_two_steps_are_read_ahead_and_no_more(corpus_of: Any) -> None:
    with watched_loader(corpus_of) as (loader, order):
        loader.micro_batches(3)
        wait_until(lambda: order.steps == [3, 4, 5])
        loader.micro_batches(4)
        wait_until(lambda: order.steps == [3, 4, 5, 6])
        time.sleep(0.01)
        assert order.steps == [3, 4, 5, 6]


def test_the_next_step_is_read_while_this_one_is_used(corpus_of: Any) -> None:
    """The reader is held up in step 1, and yet step 0 was given out."""
    with watched_loader(corpus_of) as (loader, order):
        loader.micro_batches(0)
        wait_until(lambda: order.steps == [0, 1, 2])
        order.gate.clear()
        assert loader.micro_batches(1)[0].step == 1
        wait_until(lambda: order.steps == [0, 1, 2, 3])


def test_what_fails_in_the_reader_is_raised_at_its_step(corpus_of: Any) -> None:
    with watched_loader(corpus_of, broken=1) as (loader, _):
        loader.micro_batches(0)
        for _ in range(2):  # once more where it is tried again
            with pytest.raises(UserError, match="the disk is gone"):
                loader.micro_batches(1)
        assert loader.micro_batches(2)[0].step == 2


def test_closing_waits_for_one_step_at_most(corpus_of: Any) -> None:
    with watched_loader(corpus_of) as (loader, order):
        loader.micro_batches(0)
        wait_until(lambda: order.steps == [0, 1, 2])
        order.gate.clear()
        loader.micro_batches(1)
        wait_until(lambda: order.steps == [0, 1, 2, 3])
        closing_thread = threading.Thread(target=loader.close)
        closing_thread.start()
        order.gate.set()
        closing_thread.join(timeout=30)
        assert not closing_thread.is_alive()
        loader.close()  # a second time does no harm
        assert order.steps == [0, 1, 2, 3]


def test_to_moves_every_tensor(corpus_of: Any) -> None:
    ((batch,),) = read(corpus_of(LENGTHS), 0, micro_batch_size=4, num_ranks=1)
    moved = batch.to("meta")
    assert all(getattr(moved, field).device.type == "meta" for field in FIELDS)
    assert (moved.step, moved.totals, moved.num_documents) == (batch.step, batch.totals, batch.num_documents)


@given(st.integers(0, 50))
def test_clean_ends_are_counted_out_and_are_the_same_for_every_layout(corpus_of: Any, step: int) -> None:
    corpus = corpus_of([40, 25, 60, 33, 50])
    packing = SplitPacking(corpus, 32)
    batches = {}
    for num_ranks in (1, 2):
        for rank in range(num_ranks):
            loader = Loader(
                corpus, packing, RowOrder(packing.num_rows, seed=1), 32, 4, 4 // num_ranks, rank, num_ranks,
                clean_ends=CleanEnds(seed=3, max_prefix=0.5, max_suffix=0.3),
            )  # fmt: skip
            batches[num_ranks, rank] = loader.micro_batches(step)[0]
            loader.close()
    whole, halves = batches[1, 0], [batches[2, 0], batches[2, 1]]
    assert torch.equal(whole.target_bl, torch.cat([half.target_bl for half in halves]))
    assert whole.totals.target_tokens == int(whole.target_bl.sum()) == halves[0].totals.target_tokens


def test_each_clean_end_leaves_half_of_the_pieces_alone_and_takes_at_most_its_share_of_the_others() -> None:
    row, zeros = np.repeat(np.arange(500), 4), np.zeros(2000, dtype=np.int64)
    pieces = Pieces(row, zeros, zeros, zeros, zeros)
    prefixes, suffixes = CleanEnds(seed=0, max_prefix=0.4, max_suffix=0.2).shares(1, np.arange(500), pieces)
    for shares, most in ((prefixes, 0.4), (suffixes, 0.2)):
        assert 0.45 < (shares == 0).mean() < 0.55
        assert most - 0.01 < shares.max() <= np.float32(most)
        assert len(np.unique(shares)) > 900, "every piece of a row has a share of its own"
    assert 0.2 < ((prefixes > 0) & (suffixes > 0)).mean() < 0.3, "the ends are drawn independently"


def batch_of(corpus: Corpus, packing: Packing, row_length: int, clean_ends: CleanEnds | None = None) -> Batch:
    """The first four rows."""
    order = RowOrder(packing.num_rows, 1)
    with closing(Loader(corpus, packing, order, row_length, 4, 4, 0, 1, clean_ends=clean_ends)) as loader:
        (batch,) = loader.micro_batches(0)
    return batch


def documents_of(batch: Batch) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Each row and each of its documents, with where that lies in the row."""
    for b in range(len(batch.row_b)):
        for document in range(int(batch.document_bl[b].max()) + 1):
            yield b, document, batch.document_bl[b] == document


def test_a_gap_between_clean_ends_is_what_is_denoised(corpus_of: Any) -> None:
    """Before it, as many tokens as the batch says are source; it may end before its document does."""
    corpus = corpus_of([40, 25, 60, 33, 50])
    batch = batch_of(corpus, SplitPacking(corpus, 32), 32, CleanEnds(seed=3, max_prefix=0.4, max_suffix=0.4))
    suffixes = []
    for b, document, here in documents_of(batch):
        target = batch.target_bl[b][here]
        (places,) = torch.nonzero(target, as_tuple=True)
        assert target[places[0] : places[-1] + 1].all(), "one gap"
        assert places[0] == batch.source_length_bm[b, document]
        suffixes.append(len(target) - 1 - int(places[-1]))
        assert batch.position_bl[b][here].tolist() == list(range(len(target))), "texts count through"
    assert min(suffixes) == 0
    assert max(suffixes) > 0


def test_clean_ends_that_meet_leave_no_target_and_the_source_ends_where_the_suffix_starts(corpus_of: Any) -> None:
    corpus = corpus_of([40, 25, 60, 33, 50])

    class AllClean(CleanEnds):
        def shares(self, step: int, rows: np.ndarray, pieces: Pieces) -> tuple[np.ndarray, np.ndarray]:
            return np.full(len(pieces), 1.0, np.float32), np.full(len(pieces), 0.5, np.float32)

    batch = batch_of(corpus, SplitPacking(corpus, 32), 32, AllClean(0, 1.0, 1.0))
    assert batch.totals.target_tokens == 0
    assert not batch.target_bl.any()
    for b, document, here in documents_of(batch):
        length = int(here.sum())
        assert batch.source_length_bm[b, document] == length - length // 2


def test_the_first_token_of_a_text_stays_clean_without_ends_and_with_them(corpus_of: Any) -> None:
    corpus = corpus_of([40, 25, 60, 33, 50])
    for ends in (None, CleanEnds(seed=3, max_prefix=0.0), CleanEnds(seed=3, max_prefix=0.5)):
        batch = batch_of(corpus, WholePacking(corpus, 64, 2), 64, ends)
        first_bl = (batch.position_bl == 0) & (batch.document_bl != -1)
        assert not batch.target_bl[first_bl].any()
    ends = [batch_of(corpus, WholePacking(corpus, 64, 2), 64, it) for it in (None, CleanEnds(3, 0.0, 0.0))]
    assert torch.equal(ends[0].target_bl, ends[1].target_bl), "ends of no share are none"


@pytest.mark.parametrize("row_length", [24, 11])
def test_the_target_of_a_pair_counts_its_positions_anew(corpus_of: Any, row_length: int) -> None:
    """As `Documents.whole` says, which sampling and likelihood lay their rows out with; cut or whole."""
    corpus = corpus_of([12, 9, 20], target_starts=[5, 4, 11], kind="pair")
    packing = WholePacking(corpus, 24, 4) if row_length == 24 else SplitPacking(corpus, row_length)
    batch, cut = batch_of(corpus, packing, row_length), set()
    for b, _, here in documents_of(batch):
        source, target = here & ~batch.target_bl[b], here & batch.target_bl[b]
        if source.any():
            assert batch.position_bl[b][source].tolist() == list(range(int(source.sum())))
            assert batch.position_bl[b][target].tolist() == list(range(1, int(target.sum()) + 1))
        lengths = torch.tensor([int(here.sum())]), torch.tensor([int(source.sum())])
        alone = Documents.whole(lengths[0], int(lengths[0]), lengths[1])
        assert torch.equal(batch.position_bl[b][here], alone.position_bl[0])
        cut.add((bool(source.any()), bool(target.any())))
    assert cut == ({(True, True)} if row_length == 24 else {(True, True), (True, False), (False, True)})


def test_leading_source_of_pairs_is_marked_wherever_positions_restart(corpus_of: Any) -> None:
    corpus = corpus_of([12, 9, 20], target_starts=[5, 4, 11], kind="pair")
    batch = batch_of(corpus, WholePacking(corpus, 24, 4), 24)
    documents = batch.documents(num_source_global=5)
    assert documents.global_bl is not None
    count_b = documents.global_bl.sum(dim=1).tolist()
    assert documents.num_global_tokens == (min(count_b), max(count_b))
    for b, document, here in documents_of(batch):
        marked = documents.global_bl[b][here].nonzero().flatten().tolist()
        assert marked == list(range(min(5, int(batch.source_length_bm[b, document]))))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_for_a_gpu_are_pinned(corpus_of: Any) -> None:
    corpus = corpus_of(LENGTHS)
    packing, device = SplitPacking(corpus, 8), torch.device("cuda", torch.cuda.device_count() - 1)
    order = RowOrder(packing.num_rows, seed=1)
    with closing(Loader(corpus, packing, order, 8, 4, 4, rank=0, num_ranks=1, device=device)) as loader:
        (batch,) = loader.micro_batches(0)
    moved = batch.to(device)
    for field in FIELDS:
        assert getattr(batch, field).is_pinned()
        assert torch.equal(getattr(moved, field).cpu(), getattr(batch, field))

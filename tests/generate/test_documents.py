"""Long texts are written block after block, with a bounded row and noise of their own in each."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mdseq.data.tokenizer import SpecialToken
from mdseq.generate import documents as documents_module
from mdseq.generate.documents import Blocks, Draft, block_seed, until_end, write_blocks
from mdseq.generate.rows import Row, fill
from mdseq.generate.sampler import SamplerOptions
from tests.generate.models import tiny_model

VOCAB, EOS = 30, int(SpecialToken.EOS)
OPTIONS = SamplerOptions(num_calls=2, seed=3)
MODEL = tiny_model(VOCAB)


def draft(num_front: int, length: int, blocks: Blocks, sample_id: int = 0, is_pair: bool = False) -> Draft:
    front_l = np.concatenate([[SpecialToken.BOS], np.arange(num_front - 1) % 20 + 5])
    return Draft(front_l, length, sample_id, is_pair, blocks)


def written(*parts: np.ndarray) -> list[int]:
    return np.concatenate(parts).tolist()


class FakeFill:
    """Writes the numbers 100, 101, ... or what it is told to, and keeps the rows and seeds."""

    def __init__(self, token_of: Callable[[int], int] = lambda number: 100 + number) -> None:
        self.token_of, self.count, self.rows, self.seeds = token_of, 0, [], []

    def __call__(self, model, rows: list[Row], options: SamplerOptions, observe) -> list[np.ndarray]:
        self.seeds.append(options.seed)
        filled = []
        for row in rows:
            self.rows.append(row)
            tokens_l = row.tokens_l.copy()
            for place in row.target_l.nonzero()[0]:
                tokens_l[place] = self.token_of(self.count)
                self.count += 1
            filled.append(tokens_l)
        return filled


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeFill]:
    def make(*arguments) -> FakeFill:
        fake = FakeFill(*arguments)
        monkeypatch.setattr(documents_module, "fill", fake)
        return fake

    return make


def test_defaults_are_half_a_training_row_each() -> None:
    blocks = Blocks.of(4096)
    assert (blocks.block, blocks.context) == (2048, 2048)
    assert blocks.cut(num_front=1, length=32_768)
    assert not blocks.cut(num_front=1, length=4095)  # fits into a row
    assert blocks.cut(num_front=1, length=4096)
    assert not blocks.cut(num_front=4096, length=2048)  # a single block in any case
    own = Blocks.of(4096, block=100)
    assert (own.block, own.context) == (100, 2048)
    assert own.cut(1, 101)
    assert not own.cut(1, 100)


def test_rows_hold_what_came_before_and_never_more_than_context_and_block(faked) -> None:
    fake = faked()
    text = draft(3, 50, Blocks(block=8, context=12, whole=0))
    blocks = [new_l for (new_l,) in write_blocks(MODEL, [text], OPTIONS)]
    assert [len(new_l) for new_l in blocks] == [8] * 6 + [2]
    assert written(*blocks) == list(range(100, 150))
    so_far: list[int] = []
    for row, new_l in zip(fake.rows, blocks, strict=True):
        given = row.tokens_l[~row.target_l].tolist()
        assert given == [*text.front_l.tolist(), *so_far[-9:]]  # the front stays: 3 of 12 tokens
        assert row.source_length == 0  # of a text, nothing is beside it
        assert len(row) <= 20
        assert row.target_l[len(given) :].all()
        so_far += new_l.tolist()


def test_a_front_of_more_than_half_the_context_slides_out_of_sight(faked) -> None:
    fake = faked()
    text = draft(7, 20, Blocks(block=8, context=12, whole=0))
    list(write_blocks(MODEL, [text], OPTIONS))
    first, second, third = (row.tokens_l[~row.target_l].tolist() for row in fake.rows)
    assert first == text.front_l.tolist()
    assert second == [*text.front_l.tolist()[-4:], *range(100, 108)]
    assert third == list(range(104, 116))


def test_the_source_of_a_pair_stays_whole(faked) -> None:
    fake = faked()
    text = draft(40, 20, Blocks(block=8, context=12, whole=0), is_pair=True)
    list(write_blocks(MODEL, [text], OPTIONS))
    for row, so_far in zip(fake.rows, (0, 8, 16), strict=True):
        given = row.tokens_l[~row.target_l].tolist()
        assert given == [*text.front_l.tolist(), *range(100 + max(0, so_far - 6), 100 + so_far)]
        assert row.source_length == 40


def test_the_end_of_the_text_ends_it(faked) -> None:
    faked(lambda number: EOS if number in (11, 13) else 100 + number)
    (first,), (second,) = write_blocks(MODEL, [draft(1, 80, Blocks(8, 12, 0))], OPTIONS)
    assert written(first, second) == list(range(100, 111))


def test_ends_before_the_least_length_are_passed_over_and_not_shown_to_the_next_block(faked) -> None:
    fake = faked(lambda number: EOS if number in (3, 9, 14, 20) else 100 + number)
    blocks = list(write_blocks(MODEL, [draft(1, 80, Blocks(8, 12, 0))], OPTIONS, min_length=14))
    assert written(*(new_l for (new_l,) in blocks)) == [100 + n for n in range(14) if n not in (3, 9)]
    assert all(EOS not in row.tokens_l for row in fake.rows)


def test_a_text_that_never_ends_has_as_many_tokens_as_asked_for(faked) -> None:
    faked(lambda number: EOS if number % 2 else 100)
    blocks = list(write_blocks(MODEL, [draft(1, 30, Blocks(8, 12, 0))], OPTIONS, min_length=30))
    assert [len(new_l) for (new_l,) in blocks] == [4, 4, 4, 3]


def test_texts_side_by_side_are_those_of_one_at_a_time() -> None:
    blocks = Blocks(block=6, context=10, whole=0)
    drafts = [draft(3, 20, blocks, 0), draft(1, 7, blocks, 1), draft(8, 33, blocks, 2), draft(1, 7, blocks, 3)]
    together = [written(*of_text) for of_text in zip(*write_blocks(MODEL, drafts, OPTIONS), strict=True)]
    alone = [written(*(new_l for (new_l,) in write_blocks(MODEL, [text], OPTIONS))) for text in drafts]
    assert together == alone
    assert together[1] != together[3]  # by their sample ids


def test_a_single_block_is_the_row_in_one_piece() -> None:
    text = draft(3, 20, Blocks(block=20, context=10, whole=0))
    ((new_l,),) = write_blocks(MODEL, [text], OPTIONS)
    (whole_l,) = fill(MODEL, [Row.of([text.front_l, 20], 0, 0)], OPTIONS)
    assert until_end(whole_l[3:])[0].tolist() == new_l.tolist()


def test_only_the_first_block_is_observed() -> None:
    estimates = []
    text = draft(2, 18, Blocks(block=6, context=10, whole=0))
    list(write_blocks(MODEL, [text], OPTIONS, observe=estimates.append))
    assert [estimate.tokens_bl.shape for estimate in estimates] == [(1, 8)] * 2


def test_every_block_has_a_seed_of_its_own(faked) -> None:
    fake = faked()
    list(write_blocks(MODEL, [draft(1, 40, Blocks(8, 12, 0))], OPTIONS))
    assert fake.seeds == [block_seed(3, number) for number in range(5)]
    assert fake.seeds[0] == 3
    seeds = {block_seed(seed, number) for seed in range(50) for number in range(2000)}
    assert len(seeds) == 50 * 2000
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_until_end() -> None:
    tokens_l = np.array([7, EOS, 8, EOS, 9])
    for min_length, expected, ended in ((0, [7], True), (1, [7], True), (2, [7, 8], True), (4, [7, 8, 9], False)):
        kept_l, found = until_end(tokens_l, min_length)
        assert (kept_l.tolist(), found) == (expected, ended)
    assert until_end(tokens_l, -5)[0].tolist() == [7]
    assert until_end(tokens_l[:0]) == (pytest.approx([]), False)

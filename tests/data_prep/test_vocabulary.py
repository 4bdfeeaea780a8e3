"""The vocabulary is trained on a bounded sample of everything, and is the same whoever gathered it in what order."""

import hashlib
import random
from collections.abc import Iterable
from itertools import accumulate, chain

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from data_prep import vocabulary as vocabulary_module
from data_prep.vocabulary import (
    SAMPLE_CHARACTERS_PER_TOKEN,
    SAMPLED_SHARDS,
    WINDOW_CHARACTERS,
    WindowSample,
    allot,
    train_vocabulary,
)
from mdseq.data.tokenizer import SPACE_MARK, SpecialToken, Tokenizer
from mdseq.errors import UserError

LINES = [f"The river number {number} runs past the old mill, and the miller's wife sings.\n" for number in range(80)]
VOCAB = 600
# Words enough for the order of adding up to show in the result.
RANDOM = random.Random(0)
WORDS = ["".join(RANDOM.choices("etaoinsr", k=RANDOM.randint(1, 9))) for _ in range(400)]
VARIED = [" ".join(RANDOM.choices(WORDS, k=30)) + "\n" for _ in range(200)]


def sample_of(texts: Iterable[str], num_characters: int) -> list[str]:
    sample = WindowSample(num_characters)
    for text in texts:
        sample.add(text)
    return sample.windows()


def pieces(model: bytes) -> list[str]:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    return [processor.IdToPiece(index) for index in range(processor.vocab_size())]


@given(st.lists(st.text("ab", min_size=1, max_size=5)), st.integers(1, 40), st.randoms())
def test_sample_is_the_smallest_hashes(texts: list[str], num_characters: int, shuffler: random.Random) -> None:
    smallest_first = sorted(texts, key=lambda text: hashlib.blake2b(text.encode(), digest_size=8).digest())
    totals = accumulate(map(len, smallest_first), initial=0)
    expected = [text for text, before in zip(smallest_first, totals, strict=False) if before < num_characters]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary_module, "READ_FACTOR", 1000)
        assert sample_of(texts, num_characters) == expected
        shuffler.shuffle(texts)
        assert sample_of(texts, num_characters) == expected


def test_sample_is_spread_over_the_text() -> None:
    numbers = [f"{number:05d}" for number in range(8000)]
    kept = sorted(int(text) for text in sample_of(numbers, 5000))
    assert len(kept) == 1000
    assert abs(sum(kept) / len(kept) - 4000) < 300


def test_sample_holds_and_reads_no_more_than_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary_module, "WINDOW_CHARACTERS", 10)
    sample = WindowSample(100)
    sample.add("first ten " * 79)
    assert not sample.seen_enough
    sample.add("x" * 10 + "never seen" * 1000)
    assert sample.seen_enough
    assert 100 <= len("".join(sample.windows())) < 110
    assert "never seen" not in "".join(sample.windows())


def sizes_of_shards() -> st.SearchStrategy[dict[str, list[int]]]:
    size = st.one_of(st.just(0), st.integers(1, 10**9))
    return st.dictionaries(st.text("abc", max_size=3), st.lists(size, max_size=400), max_size=4)


@given(sizes_of_shards(), st.integers(512, 65_536))
def test_every_source_is_sampled_in_proportion(shard_bytes: dict[str, list[int]], vocab_size: int) -> None:
    allotted = allot(shard_bytes, vocab_size)
    wanted = vocab_size * SAMPLE_CHARACTERS_PER_TOKEN
    total = sum(map(sum, shard_bytes.values()))
    assert {name: len(shards) for name, shards in allotted.items()} == {name: len(s) for name, s in shard_bytes.items()}
    for name, shards in shard_bytes.items():
        assert all(size > 0 for size, characters in zip(shards, allotted[name], strict=True) if characters)
        if any(shards):
            share = wanted * sum(shards) / total
            rounding = 1 + sum(map(bool, allotted[name]))
            assert max(share, WINDOW_CHARACTERS) - 1 <= sum(allotted[name])
            assert sum(allotted[name]) <= max(share, WINDOW_CHARACTERS) + rounding
    assert sum(characters > 0 for shards in allotted.values() for characters in shards) <= SAMPLED_SHARDS


def test_chosen_shards_are_evenly_spaced() -> None:
    chosen = [index for index, characters in enumerate(allot({"a": [10**9] * 1024}, 512)["a"]) if characters]
    assert chosen == list(range(2, 1024, 4))


@pytest.mark.parametrize("model", ["unigram", "bpe"])
def test_model_depends_on_the_text_alone(model: str) -> None:
    whole = train_vocabulary(sample_of(VARIED, 10**6), VOCAB, model)
    parts = [sample_of(VARIED[start::3], 10**6) for start in range(3)]
    assert train_vocabulary(chain(*reversed(parts)), VOCAB, model) == whole
    assert train_vocabulary(reversed(VARIED), VOCAB, model) == whole
    assert train_vocabulary(VARIED[:100], VOCAB, model) != whole


def test_kinds_of_model_differ() -> None:
    assert pieces(train_vocabulary(LINES, VOCAB, "unigram")) != pieces(train_vocabulary(LINES, VOCAB, "bpe"))


@pytest.mark.parametrize("model", ["unigram", "bpe"])
def test_odd_characters_do_not_disturb_the_training(model: str) -> None:
    odd = [f"{line}\0ri{SPACE_MARK}ver\u2585\u2047 \ud800 <sep> \uffff\r\n" for line in LINES]
    trained = train_vocabulary(sample_of([*LINES, *odd, "\0", SPACE_MARK * 5000, ""], 10**6), VOCAB, model)
    tokenizer = Tokenizer(trained)
    text = "\0" + odd[0].replace("\ud800", "")
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert not any(mark in piece for piece in pieces(trained) for mark in ("\0", "i\u2581", "\u2585"))


def test_vocabulary_is_as_large_as_the_text_supports() -> None:
    tokenizer = Tokenizer(train_vocabulary(LINES, 30_000))
    assert 256 + len(SpecialToken) < tokenizer.vocab_size < 1000


@pytest.mark.parametrize("model", ["unigram", "bpe"])
def test_alphabet_must_fit(model: str) -> None:
    alphabet = [" ".join(map(chr, range(first, first + 100))) for first in range(0x4E00, 0x4E00 + 1000, 100)] * 3
    with pytest.raises(UserError, match=r"VOCAB=512 .* which are 1,\d\d\d; give"):
        train_vocabulary(alphabet, 512, model)


@pytest.mark.parametrize("text", ["", "\n\n", "\0"])
def test_text_is_needed(text: str) -> None:
    with pytest.raises(UserError, match="no text to train"):
        train_vocabulary([text], VOCAB)

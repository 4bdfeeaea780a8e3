"""The tokenizer gives back every text, whatever the pieces it came in, and keeps the special ids to itself."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st

from data_prep.vocabulary import train_vocabulary
from mdseq.data import tokenizer as tokenizer_module
from mdseq.data.tokenizer import SPACE_MARK, SpecialToken, Tokenizer
from mdseq.errors import UserError
from tests.data.conftest import TEXTS

any_text = st.text(st.characters(exclude_categories=["Cs"]))
# Words of the vocabulary, often with nothing between them, so that seams are not everywhere. No two spaces
# in a row, for a unigram model may find two ways of cutting them equally likely.
WORDS = ("river", "mill", "wife", "return", "the", "sin", "7", "\u00e9", "(", "_", ":")
word_then_gap = st.tuples(st.sampled_from(WORDS), st.sampled_from(("", "", " ", "\n", SPACE_MARK))).map("".join)
words = st.lists(word_then_gap, max_size=60).map("".join)


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def model(request: pytest.FixtureRequest, tokenizer_model: bytes) -> bytes:
    """A vocabulary of either kind."""
    if request.param == "unigram":
        return tokenizer_model
    return train_vocabulary(TEXTS, 1000, "bpe")


@pytest.fixture(scope="module")
def either(model: bytes) -> Tokenizer:
    return Tokenizer(model)


@pytest.fixture(scope="module")
def plain(model: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


@contextmanager
def blocks_of(least: int, most: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "BLOCK_CHARACTERS", least)
        patch.setattr(tokenizer_module, "MAX_BLOCK_CHARACTERS", most)
        yield


def plain_encode(plain: sentencepiece.SentencePieceProcessor, text: str) -> list[int]:
    """Tokens of the whole text at once, but for U+2581."""
    ids: list[int] = []
    for position, stretch in enumerate(text.split(SPACE_MARK)):
        ids += [plain.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()] if position else []
        ids += plain.encode(stretch)
    return ids


def cut(text: str, lengths: list[int]) -> list[str]:
    """`text` in pieces of these lengths, then the rest."""
    ends = [0, *accumulate(lengths), max(len(text), sum(lengths))]
    return [text[start:stop] for start, stop in pairwise(ends)]


def joined(arrays: Iterator[np.ndarray]) -> list[int]:
    return [index for array in arrays for index in array.tolist()]


@given(any_text)
@example("")
@example("  two  spaces   and\n\n\n\tlines\r\n ")
@example("\0 \u2581 \u2047 \u2585 \ufeff \ufffd \U0010ffff")
@example("\u2581\u2581a\u2581")
@example("<pad><unk><s></s><sep><0x41>")
def test_decoding_gives_back_the_text(either: Tokenizer, text: str) -> None:
    ids = either.encode(text)
    assert either.decode(ids) == text
    assert ids.dtype == np.int32
    assert np.all(ids > max(SpecialToken))


@given(st.lists(st.integers(0, 2**16)), st.integers(0, 50))
def test_any_ids_decode(tokenizer: Tokenizer, numbers: list[int], middle: int) -> None:
    ids = [number % tokenizer.vocab_size for number in numbers]
    spelled = tokenizer.decode_bytes(ids)
    assert tokenizer.decode_bytes(ids[:middle]) + tokenizer.decode_bytes(ids[middle:]) == spelled
    assert tokenizer.decode(ids) == spelled.decode(errors="replace")
    assert tokenizer.text_bytes[ids].sum() == len(spelled)


@given(text=any_text | words)
def test_sentencepiece_decodes_the_same(
    either: Tokenizer, plain: sentencepiece.SentencePieceProcessor, text: str
) -> None:
    assert plain.decode(either.encode(text).tolist()) == text


def test_rare_characters_are_spelled_in_bytes(tokenizer: Tokenizer) -> None:
    assert tokenizer.is_byte[tokenizer.encode("\U0001f600")].tolist() == [True] * 4
    assert not tokenizer.is_byte[tokenizer.encode("the mill\n")].any()


@given(text=words)
def test_blocks_do_not_change_the_tokens(
    either: Tokenizer, plain: sentencepiece.SentencePieceProcessor, text: str
) -> None:
    with blocks_of(4, 1000):
        assert "".join(either.blocks([text])) == text
        assert either.encode(text).tolist() == plain_encode(plain, text)


def test_blocks_end_as_soon_as_they_may(either: Tokenizer) -> None:
    with blocks_of(4, 1000):
        assert list(either.blocks(["mill\nmill mill\n\n\n"])) == ["mill", "\nmill", " mill", "\n\n\n"]


@given(text=any_text | words, lengths=st.lists(st.integers(0, 20)))
def test_tokens_do_not_depend_on_the_pieces(either: Tokenizer, text: str, lengths: list[int]) -> None:
    with blocks_of(3, 8):  # so short that words are cut as well
        assert joined(either.encode_pieces(cut(text, lengths))) == either.encode(text).tolist()
        assert either.decode(either.encode(text)) == text


@pytest.mark.parametrize("unit", ["river", " ", SPACE_MARK])
def test_text_without_a_break_is_cut(either: Tokenizer, unit: str) -> None:
    text = unit * 100_000
    assert max(map(len, either.blocks([text]))) <= tokenizer_module.MAX_BLOCK_CHARACTERS
    assert either.decode(either.encode(text)) == text


def test_text_is_read_only_as_far_as_needed(tokenizer: Tokenizer) -> None:
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield "the mill\n" * 1000

    ids = tokenizer.encode_pieces(endless())
    next(ids)
    assert taken < 40


def test_special_tokens_are_dropped_and_end_nothing(tokenizer: Tokenizer) -> None:
    a, b = tokenizer.encode("the mill"), tokenizer.encode(" sings")
    ids = [SpecialToken.BOS, *a, SpecialToken.EOS, *b, SpecialToken.SEP, SpecialToken.PAD, SpecialToken.UNK]
    assert tokenizer.decode(ids) == "the mill sings"


def test_line_break_is_one_token(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("\n\n")) == 2


def test_frequent_words_are_tokens(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode(" mill")) == len(tokenizer.encode(" river")) == 1


def test_load(tokenizer: Tokenizer, tokenizer_path: Path, tmp_path: Path) -> None:
    assert Tokenizer.load(tokenizer_path).fingerprint == tokenizer.fingerprint
    with pytest.raises(UserError, match="cannot read"):
        Tokenizer.load(tmp_path / "absent.model")
    (tmp_path / "broken.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        Tokenizer.load(tmp_path / "broken.model")


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({}, "pad, unk, bos, eos"),
        (
            {"pad_id": 0, "unk_id": 1, "bos_id": 2, "eos_id": 3, "control_symbols": ["<sep>"]},
            "does not give back",
        ),
    ],
)
def test_foreign_models_that_lose_text_are_refused(settings: dict[str, object], complaint: str) -> None:
    model = io.BytesIO()
    lines = [f"word{number} and some other words" for number in range(100)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=60, hard_vocab_limit=False, **settings
    )
    with pytest.raises(UserError, match=complaint):
        Tokenizer(model.getvalue())


def test_pieces_show_every_token_by_itself(tokenizer: Tokenizer) -> None:
    text = "The river  runs\n\tand \u00e9\U0001f600"
    ids = [SpecialToken.BOS, *tokenizer.encode(text).tolist(), SpecialToken.SEP, SpecialToken.EOS, SpecialToken.PAD]
    pieces = tokenizer.pieces(ids)
    assert len(pieces) == len(ids)
    assert (pieces[0], pieces[-3:]) == ("<bos>", ["<sep>", "<eos>", "<pad>"])
    shown = "".join(pieces[1:-3])
    assert shown.startswith("The river  runs\n\tand ")
    assert shown.endswith("<0xF0><0x9F><0x98><0x80>")


def test_only_a_unigram_model_has_segmentations(tokenizer: Tokenizer) -> None:
    assert tokenizer.is_unigram
    assert not Tokenizer(train_vocabulary(TEXTS, 1000, "bpe")).is_unigram


@pytest.mark.parametrize("text", ["river", " returns", "7,", "\u00e9te\u0301", SPACE_MARK * 2, "\n"])
def test_segmentations_are_different_spellings_the_likeliest_first(tokenizer: Tokenizer, text: str) -> None:
    ways = tokenizer.segmentations(text, 16)
    assert ways[0].tolist() == tokenizer.encode(text).tolist()
    assert len({tuple(way.tolist()) for way in ways}) == len(ways) <= 16
    assert {tokenizer.decode(way) for way in ways} == {text}
    scores = [tokenizer.scores[way].sum() for way in ways]
    assert scores == pytest.approx(sorted(scores, reverse=True), rel=1e-5)


def test_bytes_are_less_likely_than_all_pieces(tokenizer: Tokenizer) -> None:
    assert tokenizer.scores[tokenizer.is_byte].max() < tokenizer.scores[~tokenizer.is_byte].min()

"""The tokenizer gives back every text and keeps the special ids to itself."""

import io
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st

from mdseq.data import tokenizer as tokenizer_module
from mdseq.data.tokenizer import SpecialToken, Tokenizer, line_blocks
from mdseq.errors import UserError

any_text = st.text(st.characters(exclude_categories=["Cs"]))


@given(any_text)
@example("")
@example("  two  spaces   and\n\n\n\tlines\r\n ")
@example("\0 \u2581 \u2047 \u2585 \ufeff \ufffd \U0010ffff")
@example("<pad><unk><s></s><sep><0x41>")
def test_decoding_gives_back_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids.dtype == np.int32
    assert np.all(ids > max(SpecialToken))


@given(st.lists(st.integers(0, 2**16)))
def test_any_ids_decode(tokenizer: Tokenizer, ids: list[int]) -> None:
    assert isinstance(tokenizer.decode([index % tokenizer.vocab_size for index in ids]), str)


@given(text=st.text("ab \n", max_size=400))
def test_blocks_do_not_change_the_tokens(tokenizer: Tokenizer, text: str) -> None:
    whole = tokenizer.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "BLOCK_CHARACTERS", 16)
        assert "".join(line_blocks(text)) == text
        np.testing.assert_array_equal(tokenizer.encode(text), whole)


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

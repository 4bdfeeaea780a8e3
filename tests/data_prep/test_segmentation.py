"""Random segmentations spell the text, have the probabilities that are asked for, and follow from id and copy."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st

from data_prep import audit, segmentation
from data_prep.segmentation import SegmentationSampler
from data_prep.vocabulary import train_vocabulary
from mdseq.data.corpus import Corpus
from mdseq.data.tokenizer import SPACE_MARK, SpecialToken, Tokenizer
from mdseq.errors import UserError
from tests.data_prep.conftest import Build, contents, decoded, write_files, write_jsonl

ID = bytes(range(16))
SYLLABLES = ("ri", "ver", "mi", "ll", "si", "ng", "er", "ing", "s", "mill", "sing", "river")
WORDS = ["".join(parts) for parts in product(SYLLABLES, repeat=2)]
SENTENCES = [
    f"The {WORDS[number * 7 % len(WORDS)]} {WORDS[number * 11 % len(WORDS)]} runs past old mill {number}, and sings."
    for number in range(60)
]
PAIRS = [{"src": text, "trg": text[::-1]} for text in SENTENCES]
any_text = st.text(st.characters(exclude_categories=["Cs"]))
odd_text = st.lists(
    st.sampled_from(["river", " mill", "  ", " ", "\t", "\n", "\r\n", SPACE_MARK, "\u3000", "\0", "\u00e9", "7", "<s>"])
).map("".join)


@pytest.fixture(scope="module")
def model() -> bytes:
    return train_vocabulary(SENTENCES, 600)


@pytest.fixture(scope="module")
def tokenizer(model: bytes) -> Tokenizer:
    return Tokenizer(model)


@pytest.fixture(scope="module")
def straddling() -> Tokenizer:
    """Of another's training, whose pieces may hold several words."""
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=trained, vocab_size=1000, byte_fallback=True,
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
        split_by_whitespace=False, control_symbols=["<sep>"], user_defined_symbols=["\n"], hard_vocab_limit=False,
        pad_id=0, unk_id=1, bos_id=2, eos_id=3, minloglevel=2,
    )  # fmt: skip
    return Tokenizer(trained.getvalue())


def drawn(sampler: SegmentationSampler, text: str | Iterable[str], copy: int = 0, identity: bytes = ID) -> list[int]:
    pieces = (text,) if isinstance(text, str) else text
    return [token for ids in sampler.encode_pieces(pieces, identity, copy) for token in ids.tolist()]


@given(text=any_text | odd_text, alpha=st.sampled_from([0.01, 0.3, 3.0]), copy=st.integers(0, 5))
@example(text="", alpha=0.3, copy=0)
@example(text=" " * 100 + "mill" + " " * 40 + "\n" + "mill" * 100, alpha=0.3, copy=1)
@example(text="the mill" + SPACE_MARK * 3 + " sings", alpha=0.3, copy=1)
def test_the_tokens_spell_the_text(tokenizer: Tokenizer, text: str, alpha: float, copy: int) -> None:
    ids = drawn(SegmentationSampler(tokenizer, alpha), text, copy)
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert not {SpecialToken.UNK, SpecialToken.SEP, SpecialToken.BOS} & set(ids)


@given(text=st.lists(st.sampled_from(["the", "old", "mill", " ", " ", "\n"])).map("".join))
@example(text="the old mill, and the river")
def test_pieces_that_straddle_words_are_not_needed(straddling: Tokenizer, text: str) -> None:
    pieces = straddling.pieces(range(straddling.vocab_size))
    assert any(" " in piece.strip() for piece in pieces), "the vocabulary is one of whole words"
    assert straddling.decode(drawn(SegmentationSampler(straddling, 0.3), text)) == text


@pytest.mark.parametrize("text", [*SENTENCES[:5], "past\tthe mill\n\nThe  river\r\n 77"])
def test_a_high_power_leaves_the_likeliest_way(tokenizer: Tokenizer, text: str) -> None:
    assert drawn(SegmentationSampler(tokenizer, 1e6), text) == tokenizer.encode(text).tolist()


def test_ways_have_their_probability_to_the_power(tokenizer: Tokenizer) -> None:
    """Against all ways of cutting a word, counted out."""
    word, alpha, count = " rivering", 0.3, 20_000
    pieces = {piece: index for index, piece in enumerate(tokenizer.pieces(range(tokenizer.vocab_size)))}
    expected: dict[tuple[int, ...], float] = {}
    for cuts in product([False, True], repeat=len(word) - 1):
        parts = [""]
        for character, is_cut in zip(word, (False, *cuts), strict=True):
            parts += [""] * is_cut
            parts[-1] += character
        if all(part in pieces for part in parts):
            way = tuple(pieces[part] for part in parts)
            expected[way] = float(np.exp(alpha * sum(tokenizer.scores[token] for token in way)))
    assert len(expected) > 3
    sampler = SegmentationSampler(tokenizer, alpha)
    found = Counter(tuple(drawn(sampler, word, copy)) for copy in range(count))
    assert found.keys() <= expected.keys()
    total = sum(expected.values())
    for way, weight in expected.items():
        probability = weight / total
        spread = (probability * (1 - probability) / count) ** 0.5
        assert found[way] / count == pytest.approx(probability, abs=5 * spread)


def test_what_is_drawn_follows_from_id_and_copy_alone(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(SENTENCES)
    sampler = SegmentationSampler(tokenizer, 0.3)
    first = drawn(sampler, text)
    drawn(sampler, "something else")
    assert drawn(sampler, text) == first
    monkeypatch.setattr(segmentation, "CACHED_WORDS", 3)
    assert drawn(SegmentationSampler(tokenizer, 0.3), list(text)) == first, (
        "neither from the cache, nor from the pieces"
    )
    assert drawn(sampler, text, copy=1) != first
    assert drawn(sampler, text, identity=bytes(16)) != first


class TestBuild:
    def test_copies_of_training_pairs_are_cut_differently(
        self, build_dataset: Build, model: bytes, tmp_path: Path
    ) -> None:
        (tmp_path / "model").write_bytes(model)
        records = [*PAIRS, {"src": "no target"}]
        overrides = (f"vocabulary.tokenizer={tmp_path / 'model'}", "splits.valid_fraction=0.3")
        data = write_jsonl(tmp_path / "pairs.jsonl", records)
        plain = build_dataset(data, tmp_path / "plain", *overrides)
        sampling = ("sources.0.copies=3", "sources.0.sampling=0.3", *overrides)
        manifest = build_dataset(data, tmp_path / "out", *sampling)
        source, held_out = manifest.sources["pairs"], manifest.splits["valid"].documents
        assert (source.read, source.copies, source.rejected) == (61, 3, {"missing_field": 1})
        assert manifest.splits["train"].documents == 3 * (60 - held_out) == 3 * plain.splits["train"].documents
        assert manifest.splits["train"].text_bytes == 3 * plain.splits["train"].text_bytes
        assert held_out == plain.splits["valid"].documents > 0
        assert audit.verify(tmp_path / "out") == 3 * (60 - held_out) + held_out
        assert decoded(tmp_path / "out", "train") == 3 * decoded(tmp_path / "plain", "train")
        valid, plain_valid = (Corpus.open(tmp_path / name, "valid") for name in ("out", "plain"))
        assert [valid.tokens(d).tolist() for d in range(held_out)] == [
            plain_valid.tokens(d).tolist() for d in range(held_out)
        ], "what is held out is as it was"

        corpus, once = Corpus.open(tmp_path / "out", "train"), Corpus.open(tmp_path / "plain", "train")
        sources: Counter[tuple[int, ...]] = Counter()
        for document in range(corpus.num_documents):
            original = document % once.num_documents
            assert corpus.document_id(document) == once.document_id(original)
            given, start = once.target_start(original), corpus.target_start(document)
            assert corpus.tokens(document, start).tolist() == once.tokens(original, given).tolist(), "target as it was"
            sources[tuple(corpus.tokens(document, 0, start).tolist())] += 1
        assert len(sources) > 0.95 * corpus.num_documents

    def test_same_bytes_from_any_number_of_workers(self, build_dataset: Build, tmp_path: Path) -> None:
        data = write_files(tmp_path / "pairs", PAIRS * 40)
        options = ("shards.text_mb=0.001", "sources.0.copies=2", "sources.0.sampling=0.2")
        for count in (1, 3):
            manifest = build_dataset(data, tmp_path / f"out{count}", *options, workers=count)
            assert len(manifest.splits["train"].sources["pairs"].shards) == 8
        assert contents(tmp_path / "out1") == contents(tmp_path / "out3")

    def test_copies_of_texts_are_equal(self, build_dataset: Build, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("past the mill\n")
        manifest = build_dataset(tmp_path / "a.txt", tmp_path / "out", "splits.valid_fraction=0", "sources.0.copies=3")
        assert decoded(tmp_path / "out") == [("past the mill\n",)] * 3
        assert manifest.sources["a"].read == 1
        assert audit.verify(tmp_path / "out") == 3

    def test_duplicates_are_looked_for_among_documents_not_copies(self, build_dataset: Build, tmp_path: Path) -> None:
        data = write_jsonl(tmp_path / "pairs.jsonl", [*PAIRS[:9], *PAIRS[:4]])
        overrides = ("cleaning.exact_duplicates=drop", "splits.valid_fraction=0", "sources.0.copies=2")
        manifest = build_dataset(data, tmp_path / "out", *overrides)
        assert manifest.sources["pairs"].rejected == {"exact_duplicate": 4}
        assert manifest.splits["train"].documents == 18
        assert len((tmp_path / "out" / "rejected.jsonl").read_text().splitlines()) == 4

    def test_texts_have_nothing_to_sample(self, build_dataset: Build, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("past the mill\n")
        with pytest.raises(UserError, match=r"sources\.a\.sampling = 0\.3: only the sources of pairs"):
            build_dataset(tmp_path / "a.txt", tmp_path / "out", "sources.0.sampling=0.3")

    def test_bpe_has_no_probabilities(self, build_dataset: Build, tmp_path: Path) -> None:
        data = write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
        with pytest.raises(UserError, match=r"sources\.pairs\.sampling = 0\.3 needs .* set model = unigram"):
            build_dataset(data, tmp_path / "out", "vocabulary.model=bpe", "sources.0.sampling=0.3")
        (tmp_path / "bpe").write_bytes(train_vocabulary(SENTENCES, 600, "bpe"))
        with pytest.raises(UserError, match=r"sources\.pairs\.sampling = 0\.3 needs .*bpe has none"):
            build_dataset(data, tmp_path / "out", f"vocabulary.tokenizer={tmp_path / 'bpe'}", "sources.0.sampling=0.3")

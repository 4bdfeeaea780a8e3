"""The SentencePiece vocabulary: a bounded sample of the text, and a deterministic training on it."""

from __future__ import annotations

import hashlib
import heapq
import io
from collections.abc import Iterator

import sentencepiece

from mdseq.data.tokenizer import SpecialToken
from mdseq.errors import UserError

WINDOW_CHARACTERS = 2000
SAMPLE_CHARACTERS_PER_TOKEN = 512


class WindowSample:
    """`num_characters` of text (a window more or less): the windows with the smallest content hashes.

    A uniform sample in bounded memory, which does not depend on the order in which texts are added.
    """

    def __init__(self, num_characters: int) -> None:
        self._wanted = num_characters
        self._held = 0
        self._heap: list[tuple[int, str]] = []  # negated hashes: the largest hash on top

    @classmethod
    def for_vocabulary(cls, vocab_size: int) -> WindowSample:
        return cls(vocab_size * SAMPLE_CHARACTERS_PER_TOKEN)

    def add(self, text: str) -> None:
        for start in range(0, len(text), WINDOW_CHARACTERS):
            window = text[start : start + WINDOW_CHARACTERS]
            rank = -int.from_bytes(hashlib.blake2b(window.encode(), digest_size=8).digest())
            heapq.heappush(self._heap, (rank, window))
            self._held += len(window)
            while self._held - len(self._heap[0][1]) >= self._wanted:
                self._held -= len(heapq.heappop(self._heap)[1])

    def lines(self) -> Iterator[str]:
        """The lines of the sampled windows, smallest hash first."""
        for _, window in sorted(self._heap, reverse=True):
            yield from window.split("\n")


def train_vocabulary(sample: WindowSample, vocab_size: int) -> bytes:
    """A unigram model of at most `vocab_size` tokens (fewer when the sample supports no more).

    Every setting below that differs from SentencePiece's default is there so that decoding gives back the
    text: no normalisation, spaces kept as they are, unknown characters spelled in bytes, "\\n" a token of its
    own.

    Raises UserError when `vocab_size` does not hold the characters of the text.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sample.lines(),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            user_defined_symbols=["\n"],
            control_symbols=["<sep>"],
            pad_id=SpecialToken.PAD,
            unk_id=SpecialToken.UNK,
            bos_id=SpecialToken.BOS,
            eos_id=SpecialToken.EOS,
            max_sentence_length=4 * WINDOW_CHARACTERS,
            num_threads=1,  # the sums of expectation-maximisation depend on how many threads share them
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"cannot train a vocabulary of VOCAB={vocab_size:,} tokens: {error}; "
            "the alphabet of the text and 256 bytes must fit in it: give a larger VOCAB, or more text"
        ) from None
    return model.getvalue()

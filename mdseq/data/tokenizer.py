"""Text to token ids and back, without losing a character, however long the text.

A thin layer over a SentencePiece model (unigram or BPE) that has byte fallback and identity normalisation, so every
valid Unicode text is representable. Two things are added:

- Text is encoded in blocks, so that memory is bounded and time is linear. A block ends where no token could straddle
  the seam, and where that is depends on the text alone: never on the pieces in which the text arrived. So the tokens
  are those of the text as a whole; a unigram model's choice between two equally likely ways is open either way.
- The character U+2581, which SentencePiece itself uses to write a space, is spelled in bytes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from enum import IntEnum
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece

from mdseq.errors import UserError

BLOCK_CHARACTERS = 8192
MAX_BLOCK_CHARACTERS = 65_536
SPACE_MARK = "\u2581"
UNKNOWN_PENALTY = 10.0
_SPACE_MARKS = re.compile(f"({SPACE_MARK}+)")
ROUND_TRIP_PROBE = f"  a\n\n\tb \r\n {SPACE_MARK}\0 <sep></s> \u00e9e\u0301\ufb01\uff21\U0001f600 "


class SpecialToken(IntEnum):
    """Ids that every vocabulary gives to the same tokens; none of them is ever produced by encoding text."""

    PAD = 0
    UNK = 1
    BOS = 2
    EOS = 3
    SEP = 4


class Tokenizer:
    """A trained vocabulary. Raises UserError when the model loses text or has other special ids.

    Attributes:
        fingerprint: SHA-256 of the model, in hexadecimal.
        is_byte: bool [vocab_size], the tokens that spell a single byte, of a character that no piece has.
        text_bytes: int64 [vocab_size], length of the UTF-8 text of each token; 0 for special tokens.
    """

    def __init__(self, model: bytes, origin: str = "tokenizer") -> None:
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError:
            raise UserError(f"{origin} is not a SentencePiece model; build the dataset again") from None
        self.fingerprint: str = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._processor.vocab_size()
        self._require_special_ids(origin)
        mark_bytes = [f"<0x{byte:02X}>" for byte in SPACE_MARK.encode()]
        self._space_mark_ids = np.array([self._processor.piece_to_id(byte) for byte in mark_bytes], np.int32)
        # Characters that stand side by side in a piece, so that a token may straddle the seam between them.
        pieces: list[str] = self._processor.IdToPiece(list(range(self.vocab_size)))
        self._joined = frozenset(
            piece[start : start + 2].replace(SPACE_MARK, " ") for piece in pieces for start in range(len(piece) - 1)
        )
        probe = map(self._spelling, self.encode(ROUND_TRIP_PROBE).tolist())
        if b"".join(probe).decode(errors="replace") != ROUND_TRIP_PROBE:
            raise UserError(
                f"{origin} does not give back the text that it encodes; it must have byte fallback, identity "
                "normalisation, no dummy prefix and no whitespace removal, as `data_prep build` trains"
            )

    @cached_property
    def text_bytes(self) -> np.ndarray:
        return np.array([len(spelling) for spelling in self._spellings], dtype=np.int64)

    @cached_property
    def is_byte(self) -> np.ndarray:
        return np.array([self._processor.IsByte(index) for index in range(self.vocab_size)])

    @cached_property
    def is_unigram(self) -> bool:
        """Whether the model is one that gives segmentations probabilities."""
        try:
            self._processor.NBestEncodeAsIds("a", nbest_size=1)
        except RuntimeError:
            return False
        return True

    @cached_property
    def scores(self) -> np.ndarray:
        """Log probability of each token of a unigram model, float64 [vocab_size].

        For tokens of single bytes, which the model gives none, it is less than for all others, by SentencePiece's
        penalty for an unknown character.
        """
        scores = np.array([self._processor.GetScore(index) for index in range(self.vocab_size)], dtype=np.float64)
        scores[self.is_byte] = scores.min() - UNKNOWN_PENALTY
        return scores

    @cached_property
    def _pieces(self) -> list[str]:
        special = {int(token): f"<{token.name.lower()}>" for token in SpecialToken}
        return [special.get(index) or self._piece(index) for index in range(self.vocab_size)]

    @cached_property
    def _spellings(self) -> list[bytes]:
        return [self._spelling(index) for index in range(self.vocab_size)]

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read a model file. Raises UserError when it is missing or unusable."""
        try:
            model = path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read the tokenizer {path}: {error.strerror}") from None
        return cls(model, origin=str(path))

    def encode(self, text: str) -> np.ndarray:
        """Token ids of `text`, int32 [length], without special tokens."""
        return np.concatenate([np.empty(0, np.int32), *self.encode_pieces((text,))])

    def encode_pieces(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        """Token ids of a text that arrives in pieces; joined, they are `encode("".join(pieces))`.

        Yields an int32 array a block. Holds no more text than a piece and a block.
        """
        return map(self._encode_block, self.blocks(pieces))

    def segmentations(self, text: str, count: int) -> list[np.ndarray]:
        """Up to `count` ways to cut a short text into tokens, the likeliest first; int32 [length] each.

        The model must be a unigram one.
        """
        if SPACE_MARK in text:
            return [self.encode(text)]
        ways: list[np.ndarray] = self._processor.NBestEncodeAsNumpy(text, nbest_size=count)
        return ways

    def blocks(self, pieces: Iterable[str]) -> Iterator[str]:
        """The blocks of a text that arrives in pieces; joined, they are the text.

        A block ends at the first position, BLOCK_CHARACTERS or more after its start, where the characters before and
        after stand side by side in no piece of the vocabulary. Where there is none within MAX_BLOCK_CHARACTERS, it is
        cut there: the tokens there may differ from those of the text as a whole, but they still spell it.
        """
        rest = ""
        for chunk in _joined_to(MAX_BLOCK_CHARACTERS, pieces):
            text = rest + chunk
            start = 0
            while stop := self._end_of_block(text, start):
                yield text[start:stop]
                start = stop
            rest = text[start:]
        if rest:
            yield rest

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Text of `ids`. Special tokens are dropped and end nothing; broken UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids: Iterable[int] | np.ndarray) -> bytes:
        """UTF-8 text of `ids`. That of a longer text may be decoded stretch by stretch, cut anywhere."""
        return b"".join([self._spellings[index] for index in np.asarray(ids, dtype=np.int64).tolist()])

    def pieces(self, ids: Iterable[int] | np.ndarray) -> list[str]:
        """Each token by itself, to be shown: its text, spaces and newlines included.

        Special tokens are shown by name, such as `<eos>`, and bytes that are no character by value, such as `<0xE2>`.
        """
        return [self._pieces[index] for index in np.asarray(ids, dtype=np.int64).tolist()]

    def _end_of_block(self, text: str, start: int) -> int:
        """End of the block that starts at `start`; 0 when that takes more text to tell."""
        limit = start + MAX_BLOCK_CHARACTERS
        for position in range(start + BLOCK_CHARACTERS, min(len(text), limit)):
            if text[position - 1 : position + 1] not in self._joined:
                return position
        return limit if len(text) >= limit else 0

    def _encode_block(self, block: str) -> np.ndarray:
        ids: np.ndarray
        if SPACE_MARK not in block:  # many times faster than the split
            ids = self._processor.EncodeAsNumpy(block)
            return ids
        stretches = enumerate(_SPACE_MARKS.split(block))
        return np.concatenate(
            [
                np.tile(self._space_mark_ids, len(stretch)) if index % 2 else self._processor.EncodeAsNumpy(stretch)
                for index, stretch in stretches
            ]
        )

    def _piece(self, index: int) -> str:
        try:
            return self._spellings[index].decode()
        except UnicodeDecodeError:
            piece: str = self._processor.IdToPiece(index)
            return piece

    def _spelling(self, index: int) -> bytes:
        model = self._processor
        if model.IsControl(index) or model.IsUnknown(index):
            return b""
        piece: str = model.IdToPiece(index)
        return bytes([int(piece[3:5], 16)]) if model.IsByte(index) else piece.replace(SPACE_MARK, " ").encode()

    def _require_special_ids(self, origin: str) -> None:
        model = self._processor
        found = (model.pad_id(), model.unk_id(), model.bos_id(), model.eos_id())
        wanted = (SpecialToken.PAD, SpecialToken.UNK, SpecialToken.BOS, SpecialToken.EOS)
        has_separator = self.vocab_size > SpecialToken.SEP and model.IsControl(SpecialToken.SEP)
        if found != wanted or not has_separator:
            raise UserError(
                f"{origin} has pad, unk, bos, eos at ids {found}; they must be {tuple(map(int, wanted))}, "
                f"with a control token (the separator) at id {int(SpecialToken.SEP)}"
            )


def _joined_to(num_characters: int, pieces: Iterable[str]) -> Iterator[str]:
    """`pieces`, joined until they have `num_characters`, so that many small ones cost no more than a few large ones."""
    held: list[str] = []
    size = 0
    for piece in pieces:
        held.append(piece)
        size += len(piece)
        if size >= num_characters:
            yield "".join(held)
            held, size = [], 0
    yield "".join(held)

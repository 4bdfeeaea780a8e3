"""Text to token ids and back, without losing a character.

A thin layer over a SentencePiece unigram model that has byte fallback and identity normalisation, so every
valid Unicode text is representable. Two things are added: text is encoded in blocks that end at a line break
(a bounded lattice however long the document; a line break is a token of its own, so no token can straddle a
seam), and the character U+2581, which SentencePiece itself uses to write a space, is spelled in bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from enum import IntEnum
from pathlib import Path

import numpy as np
import sentencepiece

from mdseq.errors import UserError

BLOCK_CHARACTERS = 4096
SPACE_MARK = "\u2581"
ROUND_TRIP_PROBE = f"  a\n\n\tb \r\n {SPACE_MARK}\0 <sep></s> \u00e9\U0001f600 "


class SpecialToken(IntEnum):
    """Ids that every vocabulary gives to the same tokens; none of them is ever produced by encoding text."""

    PAD = 0
    UNK = 1
    BOS = 2
    EOS = 3
    SEP = 4


class Tokenizer:
    """A trained vocabulary. Raises UserError when the model loses text or has other special ids."""

    def __init__(self, model: bytes, origin: str = "tokenizer") -> None:
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError:
            raise UserError(f"{origin} is not a SentencePiece model; build the dataset again") from None
        self.fingerprint: str = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._processor.vocab_size()
        self._require_special_ids(origin)
        self._space_mark_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        if self.decode(self.encode(ROUND_TRIP_PROBE)) != ROUND_TRIP_PROBE:
            raise UserError(
                f"{origin} does not give back the text that it encodes; it must have byte fallback, identity "
                "normalisation, no dummy prefix and no whitespace removal, as `data_prep build` trains"
            )

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
        ids: list[int] = []
        for position, stretch in enumerate(text.split(SPACE_MARK)):
            if position:
                ids += self._space_mark_ids
            for block_ids in self._processor.encode(list(line_blocks(stretch)), num_threads=1):
                ids += block_ids
        return np.array(ids, dtype=np.int32)

    def encode_batch(self, texts: Iterable[str]) -> list[np.ndarray]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Text of `ids`. Special tokens are dropped and end nothing; broken UTF-8 becomes U+FFFD."""
        ids = np.asarray(ids, dtype=np.int64)
        text: str = self._processor.decode(ids[ids > max(SpecialToken)].tolist())
        return text

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


def line_blocks(text: str) -> Iterator[str]:
    """Cut `text` after line breaks into blocks of at least BLOCK_CHARACTERS; joined, they are `text`."""
    start = 0
    while start < len(text):
        line_break = text.find("\n", start + BLOCK_CHARACTERS)
        stop = len(text) if line_break < 0 else line_break + 1
        yield text[start:stop]
        start = stop

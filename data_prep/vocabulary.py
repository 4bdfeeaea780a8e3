"""The SentencePiece vocabulary: a bounded sample spread over all of the text, and a deterministic training on it.

`allot` says how much to take from which shard, a `WindowSample` takes it, in any order and any number of processes, and
`train_vocabulary` trains on the windows of all samples together.
"""

from __future__ import annotations

import hashlib
import heapq
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

import sentencepiece

from mdseq.data.tokenizer import SPACE_MARK, SpecialToken
from mdseq.errors import UserError

WINDOW_CHARACTERS = 2000
SAMPLE_CHARACTERS_PER_TOKEN = 512
SAMPLED_SHARDS = 256
READ_FACTOR = 8
# Lines end at these too: the trainer leaves out lines with the first or the last, and takes the other for a space.
_LINE_ENDS = str.maketrans(dict.fromkeys(f"\0{SPACE_MARK}\u2585", "\n"))


class WindowSample:
    """`num_characters` of text (a window more or less): the windows with the smallest content hashes.

    A uniform sample in bounded memory, which does not depend on the order in which texts are added. It looks at the
    first READ_FACTOR * `num_characters` that it is given, and then has `seen_enough`.
    """

    def __init__(self, num_characters: int) -> None:
        self._wanted = num_characters
        self._unread = READ_FACTOR * num_characters
        self._held = 0
        self._heap: list[tuple[int, str]] = []  # negated hashes: the largest hash on top

    @property
    def seen_enough(self) -> bool:
        return self._unread <= 0

    def add(self, text: str) -> None:
        """Look at `text`; what is no valid Unicode in it is left out."""
        stop = min(len(text), self._unread)
        self._unread -= stop
        for start in range(0, stop, WINDOW_CHARACTERS):
            content = text[start : min(stop, start + WINDOW_CHARACTERS)].encode(errors="ignore")
            rank = -int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())
            if self._held >= self._wanted and rank < self._heap[0][0]:
                continue
            window = content.decode()
            heapq.heappush(self._heap, (rank, window))
            self._held += len(window)
            while self._held - len(self._heap[0][1]) >= self._wanted:
                self._held -= len(heapq.heappop(self._heap)[1])

    def windows(self) -> list[str]:
        """The sampled text, smallest hash first: what a process hands on."""
        return [window for _, window in sorted(self._heap, reverse=True)]


def allot(shard_bytes: Mapping[str, Sequence[int]], vocab_size: int) -> dict[str, list[int]]:
    """Characters to sample from each shard, for a vocabulary of `vocab_size`.

    A source's part is proportional to its size, but a source that has text gets a window at least. It is spread over
    evenly spaced shards, 256 in all (more only if there are more sources), proportionally to their size.

    Args:
        shard_bytes: Size of each shard, by source.
    """
    sizes = {source: sum(shards) for source, shards in shard_bytes.items()}
    total = sum(sizes.values())
    spare_shards = max(0, SAMPLED_SHARDS - sum(size > 0 for size in sizes.values()))
    allotted = {source: [0] * len(shards) for source, shards in shard_bytes.items()}
    for source, shards in shard_bytes.items():
        if not sizes[source]:
            continue
        quota = max(WINDOW_CHARACTERS, vocab_size * SAMPLE_CHARACTERS_PER_TOKEN * sizes[source] // total)
        filled = [index for index, size in enumerate(shards) if size]
        num_chosen = min(len(filled), 1 + spare_shards * sizes[source] // total)
        chosen = [filled[(2 * number + 1) * len(filled) // (2 * num_chosen)] for number in range(num_chosen)]
        chosen_bytes = sum(shards[index] for index in chosen)
        for index in chosen:
            allotted[source][index] = -(-quota * shards[index] // chosen_bytes)
    return allotted


def train_vocabulary(windows: Iterable[str], vocab_size: int, model: Literal["unigram", "bpe"] = "unigram") -> bytes:
    """A SentencePiece model of at most `vocab_size` tokens (fewer when the text supports no more).

    It depends on what the `windows` say, not on their order: those of many samples may be chained. Every setting below
    that differs from SentencePiece's default is there so that decoding gives back the text: no normalisation, spaces
    kept as they are, unknown characters spelled in bytes, "\n" a token of its own.

    Raises UserError when there is no text, or `vocab_size` does not hold its characters.
    """
    trained = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(sorted(windows)),
            model_writer=trained,
            model_type=model,
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
            max_sentence_length=4 * WINDOW_CHARACTERS,  # in bytes: no window is too long
            num_threads=1,  # another number gives other bytes: it is recorded, and splits the sums
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise _complaint(str(error), vocab_size) from None
    return trained.getvalue()


def _lines(windows: Iterable[str]) -> Iterator[str]:
    for window in windows:
        yield from window.translate(_LINE_ENDS).split("\n")


def _complaint(finding: str, vocab_size: int) -> UserError:
    too_small = re.search(r"required_chars\D*(\d+) vs (\d+)", finding)
    if too_small:
        return UserError(
            f"a vocabulary of VOCAB={vocab_size:,} tokens does not hold the characters of this text, the 256 bytes and "
            f"the special tokens, which are {int(too_small[2]):,}; give a VOCAB well above that"
        )
    if "sentences_.empty()" in finding:
        return UserError(
            "there is no text to train a vocabulary on, only blank lines; give another DATA or --tokenizer"
        )
    return UserError(f"cannot train a vocabulary of VOCAB={vocab_size:,} tokens: {finding}")

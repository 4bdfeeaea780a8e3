"""Word n-grams of evaluation texts, which no training document may contain.

The set is a sorted array of 64-bit hashes in an Arrow file, which every worker maps into memory: it is held once.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_prep.documents import Document
from data_prep.ngrams import Hashes, NgramHasher, distinct, hash_ngrams, word_hashes
from mdseq.files import put_in_place, temporary_name

# Runs of fewer words are found everywhere by chance ("at the end of the day"), so shorter texts are not looked for.
FEWEST_WORDS = 8
# Hashes that are gathered before equal ones are dropped, and slots of the table that rules most n-grams out.
_BATCH_HASHES = 1 << 22
_MOST_SLOT_BITS = 24


class Contamination:
    """The n-grams that must not occur, with a fast test of membership. `lengths`: how many words they have."""

    def __init__(self, hashes: Hashes, lengths: tuple[int, ...]) -> None:
        """`hashes` are sorted, each once."""
        self.hashes = hashes
        self.lengths = lengths
        # A table of the hashes' leading bits answers for nearly all n-grams; a search of the whole set costs far more.
        slot_bits = min(max(len(hashes), 1).bit_length() + 4, _MOST_SLOT_BITS)
        self._shift = np.uint64(64 - slot_bits)
        self._slots = np.zeros(1 << slot_bits, np.bool_)
        self._slots[hashes >> self._shift] = True

    @classmethod
    def of(cls, documents: Iterable[Document], ngram: int) -> Contamination:
        """All n-grams of `ngram` words of all parts; a shorter part counts as one n-gram of its own length.

        Parts of fewer words than both `ngram` and FEWEST_WORDS count for nothing. The order of the documents does not
        matter. Walking a document may raise UnicodeDecodeError.
        """
        hashes, batch = np.empty(0, np.uint64), [np.empty(0, np.uint64)]
        lengths: set[int] = set()
        batch_size = 0
        for part in (part for document in documents for part in document.parts):
            hasher = NgramHasher(ngram)
            num_found = 0
            for words in word_hashes(part):
                batch.append(hasher.add(words))
                num_found += len(batch[-1])
                batch_size += len(batch[-1])
                if batch_size > _BATCH_HASHES:
                    hashes, batch, batch_size = distinct(np.concatenate([hashes, *batch])), [], 0
            if num_found:
                lengths.add(ngram)
            elif len(hasher.tail) >= FEWEST_WORDS:
                batch.append(hash_ngrams(hasher.tail, len(hasher.tail)))
                lengths.add(len(hasher.tail))
        return cls(distinct(np.concatenate([hashes, *batch])), tuple(sorted(lengths)))

    def contains_any(self, hashes: Hashes) -> bool:
        """If any of the hashes is in the set."""
        likely = hashes[self._slots[hashes >> self._shift]]
        if not len(likely):
            return False
        places = np.minimum(np.searchsorted(self.hashes, likely), len(self.hashes) - 1)
        return bool(np.any(self.hashes[places] == likely))

    def save(self, path: Path) -> None:
        """Write the set; the file exists whole or not at all."""
        schema = pa.schema(
            [pa.field("hash", pa.uint64(), nullable=False)], metadata={"lengths": " ".join(map(str, self.lengths))}
        )
        temporary = temporary_name(path)
        with pa.ipc.new_file(temporary, schema) as writer:
            writer.write_batch(pa.record_batch([pa.array(self.hashes)], schema=schema))
        put_in_place(temporary, path)

    @classmethod
    def load(cls, path: Path) -> Contamination:
        """Map the file that `save` wrote into memory."""
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        lengths = tuple(map(int, reader.schema.metadata[b"lengths"].split()))
        return cls(reader.get_batch(0)["hash"].to_numpy(), lengths)


class ContaminationSearch:
    """Looks for evaluation n-grams in the words of a document, each part by itself."""

    def __init__(self, contamination: Contamination) -> None:
        self._contamination = contamination
        self.found = False
        self.end_part()

    def add(self, words: Hashes) -> None:
        if not self.found:
            self.found = any(self._contamination.contains_any(hasher.add(words)) for hasher in self._hashers)

    def end_part(self) -> None:
        self._hashers = [NgramHasher(length) for length in self._contamination.lengths]

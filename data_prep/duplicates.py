"""Which documents to drop because an earlier one is equal or similar.

The rule: a document is dropped if and only if an earlier document of the plan has its id, or is found similar to it:
some band of their MinHashes is equal (`signatures`), and a share of all MinHashes that reaches the threshold. The first
of a kind stays. An earlier document counts even if it is dropped itself: of a chain, A like B and B like C, only A
stays. Near duplicates include exact ones; documents of fewer than five words are only compared for equality.

Within a band, a document is compared with at most EARLIEST of the first and NEAREST of the other earlier ones of its
bucket. The result is a function of the documents and their order alone.

All is done with sorted arrays, one band at a time, in about 50 bytes of memory a document: 5 GB for 100 million.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_prep.clean import set_aside
from data_prep.documents import Rejection, Screened
from data_prep.ngrams import Hashes
from data_prep.signatures import Signatures, band_name, bands_for
from mdseq.files import put_in_place, temporary_name

EARLIEST = 16
NEAREST = 16
_COMPARED_AT_ONCE = 16_384  # pairs; 16 MB of MinHashes
_NONE = -1

Indices = NDArray[np.int64]
_SCHEMA = pa.schema(
    [
        pa.field("ordinal", pa.int64(), nullable=False),
        pa.field("is_near", pa.bool_(), nullable=False),
        pa.field("original_shard", pa.int32(), nullable=False),
        pa.field("original_ordinal", pa.int64(), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True)
class Dropped:
    """Why a document is dropped, and the earlier one it duplicates: the `original_ordinal`-th screened of its shard."""

    reason: str
    original_shard: int
    original_ordinal: int

    def rejection(self, screened: Screened) -> Rejection:
        return set_aside(screened, self.reason)


def find_duplicates(paths: Sequence[Path], near_threshold: float, path: Path) -> None:
    """Write to `path` which documents to drop, given the signature files of all shards in the order of the plan.

    Raises UserError: a signature file is of another threshold.
    """
    signatures = Signatures(paths, near_threshold)
    originals = np.full(len(signatures), _NONE, np.int64)
    _find_equal(signatures, originals)
    is_near = np.zeros(len(signatures), np.bool_)
    if near_threshold:
        # An exact duplicate tells nothing that its original does not tell.
        compared = np.flatnonzero((originals == _NONE) & signatures.column("has_shingles"))
        for band in range(bands_for(near_threshold)[0]):
            members, starts = _repeated(signatures.column(band_name(band))[compared])
            for later, earlier in _pairs(compared[members], starts, originals):
                is_similar = _agreement(signatures, later, earlier) >= near_threshold
                originals[later[is_similar]] = earlier[is_similar]
                is_near[later[is_similar]] = True
    _save(path, signatures.shard_starts, originals, is_near)


def _find_equal(signatures: Signatures, originals: Indices) -> None:
    members, starts = _repeated(signatures.id_halves(0))
    second = signatures.id_halves(1)[members]
    order = np.lexsort((second, starts))  # stable: documents keep their order within a group
    members, starts, second = members[order], starts[order], second[order]
    is_first = np.ones(len(members), np.bool_)
    is_first[1:] = (starts[1:] != starts[:-1]) | (second[1:] != second[:-1])
    firsts = members[is_first][np.cumsum(is_first) - 1]
    originals[members[~is_first]] = firsts[~is_first]


def _repeated(keys: Hashes) -> tuple[Indices, Indices]:
    """Indices of the keys that occur more than once, by key, then in order; for each, where its group starts."""
    order = np.argsort(keys, kind="stable")
    in_order = keys[order]
    equals_previous = np.zeros(len(keys) + 1, np.bool_)
    equals_previous[1:-1] = in_order[1:] == in_order[:-1]
    is_member = equals_previous[:-1] | equals_previous[1:]
    is_first = ~equals_previous[:-1][is_member]
    return order[is_member], np.flatnonzero(is_first)[np.cumsum(is_first) - 1]


def _pairs(members: Indices, starts: Indices, originals: Indices) -> Iterator[tuple[Indices, Indices]]:
    """Pairs of documents to compare, (later, earlier), those without an original yet; never one twice at once."""
    places = np.arange(len(members))
    for step in range(EARLIEST + NEAREST):
        if step < EARLIEST:
            earlier = starts + step
            is_pair = earlier < places
        else:
            earlier = places - (step - EARLIEST + 1)
            is_pair = earlier >= starts + EARLIEST
        candidates = places[is_pair & (originals[members] == _NONE)]
        for first in range(0, len(candidates), _COMPARED_AT_ONCE):
            later = candidates[first : first + _COMPARED_AT_ONCE]
            yield members[later], members[earlier[later]]


def _agreement(signatures: Signatures, one: Indices, other: Indices) -> NDArray[np.float64]:
    """Share of their MinHashes in which pairs of documents agree: an estimate of their n-grams' Jaccard similarity."""
    return np.mean(signatures.min_hashes(one) == signatures.min_hashes(other), axis=1)


def _save(path: Path, shard_starts: Indices, originals: Indices, is_near: NDArray[np.bool_]) -> None:
    """One batch for each shard, so that a worker reads no other."""
    temporary = temporary_name(path)
    with pa.ipc.new_file(temporary, _SCHEMA) as writer:
        for start, stop in pairwise(shard_starts):
            ordinals = np.flatnonzero(originals[start:stop] != _NONE)
            found = originals[start:stop][ordinals]
            shards = np.searchsorted(shard_starts, found, side="right") - 1
            columns = [ordinals, is_near[start:stop][ordinals], shards.astype(np.int32), found - shard_starts[shards]]
            writer.write_batch(pa.record_batch([pa.array(column) for column in columns], schema=_SCHEMA))
    put_in_place(temporary, path)


def load_dropped(path: Path, shard: int) -> Mapping[int, Dropped]:
    """What `find_duplicates` found in a shard, by the document's ordinal among the screened ones of the shard."""
    return _DroppedOfShard(pa.ipc.open_file(pa.memory_map(str(path))).get_batch(shard))


class _DroppedOfShard(Mapping[int, Dropped]):
    """Arrow columns as a mapping: a dictionary of millions of documents would not fit a worker's memory."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self._batch = batch
        self._ordinals = batch["ordinal"].to_numpy()

    def __len__(self) -> int:
        return len(self._ordinals)

    def __iter__(self) -> Iterator[int]:
        return map(int, self._ordinals)

    def __getitem__(self, ordinal: int) -> Dropped:
        place = int(np.searchsorted(self._ordinals, ordinal))
        if place == len(self._ordinals) or self._ordinals[place] != ordinal:
            raise KeyError(ordinal)
        _, is_near, shard, original = (column[place].as_py() for column in self._batch.columns)
        return Dropped("near_duplicate" if is_near else "exact_duplicate", shard, original)

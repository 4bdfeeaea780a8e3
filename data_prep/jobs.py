"""What is done with one shard, by any process on any machine: sampled, signed, encoded.

A build in progress is a folder: the plan, the vocabulary and the shards that are finished stand where the dataset
will have them, and `work/` holds what only the build needs. A job reads the plan and its inputs, and writes under names
of its shard alone; done again, it gives the same bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import IO

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from data_prep.clean import Screen
from data_prep.contamination import Contamination
from data_prep.documents import Document, Rejection, Screened
from data_prep.duplicates import Dropped, load_dropped
from data_prep.joining import as_one, groups
from data_prep.plan import InputFile, Plan, PlannedShard
from data_prep.readers.base import Stretch
from data_prep.readers.registry import reader_of
from data_prep.segmentation import SegmentationSampler
from data_prep.shards import ShardWriter, shard_name
from data_prep.signatures import SignatureWriter
from data_prep.vocabulary import WindowSample
from mdseq.data.format import (
    DOCUMENT_ID_BYTES,
    PLAN_FILE,
    SPLITS,
    TOKENIZER_FILE,
    ShardEntry,
    Split,
    SplitOfSource,
    file_sha256,
    token_dtype,
)
from mdseq.data.tokenizer import SpecialToken, Tokenizer
from mdseq.errors import UserError
from mdseq.files import put_in_place, temporary_name, write_whole

Advance = Callable[[int], None]


class BuildFolder:
    """Names in the folder of a build in progress."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.work = path / "work"
        self.lock = self.work / "lock"
        self.plan = path / PLAN_FILE
        self.tokenizer = path / TOKENIZER_FILE
        self.contamination = self.work / "evaluation.arrow"
        self.dropped = self.work / "duplicates.arrow"

    def finished(self, shard: int) -> Path:
        return self.work / f"shard-{shard:05d}.json"

    def rejected(self, shard: int) -> Path:
        return self.work / f"rejected-{shard:05d}.jsonl"

    def signatures(self, shard: int) -> Path:
        return self.work / f"signatures-{shard:05d}.arrow"


class FinishedShard(BaseModel):
    """The sidecar of a shard: written last, so that what it names is whole. `faults` are among `rejected`.

    `merged` counts documents that became part of the one before.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    plan: str
    tokenizer: str
    splits: dict[Split, SplitOfSource]
    read: int
    rejected: dict[str, int]
    faults: int
    merged: int


class ShardJobs:
    """The jobs of one build. `advance` is told how much text has been dealt with, in bytes; for a shard, all of it."""

    def __init__(self, folder: Path, advance: Advance = lambda _: None) -> None:
        self.folder = BuildFolder(folder)
        self.plan = Plan.model_validate_json(self.folder.plan.read_bytes())
        self._advance = advance
        self._samplers: dict[float, SegmentationSampler] = {}

    def sample(self, shard: int, num_characters: int) -> list[str]:
        """Text of a shard to train the vocabulary on."""
        sample = WindowSample(num_characters)
        for _, item in self._screened(self.plan.shards[shard]):
            if isinstance(item, Rejection):
                continue
            for piece in chain((item.document.header,), *item.document.parts):
                sample.add(piece)
                if sample.seen_enough:
                    return sample.windows()
        return sample.windows()

    def sign(self, shard: int) -> None:
        """Write the signatures by which duplicates are found, unless they are there."""
        path = self.folder.signatures(shard)
        if path.exists():
            return
        with SignatureWriter(path, self.plan.spec.cleaning.near_duplicates) as signatures:
            for _, item in self._screened(self.plan.shards[shard]):
                if isinstance(item, Screened):
                    signatures.add(item)
        self._advance(self.plan.shards[shard].text_bytes)

    def encode(self, shard: int) -> FinishedShard:
        """Write the shard's file for each split, its rejections and its sidecar; or find them whole, and do nothing."""
        finished = self.finished(shard)
        if finished is None:
            writer = _SplitWriters(self, shard)
            try:
                finished = writer.write()
            except BaseException:
                writer.remove_temporaries()
                raise
            self._require_unchanged(self.plan.shards[shard])
            write_whole(self.folder.finished(shard), finished.model_dump_json().encode())
        else:
            self._advance(self.plan.shards[shard].text_bytes)
        return finished

    def finished(self, shard: int) -> FinishedShard | None:
        """The shard's sidecar, if it is of this plan and all that it names is intact."""
        try:
            record = FinishedShard.model_validate_json(self.folder.finished(shard).read_bytes())
        except (OSError, ValidationError):
            return None
        if (record.plan, record.tokenizer) != (self.plan.fingerprint, self.tokenizer.fingerprint):
            return None
        entries = [entry for part in record.splits.values() for entry in part.shards]
        return record if all(self._is_intact(entry) for entry in entries) else None

    def _is_intact(self, entry: ShardEntry) -> bool:
        path = self.folder.path / entry.file
        return path.is_file() and path.stat().st_size == entry.bytes and file_sha256(path) == entry.sha256

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.folder.tokenizer)

    def sampler(self, shard: PlannedShard) -> SegmentationSampler | None:
        """What cuts the sources of a shard's training pairs, if that is done at random; shards share its cache."""
        power = self.plan.spec.sources[shard.source].sampling
        if power and power not in self._samplers:
            self._samplers[power] = SegmentationSampler(self.tokenizer, power)
        return self._samplers.get(power)

    @cached_property
    def screen(self) -> Screen:
        path = self.folder.contamination
        contamination = Contamination.load(path) if path.exists() else None
        return Screen(self.plan.spec.cleaning, contamination)

    def documents(self, shard: PlannedShard) -> Iterator[tuple[InputFile, Document | Rejection]]:
        """The records of a shard as they are read, each with its file."""
        options = self.plan.read_options(shard.source)
        for index, start, stop, row in shard.stretches:
            file = self.plan.files[index]
            records = reader_of(file.format).read(Path(file.path), file.name, Stretch(start, stop, row), options)
            yield from ((file, record) for record in records)

    def _screened(self, shard: PlannedShard) -> Iterator[tuple[InputFile, Screened | Rejection]]:
        return ((file, self.screen(record)) for file, record in self.documents(shard))

    def _require_unchanged(self, shard: PlannedShard) -> None:
        for index in sorted({stretch.file for stretch in shard.stretches}):
            file = self.plan.files[index]
            if not file.is_unchanged() and file_sha256(Path(file.path)) != file.sha256:
                raise UserError(
                    f"{file.path} has changed since the build was planned; restore it, or remove {self.folder.path} "
                    "and build again when nothing writes to it"
                )


class _SplitWriters:
    """The files of one shard while they are written: one for each split that gets a document."""

    def __init__(self, jobs: ShardJobs, shard: int) -> None:
        self._jobs = jobs
        self._shard = shard
        self._planned = jobs.plan.shards[shard]
        self._source = jobs.plan.spec.sources[self._planned.source]
        self._sampler = jobs.sampler(self._planned)
        self._writers: dict[Split, ShardWriter] = {}
        self._rejected: IO[str] | None = None
        self._reasons: Counter[str] = Counter()
        self._read = self._faults = self._merged = 0
        self._walked = self._advanced = 0

    def write(self) -> FinishedShard:
        jobs, planned = self._jobs, self._planned
        # All are read anew for each copy: side by side, copies of equal length would end up in one row of training.
        for copy in range(self._source.copies):
            self._write_copy(copy)
        parts: dict[Split, SplitOfSource] = {}
        for split in SPLITS:
            if split in self._writers:
                entry, text_bytes = self._writers[split].close()
                parts[split] = SplitOfSource(
                    documents=entry.documents, tokens=entry.tokens, text_bytes=text_bytes, shards=(entry,)
                )
        if self._rejected is not None:
            self._rejected.close()
            path = jobs.folder.rejected(self._shard)
            put_in_place(temporary_name(path), path)
        jobs._advance(planned.text_bytes - self._advanced)
        return FinishedShard(
            plan=jobs.plan.fingerprint,
            tokenizer=jobs.tokenizer.fingerprint,
            splits=parts,
            read=self._read,
            rejected=dict(sorted(self._reasons.items())),
            faults=self._faults,
            merged=self._merged,
        )

    def remove_temporaries(self) -> None:
        """Leave nothing of a shard that was not finished; a full disk needs the room."""
        paths = [self._jobs.folder.path / shard_name(split, self._shard) for split in SPLITS]
        for path in (*paths, self._jobs.folder.rejected(self._shard)):
            temporary_name(path).unlink(missing_ok=True)

    def _write_copy(self, copy: int) -> None:
        """Write the documents of all splits, or with another copy than the first, those of the training split."""
        source = self._source
        for split, group in groups(self._documents(copy), source.joined, source.joined_characters, copy):
            self._encode(split, as_one(group), copy)
            self._merged += len(group) - 1

    def _documents(self, copy: int) -> Iterator[tuple[Split, Screened]]:
        """What is kept of a copy; on the first, all that is read is counted."""
        dropped = self._dropped()
        ordinal = 0
        for file, item in self._jobs._screened(self._planned):
            rejection = item if isinstance(item, Rejection) else None
            if isinstance(item, Screened):
                split = file.split or self._split_of(item.document_id)
                if ordinal in dropped:
                    rejection = dropped[ordinal].rejection(item)
                elif copy == 0 or split == "train":
                    yield split, item
                ordinal += 1
            if copy == 0:
                self._read += 1
                if rejection is not None:
                    self._reject(rejection)

    def _encode(self, split: Split, screened: Screened, copy: int) -> None:
        document, tokenizer = screened.document, self._jobs.tokenizer
        sampler = self._sampler if split == "train" else None
        writer = self._writers.get(split) or self._open(split)
        writer.append(_special(SpecialToken.BOS))
        length = target_start = 1
        for index, part in enumerate(document.parts):
            if index:
                writer.append(_special(SpecialToken.SEP))
                length = target_start = length + 1
            pieces = chain((document.header,), part) if document.header and not index else part
            advancing = map(self._advancing, pieces)
            if sampler is not None and index == 0:
                blocks = sampler.encode_pieces(advancing, screened.document_id, copy)
            else:
                blocks = tokenizer.encode_pieces(advancing)
            for ids in blocks:
                writer.append(ids)
                length += len(ids)
        writer.append(_special(SpecialToken.EOS))
        writer.end_document(target_start, screened.document_id, document.origin, document.row, screened.text_bytes)

    def _advancing(self, piece: str) -> str:
        self._walked += len(piece)
        step = min(self._walked // self._source.copies, self._planned.text_bytes) - self._advanced
        self._jobs._advance(step)
        self._advanced += step
        return piece

    def _open(self, split: Split) -> ShardWriter:
        jobs = self._jobs
        writer = self._writers[split] = ShardWriter(
            jobs.folder.path / shard_name(split, self._shard),
            token_dtype(jobs.tokenizer.vocab_size),
            jobs.tokenizer.fingerprint,
            self._source.name,
            tuple(dict.fromkeys(jobs.plan.files[stretch.file].name for stretch in self._planned.stretches)),
        )
        return writer

    def _split_of(self, document_id: bytes) -> Split:
        """By the id alone, and from both ends, so that a split keeps its documents when data or the other grows."""
        splits = self._jobs.plan.spec.splits
        place = int.from_bytes(document_id) / 256**DOCUMENT_ID_BYTES
        if place < splits.valid_fraction:
            return "valid"
        return "test" if place >= 1 - splits.test_fraction else "train"

    def _reject(self, rejection: Rejection) -> None:
        self._reasons[rejection.reason] += 1
        self._faults += rejection.is_fault
        if self._rejected is None:
            self._rejected = temporary_name(self._jobs.folder.rejected(self._shard)).open("w", encoding="utf-8")
        self._rejected.write(json.dumps({"source": self._source.name} | asdict(rejection), ensure_ascii=False) + "\n")

    def _dropped(self) -> Mapping[int, Dropped]:
        path = self._jobs.folder.dropped
        return load_dropped(path, self._shard) if path.exists() else {}


def _special(token: SpecialToken) -> np.ndarray:
    return np.array([token], dtype=np.int32)

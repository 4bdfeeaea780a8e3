"""The plan: every input file with its hash, every shard with the stretches of files that make it.

Made once, before anything is built, and frozen in `plan.json`. The bytes of each shard follow from the plan alone, so
it does not matter who builds them, in which order, or how often the build is stopped.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from data_prep.documents import Document
from data_prep.readers.base import BLOCK_BYTES, ReadOptions, Stretch
from data_prep.readers.registry import first_record, reader_of
from data_prep.sources import FileFormat, SourceFile, compression_of, find_files
from data_prep.spec import PrepSpec, SourceSpec
from mdseq.data.format import Kind, Split, file_sha256
from mdseq.errors import UserError
from mdseq.settings import flatten

# What is before a stretch of a compressed file must be decompressed again, hence few, as the speeds ask for, and large.
MOST_STRETCHES = {"": 1 << 30, ".gz": 8, ".zst": 16, ".xz": 4, ".bz2": 2}
LEAST_COMPRESSED_BYTES = 16e6
MOST_SHARDS_OF_ITS_OWN_ACCORD = 32
SHOWN_DIFFERENCES = 10


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class InputFile(_Record):
    """A file as it was when the plan was made; `changed_ns` (its ctime) tells cheaply that it still is."""

    path: str
    name: str
    format: FileFormat
    split: Split | None
    size: int
    changed_ns: int
    sha256: str
    text_bytes: int
    units: int
    records: int

    def is_unchanged(self) -> bool:
        """Whether size and time are those of the plan; reads no content."""
        try:
            status = Path(self.path).stat()
        except OSError:
            return False
        return (status.st_size, status.st_ctime_ns) == (self.size, self.changed_ns)


class PlannedStretch(NamedTuple):
    """A stretch of input file number `file`."""

    file: int
    start: int
    stop: int
    row: int


class PlannedShard(_Record):
    """A unit of work, and of what is lost when a worker is killed: documents of one source, in order."""

    source: int
    text_bytes: int
    stretches: tuple[PlannedStretch, ...]


class Plan(_Record):
    """All that decides the bytes of a dataset. Its options are the prep spec, with all fields and paths resolved."""

    kind: Kind
    options: dict[str, Any]
    files: tuple[InputFile, ...]
    evaluation: tuple[InputFile, ...]
    shards: tuple[PlannedShard, ...]

    @cached_property
    def spec(self) -> PrepSpec:
        return PrepSpec.model_validate(self.options)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all but the times of the files."""
        content = self.model_dump(mode="json")
        for file in (*content["files"], *content["evaluation"]):
            del file["changed_ns"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def text_bytes(self) -> int:
        return sum(shard.text_bytes for shard in self.shards)

    @property
    def records(self) -> int:
        """The most records that the inputs can hold."""
        return sum(file.records for file in self.files)

    def read_options(self, source: int) -> ReadOptions:
        spec = self.spec.sources[source]
        return ReadOptions(spec.record_template(), spec.path_header, int(self.spec.shards.max_record_mb * 1e6))


@dataclass(frozen=True)
class Surveyed:
    """An input file, and for one of lines the number of line ends before each block."""

    file: InputFile
    lines_before: tuple[int, ...]


Survey = Callable[[Sequence[tuple[SourceFile, int]]], Iterable[Surveyed]]


def make_plan(spec: PrepSpec, survey: Survey) -> Plan:
    """Find, survey and cut the inputs; `survey` maps `survey_file` over files, in order.

    Raises:
        UserError: Nothing to read, a damaged file, records without a known field, or texts mixed with pairs.
    """
    found = [find_files(source) for source in spec.sources]
    spec = spec.model_copy(update={"sources": tuple(map(_with_fields, spec.sources, found))})
    kind = _kind_of(spec)
    _require_pairs(spec, kind)
    max_bytes = int(spec.shards.max_record_mb * 1e6)
    surveyed = list(survey([(file, max_bytes) for files in found for file in files]))
    evaluation = [find_files(_evaluation_source(path)) for path in spec.cleaning.evaluation]
    return Plan(
        kind=kind,
        options=content_options(spec),
        files=tuple(item.file for item in surveyed),
        evaluation=tuple(item.file for item in survey([(file, max_bytes) for files in evaluation for file in files])),
        shards=tuple(_cut(surveyed, [len(files) for files in found], spec.shards.text_mb)),
    )


def survey_file(file: SourceFile, max_record_bytes: int) -> Surveyed:
    """Read a file once, whole."""
    if compression_of(file.path) and file.format in ("parquet", "arrow"):
        raise UserError(f"{file.path}: {file.format} files are compressed inside; decompress it, or exclude it")
    survey = reader_of(file.format).survey(file.path, max_record_bytes)
    try:
        status = file.path.stat()
        sha256 = file_sha256(file.path)
    except OSError as error:
        raise UserError(f"cannot read {file.path}: {error.strerror}") from None
    described = InputFile(
        path=str(file.path.absolute()),
        name=file.name,
        format=file.format,
        split=file.split,
        size=status.st_size,
        changed_ns=status.st_ctime_ns,
        sha256=sha256,
        text_bytes=survey.text_bytes,
        units=survey.units,
        records=survey.records,
    )
    return Surveyed(described, survey.lines_before)


def evaluation_documents(plan: Plan) -> Iterator[Document]:
    """Documents of the evaluation files, whatever their split; records without text are passed over."""
    for path in plan.spec.cleaning.evaluation:
        files = find_files(_evaluation_source(path))
        source = _with_fields(_evaluation_source(path), files)
        options = ReadOptions(source.record_template(), "", int(plan.spec.shards.max_record_mb * 1e6))
        for file in files:
            whole = Stretch(0, sys.maxsize)
            records = reader_of(file.format).read(file.path, file.name, whole, options)
            yield from (record for record in records if isinstance(record, Document))


def content_options(spec: PrepSpec) -> dict[str, Any]:
    """The keys of a spec that decide what is in the dataset."""
    options = spec.model_dump(mode="json", exclude={"cluster"})
    for limit in ("max_faulty_fraction", "max_filtered_fraction"):
        del options["cleaning"][limit]
    return options


def differences(plan: Plan, spec: PrepSpec) -> list[str]:
    """What of the options and the inputs is not as it was when the plan was made, a line each.

    A file whose size or time has changed is hashed.
    """
    found = [find_files(source) for source in spec.sources]
    asked = content_options(spec.model_copy(update={"sources": tuple(map(_with_fields, spec.sources, found))}))
    before, now = flatten(plan.options), flatten(asked)
    lines = [
        f"{key}: {before.get(key)!r} then, {now.get(key)!r} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    evaluation = [file for path in spec.cleaning.evaluation for file in find_files(_evaluation_source(path))]
    files = [file for files in found for file in files]
    lines += _changed_files(plan.files, files) + _changed_files(plan.evaluation, evaluation)
    if len(lines) > SHOWN_DIFFERENCES:
        lines[SHOWN_DIFFERENCES:] = [f"and {len(lines) - SHOWN_DIFFERENCES:,} more"]
    return lines


def _changed_files(planned: Sequence[InputFile], found: Sequence[SourceFile]) -> list[str]:
    now = {str(file.path.absolute()): file for file in found}
    then = {file.path: file for file in planned}
    lines = [f"{path}: new" for path in now if path not in then]
    lines += [f"{path}: gone" for path in then if path not in now]
    for path, file in then.items():
        if path in now and not file.is_unchanged() and file_sha256(Path(path)) != file.sha256:
            lines.append(f"{path}: its content has changed")
    if not lines and [*now] != [*then]:
        lines.append("the order of the files has changed")
    return lines


def _with_fields(source: SourceSpec, files: list[SourceFile]) -> SourceSpec:
    """The source with the fields of its records named, by a look at the first record where they are not."""
    if source.text or source.source or source.turns:
        return source
    record: dict[str, Any] | None = None
    tables = [file for file in files if file.format not in ("text", "lines", "code")]
    for file in tables:
        if (record := first_record(file.format, file.path)) is not None:
            break
    if not tables or record is None or "text" in record:
        return source.model_copy(update={"text": "text"})
    if "src" in record and "trg" in record:
        return source.model_copy(update={"source": "src", "target": "trg"})
    raise UserError(
        f"{file.path}: records have the fields {', '.join(record)}, none of them `text`, nor `src` and `trg`; say "
        f"which to take with sources.{source.name}.text, or with source and target"
    )


def _kind_of(spec: PrepSpec) -> Kind:
    kinds = {source.name: source.record_template().kind for source in spec.sources}
    if len(set(kinds.values())) > 1:
        listed = ", ".join(f"{name} is of {kind}s" for name, kind in kinds.items())
        raise UserError(f"texts and pairs cannot be in one dataset ({listed}); build two")
    return "pair" if "pair" in kinds.values() else "text"


def _require_pairs(spec: PrepSpec, kind: Kind) -> None:
    for source in spec.sources if kind == "text" else ():
        if source.sampling:
            raise UserError(
                f"sources.{source.name}.sampling = {source.sampling}: only the sources of pairs are cut at random, and "
                f"{source.name} is of texts, all of which is target; leave sampling out"
            )
        if source.joined > 1:
            raise UserError(
                f"sources.{source.name}.joined = {source.joined}: only pairs are joined, and {source.name} is of "
                "texts, which stand beside each other in rows as it is; leave joined out"
            )


def _evaluation_source(path: str) -> SourceSpec:
    return SourceSpec(name="evaluation", path=(path,), path_header="")


def _cut(surveyed: Sequence[Surveyed], files_of_source: Iterable[int], text_mb: float) -> Iterator[PlannedShard]:
    """Fill shards with files, and stretches of files that can be cut, up to the size of a shard."""
    total = sum(item.file.text_bytes for item in surveyed)
    size = text_mb * 1e6 or min(max(total / MOST_SHARDS_OF_ITS_OWN_ACCORD, 2e6), 1e9)
    first = 0
    for source, num_files in enumerate(files_of_source):
        stretches: list[PlannedStretch] = []
        filled = 0.0
        for index in range(first, first + num_files):
            for stretch, text_bytes in _stretches(surveyed[index], size - filled, size):
                if stretches and filled + text_bytes / 2 > size:
                    yield PlannedShard(source=source, text_bytes=round(filled), stretches=tuple(stretches))
                    stretches, filled = [], 0.0
                stretches.append(PlannedStretch(index, stretch.start, stretch.stop, stretch.row))
                filled += text_bytes
        if stretches:
            yield PlannedShard(source=source, text_bytes=round(filled), stretches=tuple(stretches))
        first += num_files


def _stretches(surveyed: Surveyed, room: float, size: float) -> Iterator[tuple[Stretch, float]]:
    """A file in stretches of about `size` bytes of text, the first of `room`; each with its bytes."""
    file = surveyed.file
    if not file.units:
        return
    bytes_per_unit = file.text_bytes / file.units
    grain = BLOCK_BYTES if surveyed.lines_before else 1
    kind = ".xz" if file.format == "csv" else compression_of(Path(file.path))  # rows of CSV are skipped one by one
    least_units = -(-file.units // MOST_STRETCHES[kind])
    if kind:
        least_units = max(least_units, round(LEAST_COMPRESSED_BYTES / max(bytes_per_unit, 1e-9)))
    start = 0
    while start < file.units:
        wanted = max((room if start == 0 and room > size / 2 else size) / max(bytes_per_unit, 1e-9), least_units)
        stop = max(start + grain, round((start + wanted) / grain) * grain)
        if file.units - stop < wanted / 4:
            stop = file.units
        row = surveyed.lines_before[start // BLOCK_BYTES] if surveyed.lines_before else 0
        yield Stretch(start, stop, row), (stop - start) * bytes_per_unit
        start = stop

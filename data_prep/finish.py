"""The end of a build: what was rejected is within the limits, the manifest is written, the dataset appears."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from itertools import islice
from pathlib import Path

from data_prep.jobs import BuildFolder, FinishedShard
from data_prep.plan import Plan
from data_prep.spec import CleaningSpec, SourceSpec
from mdseq.data.format import (
    MANIFEST_FILE,
    REJECTED_FILE,
    SPLITS,
    Manifest,
    SourceEntry,
    Split,
    SplitEntry,
    SplitOfSource,
    Totals,
    special_token_ids,
    token_dtype,
)
from mdseq.data.tokenizer import Tokenizer
from mdseq.errors import UserError
from mdseq.files import put_in_place, sync_folder, temporary_name, write_whole

SHOWN_REJECTIONS = 3


class Tally:
    """The finished shards, and what was rejected in them against what the spec allows."""

    def __init__(self, plan: Plan, limits: CleaningSpec, folder: BuildFolder) -> None:
        self.plan = plan
        self.folder = folder
        self.finished: dict[int, FinishedShard] = {}
        self.rejected: Counter[str] = Counter()
        self._limits = limits
        self._read = self._faults = 0

    def add(self, shard: int, finished: FinishedShard) -> None:
        """Count a shard. Raises UserError as soon as it is certain that more is rejected than the limits allow."""
        self.finished[shard] = finished
        self.rejected.update(finished.rejected)
        self._read += finished.read
        self._faults += finished.faults
        is_all = len(self.finished) == len(self.plan.shards)
        total = self._read if is_all else self.plan.records
        limits, filtered = self._limits, self.rejected.total() - self._faults
        if self._faults > limits.max_faulty_fraction * total:
            raise self._too_many(self._faults, "cannot be read", "max_faulty_fraction", limits.max_faulty_fraction)
        if filtered > limits.max_filtered_fraction * total:
            what, limit = "were set aside by filters", limits.max_filtered_fraction
            raise self._too_many(filtered, what, "max_filtered_fraction", limit)

    def describe(self) -> str:
        """How many were rejected for which reason, and the first few."""
        counts = (
            ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.rejected.items())) or "nothing in them"
        )
        examples: list[str] = []
        for path in (self.folder.rejected(shard) for shard in sorted(self.finished)):
            if len(examples) < SHOWN_REJECTIONS and path.exists():
                with path.open(encoding="utf-8") as file:
                    records = [json.loads(line) for line in islice(file, SHOWN_REJECTIONS - len(examples))]
                examples += [
                    f"\n  {r['origin']}, row {r['row']}: {r['reason']}: {r['excerpt'][:100]!r}" for r in records
                ]
        return counts + "".join(examples)

    def _too_many(self, count: int, what: str, key: str, limit: float) -> UserError:
        return UserError(
            f"{count:,} of {self._read:,} records {what}, more than the {limit:.0%} that cleaning.{key} allows: "
            f"{self.describe()}\n  all are listed in {self.folder.work}/rejected-*.jsonl; mend the data and remove "
            f"{self.folder.path}, or go on with a higher {key}"
        )


def write_manifest(tally: Tally) -> Manifest:
    """Put the shards together: the list of what was rejected, and the manifest. Raises UserError without a document."""
    plan, folder = tally.plan, tally.folder
    finished = [tally.finished[shard] for shard in range(len(plan.shards))]
    if not any(part.splits for part in finished):
        raise UserError(f"no document in {len(plan.files):,} files: {tally.describe()}")
    _collect_rejected(plan, folder)
    tokenizer = Tokenizer.load(folder.tokenizer)
    of_source = {
        source.name: [finished[index] for index, shard in enumerate(plan.shards) if shard.source == number]
        for number, source in enumerate(plan.spec.sources)
    }
    manifest = Manifest(
        kind=plan.kind,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        dtype=token_dtype(tokenizer.vocab_size),
        special_tokens=special_token_ids(),
        sources={source.name: _source_entry(source, of_source[source.name]) for source in plan.spec.sources},
        splits={split: _split_entry(split, of_source) for split in SPLITS},
    ).signed()
    for name in manifest.sources:
        assert manifest.accounts_for(name), f"documents of {name} are lost"
    write_whole(folder.path / MANIFEST_FILE, manifest.to_json().encode())
    return manifest


def _source_entry(source: SourceSpec, shards: list[FinishedShard]) -> SourceEntry:
    rejected: Counter[str] = Counter()
    for shard in shards:
        rejected.update(shard.rejected)
    return SourceEntry(
        weight=source.weight,
        path_header=source.path_header if source.format == "code" else "",
        copies=source.copies,
        merged=sum(shard.merged for shard in shards),
        read=sum(shard.read for shard in shards),
        rejected=dict(sorted(rejected.items())),
    )


def _split_entry(split: Split, of_source: dict[str, list[FinishedShard]]) -> SplitEntry:
    sources = {}
    for name, shards in of_source.items():
        parts = [shard.splits[split] for shard in shards if split in shard.splits]
        if parts:
            entries = tuple(entry for part in parts for entry in part.shards)
            sources[name] = SplitOfSource(shards=entries, **Totals.of(parts).model_dump())
    return SplitEntry.combine(sources)


def _collect_rejected(plan: Plan, folder: BuildFolder) -> None:
    """All rejections in one file, in the order of the plan; no file where there are none."""
    paths = [path for shard in range(len(plan.shards)) if (path := folder.rejected(shard)).exists()]
    if not paths:
        return
    target = folder.path / REJECTED_FILE
    with temporary_name(target).open("wb") as file:
        for path in paths:
            with path.open("rb") as part:
                shutil.copyfileobj(part, file)
    put_in_place(temporary_name(target), target)


def appear(folder: BuildFolder, out: Path) -> None:
    """Give the complete dataset its name, and remove what only the build needed."""
    sync_folder(folder.path)
    folder.path.rename(out)
    sync_folder(out.parent)
    shutil.rmtree(BuildFolder(out).work, ignore_errors=True)

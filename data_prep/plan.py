"""Read everything once before writing anything: what there is, what must be rejected, where the split falls.

A mistake in the data is found here, before the vocabulary is trained and the first shard written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from data_prep.clean import screen
from data_prep.sources import Document, Rejection, SourceFile, read_source
from data_prep.vocabulary import WindowSample
from mdseq.data.format import DOCUMENT_ID_BYTES, Kind, Split, document_id
from mdseq.errors import UserError

SHOWN_REJECTIONS = 3


@dataclass(frozen=True)
class Plan:
    """What later stages need to know of the whole input; `sources` are the files that gave a document."""

    kind: Kind
    sources: tuple[str, ...]
    num_documents: int
    text_bytes: int
    smallest_id: bytes
    largest_id: bytes
    rejected: dict[str, int]

    def split_of(self, identity: bytes, valid_fraction: float) -> Split:
        """Split of a document by its content hash alone, so it stays where it is when the data grows.

        The extreme hashes are fixed so that two different documents suffice for both splits to have one.
        """
        if valid_fraction == 0 or identity == self.largest_id:
            return "train"
        is_small = int.from_bytes(identity) < valid_fraction * 256**DOCUMENT_ID_BYTES
        return "valid" if is_small or identity == self.smallest_id else "train"


def read_all(sources: list[SourceFile], text_key: str) -> Iterator[Document | Rejection]:
    """Every record of every source, screened, in the order that numbers the documents."""
    for source in sources:
        yield from map(screen, read_source(source, text_key))


def make_plan(
    sources: list[SourceFile],
    text_key: str,
    max_rejected_fraction: float,
    sample: WindowSample | None,
    advance: Callable[[int], None],
) -> Plan:
    """Read all sources once, adding their text to `sample` where one is given.

    Raises UserError: texts mixed with pairs, too much rejected, or no document at all.
    """
    first: Document | None = None
    names: dict[str, None] = {}
    num_documents = text_bytes = 0
    smallest, largest = b"\xff" * DOCUMENT_ID_BYTES, b""
    rejections: Counter[str] = Counter()
    examples: list[Rejection] = []
    for record in read_all(sources, text_key):
        if isinstance(record, Rejection):
            rejections[record.reason] += 1
            examples += [record] if len(examples) < SHOWN_REJECTIONS else []
            continue
        first = first or record
        _require_same_kind(first, record)
        names[record.source] = None
        num_documents += 1
        parts = (record.text, record.target or "")
        size = sum(len(part.encode()) for part in parts)
        text_bytes += size
        identity = document_id(record.text, record.target)
        smallest, largest = min(smallest, identity), max(largest, identity)
        if sample is not None:
            for part in parts:
                sample.add(part)
        advance(size)
    # A source tree is expected to hold binaries and empty files; a file of records or of prose is not.
    if sources[0].format != "code":
        _require_few(rejections, num_documents, max_rejected_fraction, examples)
    if first is None:
        raise UserError(f"no document in {len(sources):,} files: {_describe(rejections, examples)}")
    return Plan(
        kind="text" if first.target is None else "pair",
        sources=tuple(names),
        num_documents=num_documents,
        text_bytes=text_bytes,
        smallest_id=smallest,
        largest_id=largest,
        rejected=dict(sorted(rejections.items())),
    )


def _require_same_kind(first: Document, record: Document) -> None:
    if (first.target is None) != (record.target is None):
        text, pair = (first, record) if first.target is None else (record, first)
        raise UserError(
            f"plain texts and source/target pairs are mixed: {text.source}:{text.line} is a text, "
            f"{pair.source}:{pair.line} is a pair; build two datasets, or leave files out with --exclude"
        )


def _require_few(rejections: Counter[str], num_documents: int, limit: float, examples: list[Rejection]) -> None:
    num_rejected = rejections.total()
    if num_rejected > limit * (num_documents + num_rejected):
        raise UserError(
            f"{num_rejected:,} of {num_documents + num_rejected:,} records cannot be used, more than the "
            f"{limit:.0%} that --max_rejected_fraction allows: {_describe(rejections, examples)}"
        )


def _describe(rejections: Counter[str], examples: list[Rejection]) -> str:
    counts = ", ".join(f"{count:,} {reason}" for reason, count in sorted(rejections.items())) or "nothing in them"
    lines = [f"\n  {example.source}:{example.line}: {example.reason}: {example.excerpt}" for example in examples]
    return counts + "".join(lines)

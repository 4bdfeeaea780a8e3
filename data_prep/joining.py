"""Documents made of several, for models that see few (data augmentation by concatenation, arXiv 2105.01691)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from data_prep.documents import Document, Pieces, Screened
from mdseq.data.format import Split, document_id

JOINT = " "


def groups(
    documents: Iterable[tuple[Split, Screened]], size: int, max_characters: int, copy: int
) -> Iterator[tuple[Split, list[Screened]]]:
    """Which documents become one: training documents that follow each other; what is held out stays by itself.

    Where groups begin is shifted by one with each copy, so that a document has other company in each of `size` copies.

    Args:
        documents: In order; where `size` is above 1, of strings that can be walked again.
        size: Documents of a group, at most.
        max_characters: A group that would have more is cut into several; 0 for no limit.
        copy: Number of the copy, from 0.
    """
    group: list[Screened] = []
    characters = place = 0
    for split, screened in documents:
        if split != "train" or size == 1:
            yield split, [screened]
            continue
        more = sum(map(len, chain(*screened.document.parts)))
        if group and (place % size == copy % size or 0 < max_characters < characters + more):
            yield "train", group
            group, characters = [], 0
        group.append(screened)
        characters += more
        place += 1
    if group:
        yield "train", group


def as_one(group: Sequence[Screened]) -> Screened:
    """Source to source and target to target, with a space between; file and row are those of the first."""
    if len(group) == 1:
        return group[0]
    first = group[0].document
    parts = tuple(map(_text, zip(*(screened.document.parts for screened in group), strict=True)))
    joints = len(JOINT.encode()) * len(parts) * (len(group) - 1)
    return Screened(
        Document(first.origin, first.row, tuple((part,) for part in parts)),
        document_id(*parts),
        sum(screened.text_bytes for screened in group) + joints,
    )


def _text(parts: Iterable[Pieces]) -> str:
    return JOINT.join(map("".join, parts))

"""Documents made of several, for models that see few (data augmentation by concatenation, arXiv 2105.01691)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain

from data_prep.documents import Document, Pieces, Screened
from mdseq.data.format import Split, document_id

JOINT = " "


def joined(
    documents: Iterable[tuple[Split, Screened]], size: int, max_characters: int, copy: int
) -> Iterator[tuple[Split, Screened]]:
    """Training documents that follow each other as one: source to source, target to target, with a space between.

    Which they are is shifted by one with each copy, so that a document stands beside another one. What is held out is
    as it was.

    Args:
        documents: In order; nothing of a source or target but strings.
        size: Documents that become one.
        max_characters: Fewer become one where they would have more characters than this; 0 for no limit.
        copy: Number of the copy, from 0.
    """
    group: list[Screened] = []
    characters, room = 0, copy % size or size
    for split, screened in documents:
        if split != "train":
            yield split, screened
            continue
        more = sum(map(len, chain(*screened.document.parts)))
        if group and 0 < max_characters < characters + more:
            yield "train", _as_one(group)
            group, characters, room = [], 0, size
        group.append(screened)
        characters += more
        if len(group) == room:
            yield "train", _as_one(group)
            group, characters, room = [], 0, size
    if group:
        yield "train", _as_one(group)


def _as_one(group: list[Screened]) -> Screened:
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

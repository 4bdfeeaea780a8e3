"""A layout's slots as segments for kernels of variable length: whose queries meet whose keys.

All of it is tensor arithmetic of shapes that the host knows: on a GPU, nothing waits for it.

Shapes: b batch, s slots of a row, g global slots of a row, n = b * s rows of the flattened slots, m documents in a row,
h heads, d head dimension, p segments, c pieces of a row, r copies of global slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mdseq.sparse.documents import NO_DOCUMENT, Layout

# A kernel works through all queries of a key one after the other (backward), and through all keys of a query (forward).
# Global slots meet whole documents, so these are cut: long enough to keep the copies few, short enough to run abreast.
MIN_PIECE = 2048
MAX_PIECES = 16


@dataclass(frozen=True)
class Segments:
    """Segment p: queries start_q[p] to start_q[p + 1] meet keys start_k[p] to start_k[p + 1], either may be none.

    Together they cover all rows, so that a kernel leaves no row unwritten.

    Attributes:
        start_q, start_k: int32 [p + 1].
        max_q, max_k: At least the rows of the longest segment; known on the host.
    """

    start_q: Tensor
    start_k: Tensor
    max_q: int
    max_k: int

    def swapped(self) -> Segments:
        """Queries as keys, keys as queries."""
        return Segments(self.start_k, self.start_q, self.max_k, self.max_q)


@dataclass(frozen=True)
class GlobalSegments:
    """How the global slots of a document meet its tokens, a piece of at most `max_q` slots at a time, and each other.

    Every piece of a document has its own copy of the document's global slots.

    Attributes:
        pieces: All slots, cut into pieces, as queries; the copies as keys.
        among: The global slots of all rows, [b * g], as queries and as keys.
        source_r: The global slot that each copy is of.
        copy_bgc: The copies of each global slot, [b * g, c]; anything where `is_copy_bgc` is False.
    """

    pieces: Segments
    among: Segments
    source_r: Tensor
    copy_bgc: Tensor
    is_copy_bgc: Tensor


def window_segments(layout: Layout, dilation: int) -> list[Segments]:
    """The tokens of each residue class, by document; element i is of the rows i, i + dilation, ... of the slots.

    Classes are those of the flattened slots: what matters is that tokens of a document at a multiple of the dilation
    from each other share one. Documents may thus start anywhere.
    """
    num_slots = layout.document_bs.shape[1]
    start_q, start_k = _by_document(
        _count(layout.document_bs[:, layout.num_global :], layout), layout.num_global, num_slots
    )
    longest = -(-num_slots // dilation)

    def in_class(start_p: Tensor, residue: int) -> Tensor:
        return ((start_p - residue + dilation - 1) // dilation).int()

    return [
        Segments(in_class(start_q, residue), in_class(start_k, residue), longest, longest)
        for residue in range(min(dilation, layout.document_bs.numel()))
    ]


def global_segments(layout: Layout) -> GlobalSegments:
    """Raises AssertionError where the layout has no global slots."""
    (b, s), g = layout.document_bs.shape, layout.num_global
    assert g > 0
    device = layout.document_bs.device
    row_b1 = torch.arange(b, device=device)[:, None]
    length = max(MIN_PIECE, -(-s // MAX_PIECES))
    c = -(-s // length)

    count_bm = _count(layout.document_bs[:, :g], layout)
    tokens_bm = _count(layout.document_bs[:, g:], layout)
    end_bm = g + tokens_bm.cumsum(1)
    start_bm = end_bm - tokens_bm
    cut_c = torch.arange(c, device=device) * length

    # Pieces begin where a document does, where the padding does, and at every cut.
    start_bp = torch.cat([start_bm, end_bm[:, -1:], cut_c.expand(b, -1)], dim=1).sort(dim=1).values
    end_bp = torch.cat([start_bp[:, 1:], start_bp.new_full((b, 1), s)], dim=1)
    owner_bp = layout.document_bs.gather(1, start_bp.clamp(max=s - 1))
    has_keys_bp = (start_bp >= g) & (start_bp < end_bp) & (owner_bp != NO_DOCUMENT)
    keys_bp = torch.where(has_keys_bp, count_bm.gather(1, owner_bp.clamp(min=0)), 0)
    start_k = _starts(keys_bp.flatten())
    start_q = torch.cat([(start_bp + row_b1 * s).flatten(), start_bp.new_full((1,), b * s)])

    # Copies of a global slot: one a piece of its document, of which each stretch between cuts holds at most one.
    owner_bg = layout.document_bs[:, :g]
    index_bg = owner_bg.clamp(min=0)
    begin_bgc = torch.maximum(start_bm.gather(1, index_bg)[..., None], cut_c)
    end_bgc = torch.minimum(end_bm.gather(1, index_bg)[..., None], cut_c + length)
    is_copy_bgc = (begin_bgc < end_bgc) & (owner_bg != NO_DOCUMENT)[..., None]
    piece_bgc = torch.searchsorted(start_bp, begin_bgc.flatten(1), right=True).view(b, g, c) - 1
    first_bg = (count_bm.cumsum(1) - count_bm).gather(1, index_bg)
    offset_bg = torch.arange(g, device=device) - first_bg
    copy_bgc = start_k[piece_bgc + (row_b1 * start_bp.shape[1])[..., None]] + offset_bg[..., None]
    copy_bgc = torch.where(is_copy_bgc, copy_bgc, 0).flatten(0, 1)
    is_copy_bgc = is_copy_bgc.flatten(0, 1)

    num_copies = b * g * c
    source_bgc = torch.arange(b * g, device=device)[:, None].expand(-1, c)
    source_r = source_bgc.new_zeros(num_copies + 1)
    source_r.scatter_(0, torch.where(is_copy_bgc, copy_bgc, num_copies).flatten(), source_bgc.flatten())

    among_q, among_k = _by_document(count_bm, 0, g)
    return GlobalSegments(
        pieces=Segments(start_q.int(), start_k.int(), length, g),
        among=Segments(among_q.int(), among_k.int(), g, g),
        source_r=source_r[:-1],
        copy_bgc=copy_bgc,
        is_copy_bgc=is_copy_bgc,
    )


def _by_document(count_bm: Tensor, first: int, width: int) -> tuple[Tensor, Tensor]:
    """Starts of segments of rows of `width` slots, whose documents stand one after the other from slot `first` on.

    Between the documents of one row and those of the next there are two segments: queries that meet no keys, then keys
    that meet no queries. So slots that are none of the documents' cost nothing, and get zeros.
    """
    b, _ = count_bm.shape
    row_b1 = torch.arange(b, device=count_bm.device)[:, None] * width
    end_bm = row_b1 + first + count_bm.cumsum(1)
    first_b1 = row_b1 + first
    zero, total = count_bm.new_zeros(1), count_bm.new_full((1,), b * width)
    previous_b1 = torch.cat([zero, end_bm[:-1, -1]])[:, None]
    start_q = torch.cat([zero, torch.cat([first_b1, first_b1, end_bm], dim=1).flatten(), total, total])
    start_k = torch.cat([zero, torch.cat([previous_b1, first_b1, end_bm], dim=1).flatten(), end_bm[-1, -1:], total])
    return start_q, start_k


def _count(document_bx: Tensor, layout: Layout) -> Tensor:
    """Slots of each document, [b, m]."""
    real_bx = (document_bx != NO_DOCUMENT).long()
    count_bm = real_bx.new_zeros(len(document_bx), layout.num_documents)
    return count_bm.scatter_add_(1, document_bx.clamp(min=0), real_bx)


def _starts(count_p: Tensor) -> Tensor:
    return torch.cat([count_p.new_zeros(1), count_p.cumsum(0)])

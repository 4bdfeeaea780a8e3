"""Which document each slot of a row holds, and what attention needs to know about it.

Shapes: b batch, l tokens in a row, g global slots in a row, t token slots in a row, s = g + t slots, m documents in a
row, d features.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

Plan = TypeVar("Plan")
Count = TypeVar("Count", int, Tensor)

NO_DOCUMENT = -1


@dataclass(frozen=True)
class Documents:
    """The documents packed into a batch of rows, one after the other, then padding.

    Attributes:
        document_bl: Index of the document within its row, ascending; NO_DOCUMENT at padding. A document may be empty.
        position_bl: Position within the document.
        num_documents: At least the documents of any row; known on the host.
        global_bl: Tokens that are global, or None for none.
        num_global_tokens: At least the global tokens of any row; known on the host.
    """

    document_bl: Tensor
    position_bl: Tensor
    num_documents: int
    global_bl: Tensor | None = None
    num_global_tokens: int = 0
    _layouts: dict[tuple[int, int], Layout] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def whole(cls, length_b: Tensor, row_length: int) -> Documents:
        """One document a row, of the given lengths, then padding."""
        position_bl = torch.arange(row_length, device=length_b.device).expand(len(length_b), row_length)
        real_bl = position_bl < length_b[:, None]
        return cls(torch.where(real_bl, 0, NO_DOCUMENT), position_bl * real_bl, num_documents=1)

    @property
    def real_bl(self) -> Tensor:
        return self.document_bl != NO_DOCUMENT

    def layout(self, num_global: int = 0, alignment: int = 1) -> Layout:
        """These documents as slots: built by the first who asks, shared by all layers and by all denoiser calls.

        Args:
            num_global: Global slots that every document gets besides its tokens.
            alignment: What the start of every document is to be a multiple of, within the token slots. The engine
                `flash` needs that of `Pattern.stride`.
        """
        key = (num_global, alignment)
        if key not in self._layouts:
            self._layouts[key] = _lay_out(self, num_global, alignment)
        return self._layouts[key]


@dataclass(frozen=True)
class Layout:
    """The slots that attention sees: each row's global slots, then its tokens, both by document.

    A token that is marked global moves to the global slots. So there is one kind of global slot, the others keep their
    order, and the distance of two tokens is the number of ordinary tokens between them.

    Attributes:
        document_bs: Document that a slot belongs to, NO_DOCUMENT where it holds nothing.
        position_bs: Position of its token within the document; 0 for slots that hold no token.
        num_global: Leading slots of a row that are global (g).
        num_documents: At least the documents of any row (m); known on the host.
        alignment: The first token of every document, g and s are multiples of this.
    """

    document_bs: Tensor
    position_bs: Tensor
    num_global: int
    num_documents: int
    alignment: int
    _content_bs: Tensor = field(repr=False, compare=False)
    _slot_bl: Tensor = field(repr=False, compare=False)
    _plans: dict[Hashable, object] = field(default_factory=dict, repr=False, compare=False)

    @property
    def real_bs(self) -> Tensor:
        return self.document_bs != NO_DOCUMENT

    def to_slots(self, x_bld: Tensor, global_gd: Tensor | None = None) -> Tensor:
        """Put tokens, and every document's own `num_global` global vectors, into their slots: [b, s, d]."""
        parts = [x_bld.flatten(0, 1), x_bld.new_zeros(1, x_bld.shape[2])]
        if global_gd is not None:
            parts.append(global_gd.to(x_bld.dtype))
        return torch.cat(parts)[self._content_bs]

    def to_tokens(self, x_bsd: Tensor) -> Tensor:
        """Take the tokens, and what stands for padding, out of their slots: [b, l, d]."""
        return x_bsd.flatten(0, 1)[self._slot_bl]

    def plan(self, key: Hashable, build: Callable[[], Plan]) -> Plan:
        """An engine's masks for this layout: built by the first layer that asks, shared by the others."""
        if key not in self._plans:
            self._plans[key] = build()
        return self._plans[key]  # type: ignore[return-value]


def _lay_out(documents: Documents, num_global: int, alignment: int) -> Layout:
    """Tensor arithmetic only, of shapes that the host knows: on a GPU, nothing waits for it."""
    document_bl, m = documents.document_bl, documents.num_documents
    (b, length), device = document_bl.shape, document_bl.device
    real_bl = documents.real_bl
    global_bl = torch.zeros_like(real_bl) if documents.global_bl is None else documents.global_bl & real_bl
    owner_bl = document_bl.clamp(min=0)

    def count(of_bl: Tensor) -> Tensor:
        return torch.zeros(b, m, dtype=torch.long, device=device).scatter_add_(1, owner_bl, of_bl.long())

    def rank(of_bl: Tensor) -> Tensor:
        """How many of the same kind stand before a token in its document."""
        before_bl = of_bl.cumsum(1) - of_bl.long()
        return before_bl - _starts(count(of_bl)).gather(1, owner_bl)

    # Global slots: of each document, its own, then its global tokens.
    own_bm = (count(real_bl) > 0) * num_global
    global_start_bm = _starts(own_bm + count(global_bl))
    g = _round_up(m * num_global + documents.num_global_tokens, alignment)
    # Token slots: of each document, the others, then nothing up to the next multiple of the alignment.
    tokens_bm = _round_up(count(real_bl & ~global_bl), alignment)
    token_start_bm = g + _starts(tokens_bm)
    t = _round_up(length + min(m, length) * (alignment - 1), alignment)

    ordinary_bl = real_bl & ~global_bl
    slot_bl = torch.where(
        global_bl,
        (global_start_bm + own_bm).gather(1, owner_bl) + rank(global_bl),
        token_start_bm.gather(1, owner_bl) + rank(ordinary_bl),
    )
    # Padding keeps slots of its own, after all documents: what a row's padding becomes is no other row's business.
    padding_bl = g + tokens_bm.sum(1, keepdim=True) + (~real_bl).cumsum(1) - 1
    slot_bl = torch.where(real_bl, slot_bl, padding_bl)
    nowhere = g + t
    own_slot_bmg = global_start_bm[..., None] + torch.arange(num_global, device=device)
    own_slot_bn = torch.where((own_bm > 0)[..., None], own_slot_bmg, nowhere).flatten(1)

    # Where each slot's content stands in [tokens of all rows, nothing, global vectors].
    token_bl = torch.arange(b * length, device=device).view(b, length)
    own_g = (b * length + 1 + torch.arange(num_global, device=device)).repeat(m)
    document_g = torch.arange(m, device=device).repeat_interleave(num_global)
    slots = torch.cat([slot_bl, own_slot_bn], dim=1)

    def fill(value: int, at_tokens_bl: Tensor, at_own_g: Tensor) -> Tensor:
        content = torch.cat([at_tokens_bl, at_own_g.expand(b, -1)], dim=1)
        filled = torch.full((b, g + t + 1), value, device=device)
        return filled.scatter_(1, slots, content)[:, :-1].contiguous()

    row_b1 = torch.arange(b, device=device)[:, None] * (g + t)
    return Layout(
        document_bs=fill(NO_DOCUMENT, document_bl, document_g),
        position_bs=fill(0, documents.position_bl, torch.zeros_like(own_g)),
        num_global=g,
        num_documents=m,
        alignment=alignment,
        _content_bs=fill(b * length, token_bl, own_g),
        _slot_bl=slot_bl + row_b1,
    )


def _starts(count_bm: Tensor) -> Tensor:
    return count_bm.cumsum(1) - count_bm


def _round_up(value: Count, multiple: int) -> Count:
    return -(-value // multiple) * multiple

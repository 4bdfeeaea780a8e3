"""Which document each slot of a row holds, and what attention needs to know about it.

Shapes: b batch, l tokens in a row, g global slots in a row, t other slots in a row, s = g + t slots,
m documents in a row, n their own global slots, d features.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

Plan = TypeVar("Plan")

NO_DOCUMENT = -1
# Identities of slots: beyond those of tokens.
_FIRST_OWN = 2**31


@dataclass(frozen=True)
class Documents:
    """The documents packed into a batch of rows, one after the other, then padding.

    Attributes:
        document_bl: Index of the document within its row, ascending; NO_DOCUMENT at padding. A document may be empty.
        position_bl: Position within the document; of a pair, the target's count from 1 again, so that a word and its
            counterpart in the source have nearly the same.
        num_documents: At least the documents of any row; known on the host.
        global_bl: Tokens that are global, or None for none.
        num_global_tokens: The fewest and the most global tokens of any row; known on the host.
    """

    document_bl: Tensor
    position_bl: Tensor
    num_documents: int
    global_bl: Tensor | None = None
    num_global_tokens: tuple[int, int] = (0, 0)
    _layouts: dict[int, Layout] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def whole(cls, length_b: Tensor, row_length: int, source_length_b: Tensor | None = None) -> Documents:
        """One document a row, of these lengths, then padding; for pairs, with those of their sources (0 for none)."""
        slot_bl = torch.arange(row_length, device=length_b.device).expand(len(length_b), row_length)
        real_bl = slot_bl < length_b[:, None]
        position_bl = slot_bl
        if source_length_b is not None:
            source_b1 = source_length_b[:, None]
            position_bl = torch.where(slot_bl < source_b1, slot_bl, slot_bl - (source_b1 - 1).clamp(min=0))
        return cls(torch.where(real_bl, 0, NO_DOCUMENT), position_bl * real_bl, num_documents=1)

    @property
    def real_bl(self) -> Tensor:
        return self.document_bl != NO_DOCUMENT

    def marked(self, global_bl: Tensor, num_global_tokens: tuple[int, int] | None = None) -> Documents:
        """The same documents with these tokens global.

        Args:
            global_bl: The tokens; padding is left out.
            num_global_tokens: The fewest and the most of any row; None to count them, for which the host waits.
        """
        global_bl = global_bl & self.real_bl
        if num_global_tokens is None:
            count_b = global_bl.sum(dim=1).tolist()
            num_global_tokens = min(count_b), max(count_b)
        return Documents(self.document_bl, self.position_bl, self.num_documents, global_bl, num_global_tokens)

    def take(self, index_n: Tensor) -> Documents:
        """The documents of some rows."""
        global_bl = None if self.global_bl is None else self.global_bl[index_n]
        return Documents(
            self.document_bl[index_n], self.position_bl[index_n], self.num_documents, global_bl, self.num_global_tokens
        )

    def layout(self, num_global: int = 0) -> Layout:
        """These documents as slots: built by the first who asks, shared by all layers and by all denoiser calls.

        Args:
            num_global: Global slots that every document gets besides its tokens.
        """
        if num_global not in self._layouts:
            self._layouts[num_global] = _lay_out(self, num_global)
        return self._layouts[num_global]


def leading_source(documents: Documents, target_bl: Tensor, count: int) -> Tensor:
    """The first `count` tokens of each document, before its first target and, of a pair, in its source: bool [b, l]."""
    (b, length), real_bl = target_bl.shape, documents.real_bl
    slot_bl = torch.arange(length, device=target_bl.device).expand(b, length)
    owner_bl = documents.document_bl.clamp(min=0)

    def first_slot(of_bl: Tensor) -> Tensor:
        slot_bm = torch.full((b, documents.num_documents), length, device=target_bl.device)
        return slot_bm.scatter_reduce_(1, owner_bl, torch.where(of_bl, slot_bl, length), "amin").gather(1, owner_bl)

    place_bl = slot_bl - first_slot(real_bl)
    in_source_bl = (slot_bl < first_slot(target_bl & real_bl)) & (documents.position_bl == place_bl)
    return real_bl & in_source_bl & (place_bl < count)


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
    """

    document_bs: Tensor
    position_bs: Tensor
    num_global: int
    num_documents: int
    _content_bs: Tensor = field(repr=False, compare=False)
    _slot_bl: Tensor = field(repr=False, compare=False)
    _own_slot_bn: Tensor = field(repr=False, compare=False)
    _plans: dict[Hashable, object] = field(default_factory=dict, repr=False, compare=False)

    @property
    def real_bs(self) -> Tensor:
        return self.document_bs != NO_DOCUMENT

    @property
    def identity_bs(self) -> Tensor:
        """What tells a slot from the others of its row, whatever other rows hold: int64.

        A token's index in the row; of the global vectors of a document, 2**31 + document * their number + index;
        anything where a slot holds nothing.
        """
        return self.plan("identity", lambda: _identities(self))

    def to_slots(self, x_bld: Tensor, global_gd: Tensor | None = None) -> Tensor:
        """Put tokens, and every document's own `num_global` global vectors, into their slots: [b, s, d]."""
        x_bsd: Tensor = _ToSlots.apply(x_bld, global_gd, self)
        return x_bsd

    def to_tokens(self, x_bsd: Tensor) -> Tensor:
        """Take the tokens, and what stands for padding, out of their slots: [b, l, d]."""
        x_bld: Tensor = _ToTokens.apply(x_bsd, self)
        return x_bld

    def plan(self, key: Hashable, build: Callable[[], Plan]) -> Plan:
        """An engine's masks for this layout: built by the first layer that asks, shared by the others."""
        if key not in self._plans:
            self._plans[key] = build()
        return self._plans[key]  # type: ignore[return-value]


def _identities(layout: Layout) -> Tensor:
    b, length = layout._slot_bl.shape
    num_own = layout._own_slot_bn.shape[1] // layout.num_documents
    first_b1 = torch.arange(b, device=layout._slot_bl.device)[:, None] * length
    own_bs = layout._content_bs - (b * length + 1)
    return torch.where(own_bs < 0, layout._content_bs - first_b1, _FIRST_OWN + layout.document_bs * num_own + own_bs)


class _ToSlots(torch.autograd.Function):
    """As no two tokens share a slot, gradients are taken out of the slots as tokens are.

    The gradient of indexing would be added up index by index, one after the other where many slots hold nothing.
    """

    @staticmethod
    def forward(ctx: Any, x_bld: Tensor, global_gd: Tensor | None, layout: Layout) -> Tensor:
        ctx.layout = layout
        ctx.global_dtype = None if global_gd is None else global_gd.dtype
        parts = [x_bld.flatten(0, 1), x_bld.new_zeros(1, x_bld.shape[2])]
        if global_gd is not None:
            parts.append(global_gd.to(x_bld.dtype))
        return torch.cat(parts)[layout._content_bs]

    @staticmethod
    def backward(ctx: Any, grad_bsd: Tensor) -> tuple[Tensor | None, ...]:
        layout: Layout = ctx.layout
        grad_bld = layout.to_tokens(grad_bsd) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_bld, None, None
        slot_bn, m = layout._own_slot_bn, layout.num_documents
        b, s, d = grad_bsd.shape
        # Absent documents have no slots, and any will do in their place.
        index_bn = slot_bn.clamp(max=s - 1) + torch.arange(b, device=slot_bn.device)[:, None] * s
        grad_bnd = torch.where((slot_bn < s)[..., None], grad_bsd.flatten(0, 1)[index_bn], 0.0)
        grad_gd = grad_bnd.view(b * m, slot_bn.shape[1] // m, d).sum(dim=0, dtype=ctx.global_dtype)
        return grad_bld, grad_gd, None


class _ToTokens(torch.autograd.Function):
    """The reverse: where no token stands, the gradient is zero."""

    @staticmethod
    def forward(ctx: Any, x_bsd: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        return x_bsd.flatten(0, 1)[layout._slot_bl]

    @staticmethod
    def backward(ctx: Any, grad_bld: Tensor) -> tuple[Tensor, None]:
        layout: Layout = ctx.layout
        tokens = grad_bld.shape[0] * grad_bld.shape[1]
        grad_nd = torch.cat([grad_bld.flatten(0, 1), grad_bld.new_zeros(1, grad_bld.shape[2])])
        return grad_nd[layout._content_bs.clamp(max=tokens)], None


def _lay_out(documents: Documents, num_global: int) -> Layout:
    """Tensor arithmetic only, of shapes that the host knows: on a GPU, nothing waits for it."""
    document_bl, m = documents.document_bl, documents.num_documents
    (b, length), device = document_bl.shape, document_bl.device
    real_bl = documents.real_bl
    global_bl = torch.zeros_like(real_bl) if documents.global_bl is None else documents.global_bl & real_bl
    owner_bl = document_bl.clamp(min=0)

    def count(of_bl: Tensor) -> Tensor:
        return torch.zeros(b, m, dtype=torch.long, device=device).scatter_add_(1, owner_bl, of_bl.long())

    # Global slots: of each document, its own, then its global tokens. Then all other tokens, then padding.
    fewest, most = documents.num_global_tokens
    g, t = m * num_global + most, length - fewest
    own_bm, marked_bm = (count(real_bl) > 0) * num_global, count(global_bl)
    own_start_bm = _starts(own_bm + marked_bm)
    marked_start_bm = own_start_bm + own_bm - _starts(marked_bm)  # less those that the count below has passed
    slot_bl = torch.where(
        global_bl,
        marked_start_bm.gather(1, owner_bl) + global_bl.cumsum(1) - 1,
        g + (~global_bl).cumsum(1) - 1,
    )
    nowhere = g + t
    own_slot_bmg = own_start_bm[..., None] + torch.arange(num_global, device=device)
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
        _content_bs=fill(b * length, token_bl, own_g),
        _slot_bl=slot_bl + row_b1,
        _own_slot_bn=own_slot_bn,
    )


def _starts(count_bm: Tensor) -> Tensor:
    return count_bm.cumsum(1) - count_bm

"""Which document each slot of a row holds, and what attention needs to know about it.

Shapes: b batch, l tokens in a row, g global slots in a row, s = g + l slots.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

Plan = TypeVar("Plan")

NO_DOCUMENT = -1


@dataclass(frozen=True)
class Documents:
    """The documents packed into a batch of rows.

    Attributes:
        document_bl: Index of the document within its row, NO_DOCUMENT at padding.
        position_bl: Position within the document.
        num_documents: Most documents in a row, known on the host.
    """

    document_bl: Tensor
    position_bl: Tensor
    num_documents: int

    @classmethod
    def whole(cls, length_b: Tensor, row_length: int) -> Documents:
        """One document a row, of the given lengths, then padding."""
        position_bl = torch.arange(row_length, device=length_b.device).expand(len(length_b), row_length)
        real_bl = position_bl < length_b[:, None]
        return cls(torch.where(real_bl, 0, NO_DOCUMENT), position_bl * real_bl, num_documents=1)

    @property
    def real_bl(self) -> Tensor:
        return self.document_bl != NO_DOCUMENT


@dataclass(frozen=True)
class Layout:
    """The slots that attention sees: each row's global slots, then its tokens.

    Attributes:
        document_bs: Document that a slot belongs to, NO_DOCUMENT where it holds nothing.
        num_global: Leading slots of a row that are global (g).
    """

    document_bs: Tensor
    num_global: int
    _plans: dict[Hashable, object] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, documents: Documents, num_global: int) -> Layout:
        """Give every document `num_global` global slots of its own."""
        document_bl = documents.document_bl
        owner_g = torch.arange(documents.num_documents, device=document_bl.device).repeat_interleave(num_global)
        last_b = document_bl.amax(dim=1)
        owner_bg = torch.where(owner_g <= last_b[:, None], owner_g, NO_DOCUMENT)
        return cls(torch.cat([owner_bg, document_bl], dim=1), owner_bg.shape[1])

    @property
    def real_bs(self) -> Tensor:
        return self.document_bs != NO_DOCUMENT

    def plan(self, key: Hashable, build: Callable[[], Plan]) -> Plan:
        """An engine's masks for this layout: built by the first layer that asks, shared by the others."""
        if key not in self._plans:
            self._plans[key] = build()
        return self._plans[key]  # type: ignore[return-value]

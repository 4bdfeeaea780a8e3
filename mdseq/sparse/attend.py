"""The one call of the library."""

from __future__ import annotations

from torch import Tensor

from mdseq.sparse.banded import attend_banded
from mdseq.sparse.documents import Layout
from mdseq.sparse.pattern import Pattern
from mdseq.sparse.reference import attend_reference

ENGINES = {"auto": attend_banded, "banded": attend_banded, "reference": attend_reference}


def attend(
    q_bshd: Tensor, k_bshd: Tensor, v_bshd: Tensor, pattern: Pattern, layout: Layout, engine: str = "auto"
) -> Tensor:
    """Attention over the keys that `pattern` and `layout` make visible.

    Args:
        q_bshd, k_bshd, v_bshd: [b, s, h, d], the row's global slots first (`layout.num_global` of them).
        pattern: Window and dilation of this layer.
        layout: Documents of the slots; shared by all layers of a batch, so that masks are built once.
        engine: A key of ENGINES; all give the same answer.

    Returns:
        [b, s, h, d]; zero at slots that hold nothing.
    """
    return ENGINES[engine](q_bshd, k_bshd, v_bshd, pattern, layout)

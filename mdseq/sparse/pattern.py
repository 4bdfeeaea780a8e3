"""What a query may see: a sliding window, dilated, or everything, always within its document."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pattern:
    """One layer's sparsity (Longformer, arXiv 2004.05150).

    A token at index i of its row sees the tokens j of its document with |i - j| <= window * dilation and
    (i - j) % dilation == 0, and the global slots of its document. A global slot sees its whole document.

    Attributes:
        window: Keys per side, or None for the whole document.
        dilation: Gap between the keys of the window.
    """

    window: int | None
    dilation: int = 1

    def __post_init__(self) -> None:
        assert self.window is None or self.window >= 1, f"window = {self.window}"
        assert self.dilation >= 1, f"dilation = {self.dilation}"

    @property
    def reach(self) -> int | None:
        """The largest distance between a token and a key of its window; None without a limit."""
        return None if self.window is None else self.window * self.dilation

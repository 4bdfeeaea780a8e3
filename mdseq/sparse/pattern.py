"""What a query may see: a sliding window, dilated, or everything, always within its document."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pattern:
    """One layer's sparsity (Longformer, arXiv 2004.05150, section 3.1).

    A token sees the tokens of its document that are at most `window` steps of `dilation` to either side of it, and the
    global slots of its document; a global slot sees its whole document. Distances are counted over tokens alone:
    global slots stand outside the sequence (see `Layout`).

    Attributes:
        window: Keys per side, or None for the whole document.
        dilations: Gap between the keys of the window, of each of as many equal groups of heads.

    Raises:
        ValueError: For a window or a dilation below 1.
    """

    window: int | None
    dilations: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window = {self.window}; give at least 1 key per side, or None for the whole document")
        if not self.dilations or min(self.dilations) < 1:
            raise ValueError(f"dilations = {self.dilations}; give at least one, each 1 or more")

    @property
    def reach(self) -> int | None:
        """The largest distance between a token and a key of its window; None without a limit."""
        return None if self.window is None else self.window * max(self.dilations)

    def groups(self, num_heads: int) -> list[tuple[slice, int]]:
        """The heads of each dilation, in order.

        Raises:
            ValueError: If the heads cannot be shared out evenly.
        """
        if num_heads % len(self.dilations):
            raise ValueError(f"{num_heads} heads do not divide into {len(self.dilations)} groups, one per dilation")
        size = num_heads // len(self.dilations)
        return [(slice(i * size, (i + 1) * size), dilation) for i, dilation in enumerate(self.dilations)]

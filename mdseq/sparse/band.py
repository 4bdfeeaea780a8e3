"""The window of one dilation as blocks of queries and the stretches of keys that they meet.

Shapes: s slots of a row, g global slots, h heads, e head dimension, r residues (= dilation), j tokens of a residue
class, x blocks of a tile, c block length, k keys that a block meets.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mdseq.sparse.documents import NO_DOCUMENT, Layout
from mdseq.sparse.tiles import (
    TILE_SCORES,
    Heads,
    KeyValue,
    Shared,
    Sliding,
    Source,
    add_gradients,
    attend_tile,
    head_groups,
)

MIN_BLOCK, MAX_BLOCK = 32, 128
MAX_SHARED_GLOBALS = 64
# Several heads at a time need a copy of their overlapping keys, which pays for itself where one has fewer scores.
SMALL_TILE_SCORES = 2**18


@dataclass(frozen=True)
class BandTile:
    """Consecutive blocks of one residue class of a row.

    Attributes:
        queries: Tokens of the class, a whole number of blocks.
        window: Keys of their windows, as rows of a buffer that begins `halo` tokens before the first.
        shared: Global slots of their documents; None where they have none.
    """

    residue: int
    queries: slice
    window: Sliding
    shared: Shared | None


@dataclass(frozen=True)
class Band:
    """The tiles of a batch's window attention.

    A block of queries needs the keys of `halo` tokens of its residue class on either side, and no others. Beyond the
    first and last token that a process holds, the buffers of keys have room for these halos; they hold nothing, since
    here a process holds rows whole.

    Attributes:
        num_global: Global slots of a row, which come before its tokens (g).
        dilation: Residue classes (r).
        block: Queries of a block (c).
        halo: Keys that a block meets on either side of its own, at most the window.
        length: Tokens of a residue class, filled up to whole blocks (j).
        tiles: Of each row.
    """

    num_global: int
    dilation: int
    block: int
    halo: int
    length: int
    tiles: tuple[tuple[BandTile, ...], ...]

    @classmethod
    def of(cls, layout: Layout, window: int, dilation: int) -> Band:
        g, device = layout.num_global, layout.document_bs.device
        document_bs = layout.document_bs.cpu().numpy()
        classes = [[row[g + r :: dilation] for r in range(dilation)] for row in document_bs]
        # A document shorter than the window needs no keys beyond its own.
        longest = max(_longest(document_j) for row in classes for document_j in row)
        halo = min(window, max(longest - 1, 0))
        block = min(MAX_BLOCK, max(MIN_BLOCK, 1 << max(halo // 2 - 1, 0).bit_length()))
        length = -(-len(classes[0][0]) // block) * block

        distance_ck = np.abs(np.arange(block)[:, None] + halo - np.arange(block + 2 * halo))
        band_ck = _bias(distance_ck <= halo).to(device)
        tiles: list[tuple[BandTile, ...]] = []
        for owner_g, residues in zip(document_bs[:, :g], classes, strict=True):
            row = (_Class.of(document_j, owner_g, block, halo, length) for document_j in residues)
            tiles.append(tuple(tile for residue, one in enumerate(row) for tile in one.tiles(residue, band_ck)))
        return cls(g, dilation, block, halo, length, tuple(tiles))

    @property
    def most_shared(self) -> int:
        """The most global slots that a tile's queries meet."""
        return max((tile.shared.length for row in self.tiles for tile in row if tile.shared), default=0)

    def blocks(self, x_rhje: Tensor, tile: BandTile, heads: slice) -> Tensor:
        """The tile's queries in a buffer without halos, [h, x, c, e]: a view."""
        return x_rhje[tile.residue, heads, tile.queries].unflatten(1, (-1, self.block))

    def classes(self, x_she: Tensor, x_rhje: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Views of the same tokens among all slots and in a buffer, with or without halos, by residue class."""
        halo = self.halo if x_rhje.shape[2] > self.length else 0
        for residue in range(self.dilation):
            tokens_hje = x_she[self.num_global + residue :: self.dilation].transpose(0, 1)
            yield tokens_hje, x_rhje[residue, :, halo : halo + tokens_hje.shape[1]]


class Buffers:
    """Memory that one head after another uses, since fresh memory costs as much as the work that is done in it.

    A buffer holds tokens by residue class and head, [r, h, j, e], or with a halo on either side,
    [r, h, halo + j + halo, e]. Halos, and rows beyond the last token, are zero.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.Size, int], Tensor] = {}

    def load(self, name: str, band: Band, x_she: Tensor, halo: int = 0) -> Tensor:
        """A buffer with the tokens of some heads."""
        x_rhje = self._buffer(name, band, x_she, halo)
        for tokens_hje, class_hje in band.classes(x_she, x_rhje):
            class_hje.copy_(tokens_hje)
        return x_rhje

    def zeros(self, name: str, band: Band, like_she: Tensor, halo: int = 0) -> Tensor:
        return self._buffer(name, band, like_she, halo).zero_()

    def _buffer(self, name: str, band: Band, like_she: Tensor, halo: int) -> Tensor:
        key = (name, like_she.shape, band.dilation)
        if key not in self._buffers:
            _, h, e = like_she.shape
            shape = (band.dilation, h, halo + band.length + halo, e)
            # Rows behind the last, which scores may be computed of before those of global keys take their place.
            memory = like_she.new_zeros(math.prod(shape) + band.most_shared * e)
            self._buffers[key] = memory[: math.prod(shape)].view(shape)
        return self._buffers[key]


def attend_band(band: Band, row: int, heads: Heads, out_she: Tensor, buffers: Buffers) -> None:
    """Write the output of a row's token slots; of those that hold nothing, anything finite."""
    q_rhje, kv_rhje = buffers.load("q", band, heads.q), _load_keys(band, heads, buffers)
    out_rhje = buffers.zeros("out", band, out_she)
    for tile, some in _tiles(band, row, q_rhje.shape[1]):
        out_hxce = attend_tile(band.blocks(q_rhje, tile, some), _sources(tile, some, kv_rhje, heads))
        band.blocks(out_rhje, tile, some).copy_(out_hxce)
    _store(band, out_rhje, out_she)


def add_band_gradients(
    band: Band, row: int, heads: Heads, out_she: Tensor, grad_she: Tensor, totals: Heads, buffers: Buffers
) -> None:
    """Write the gradients of a row's token slots, and add to those of its global slots.

    Args:
        grad_she: Gradient of the output; zero where a slot holds nothing.
    """
    q_rhje, kv_rhje = buffers.load("q", band, heads.q), _load_keys(band, heads, buffers)
    grad_rhje = buffers.load("grad", band, grad_she)
    delta_rhj1 = (grad_rhje * buffers.load("out", band, out_she)).sum(dim=-1, keepdim=True)
    grad_q_rhje = buffers.zeros("grad q", band, heads.q)
    total_rhje = KeyValue(*(buffers.zeros(f"grad {x}", band, heads.k, band.halo) for x in "kv"))
    for tile, some in _tiles(band, row, q_rhje.shape[1]):
        q_hxce, grad_hxce, delta_hxc1 = (band.blocks(x, tile, some) for x in (q_rhje, grad_rhje, delta_rhj1))
        sources = _sources(tile, some, kv_rhje, heads)
        sums = [rows for _, rows in _sources(tile, some, total_rhje, totals)]
        band.blocks(grad_q_rhje, tile, some).copy_(add_gradients(q_hxce, grad_hxce, delta_hxc1, sources, sums))
    for x_rhje, total_she in ((grad_q_rhje, totals.q), (total_rhje.k, totals.k), (total_rhje.v, totals.v)):
        _store(band, x_rhje, total_she)


def _load_keys(band: Band, heads: Heads, buffers: Buffers) -> KeyValue:
    return KeyValue(buffers.load("k", band, heads.k, band.halo), buffers.load("v", band, heads.v, band.halo))


def _store(band: Band, x_rhje: Tensor, into_she: Tensor) -> None:
    for tokens_hje, class_hje in band.classes(into_she, x_rhje):
        tokens_hje.copy_(class_hje)


def _tiles(band: Band, row: int, num_heads: int) -> Iterator[tuple[BandTile, slice]]:
    for tile in band.tiles[row]:
        num_keys = tile.window.length + (tile.shared.length if tile.shared else 0)
        scores = (tile.queries.stop - tile.queries.start) * num_keys
        for some in head_groups(num_heads, scores, SMALL_TILE_SCORES):
            yield tile, some


def _sources(tile: BandTile, some: slice, kv_rhje: KeyValue, heads: Heads) -> list[Source]:
    at = tile.residue, some
    sources: list[Source] = [(tile.window, KeyValue(kv_rhje.k[at], kv_rhje.v[at]))]
    if tile.shared is not None:
        sources.append((tile.shared, heads.keys(some)))
    return sources


@dataclass(frozen=True)
class _Class:
    """One residue class of one row, filled up to whole blocks, and what each of its blocks needs."""

    document_xc: np.ndarray
    first_key_xc: np.ndarray
    last_key_xc: np.ndarray
    owner_g: np.ndarray
    halo: int

    @classmethod
    def of(cls, document_j: np.ndarray, owner_g: np.ndarray, block: int, halo: int, length: int) -> _Class:
        first_j, last_j = _extent(document_j)
        token_j = np.arange(length)
        filled_j = np.full(length, NO_DOCUMENT)
        filled_j[: len(document_j)] = document_j
        first_key_j, last_key_j = token_j - halo, token_j + halo
        first_key_j[: len(document_j)] = np.maximum(first_key_j[: len(document_j)], first_j)
        last_key_j[: len(document_j)] = np.minimum(last_key_j[: len(document_j)], last_j)
        # Unused global slots come last.
        owner_g = np.where(owner_g == NO_DOCUMENT, np.iinfo(owner_g.dtype).max, owner_g)
        shape = (-1, block)
        return cls(filled_j.reshape(shape), first_key_j.reshape(shape), last_key_j.reshape(shape), owner_g, halo)

    def tiles(self, residue: int, band_ck: Tensor) -> Iterator[BandTile]:
        block, num_keys = band_ck.shape
        real_xc = self.document_xc != NO_DOCUMENT
        token_xc = np.arange(real_xc.size).reshape(real_xc.shape)
        reaches_xc = (self.first_key_xc == token_xc - self.halo) & (self.last_key_xc == token_xc + self.halo)
        inner_x = (real_xc & reaches_xc).all(axis=1)
        # Documents of a block, and with them its global slots, are neighbours.
        first_document_x = np.where(real_xc, self.document_xc, np.iinfo(self.document_xc.dtype).max).min(axis=1)
        last_document_x = self.document_xc.max(axis=1)
        first_global_x = np.searchsorted(self.owner_g, first_document_x, side="left")
        stop_global_x = np.searchsorted(self.owner_g, last_document_x, side="right")

        filled_x = np.flatnonzero(real_xc.any(axis=1)).tolist()
        most_blocks = max(1, TILE_SCORES // (block * num_keys))
        while filled_x:
            first = filled_x[0]
            few_globals = max(MAX_SHARED_GLOBALS, stop_global_x[first] - first_global_x[first])
            count = 1
            while (
                count < min(most_blocks, len(filled_x))
                and filled_x[count] == first + count
                and stop_global_x[first + count] - first_global_x[first] <= few_globals
            ):
                count += 1
            filled_x = filled_x[count:]
            blocks = slice(first, first + count)
            inner = inner_x[blocks].all()
            window_bias = band_ck if inner else self._window_bias(blocks, num_keys).to(band_ck.device)
            rows = slice(int(first_global_x[first]), int(stop_global_x[first + count - 1]))
            shared = Shared(rows, self._global_bias(blocks, rows, band_ck.device)) if rows.start < rows.stop else None
            yield BandTile(
                residue,
                queries=slice(first * block, (first + count) * block),
                window=Sliding(first * block, block, num_keys, window_bias),
                shared=shared,
            )

    def _window_bias(self, blocks: slice, num_keys: int) -> Tensor:
        """[x, c, k]; a slot without a document sees everything, which keeps softmax finite."""
        document_xc = self.document_xc[blocks]
        block = document_xc.shape[1]
        first_key_x11 = (np.arange(blocks.start, blocks.stop) * block - self.halo)[:, None, None]
        key_x1k = first_key_x11 + np.arange(num_keys)
        seen_xck = (self.first_key_xc[blocks][..., None] <= key_x1k) & (key_x1k <= self.last_key_xc[blocks][..., None])
        return _bias(seen_xck | (document_xc == NO_DOCUMENT)[..., None])

    def _global_bias(self, blocks: slice, rows: slice, device: torch.device) -> Tensor | None:
        """[x, c, g]; None where the global slots are those of all queries."""
        document_xc1 = self.document_xc[blocks][..., None]
        seen_xcg = (document_xc1 == self.owner_g[rows]) | (document_xc1 == NO_DOCUMENT)
        return None if seen_xcg.all() else _bias(seen_xcg).to(device)


def _extent(document_j: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and last token of each token's document; itself where there is none."""
    token_j = np.arange(len(document_j))
    start_n = np.concatenate([[0], np.flatnonzero(np.diff(document_j)) + 1])
    length_n = np.diff(np.append(start_n, len(document_j)))
    first_j, last_j = np.repeat(start_n, length_n), np.repeat(start_n + length_n - 1, length_n)
    real_j = document_j != NO_DOCUMENT
    return np.where(real_j, first_j, token_j), np.where(real_j, last_j, token_j)


def _longest(document_j: np.ndarray) -> int:
    first_j, last_j = _extent(document_j)
    return int((last_j - first_j + 1).max(initial=0))


def _bias(seen: np.ndarray) -> Tensor:
    return torch.from_numpy(np.where(seen, np.float32(0), np.float32(-np.inf)))

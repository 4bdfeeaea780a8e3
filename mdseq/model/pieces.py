"""Weights cut into pieces over many files, written without a second copy in memory and read back in any other cut.

Files are safetensors: flat tensors, and in the header which values of which weight lie where in them.
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_PIECES, _SHAPES = "pieces", "shapes"
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64"}
_CHUNK_BYTES = 2**24


@dataclass(frozen=True)
class Piece:
    """Consecutive values of one weight, as they lie in a flat tensor.

    Attributes:
        name: The weight's, in the plain PyTorch module.
        start: First of its values, of the flattened weight.
        numel: How many.
        offset: Where the first lies in the flat tensor.
    """

    name: str
    start: int
    numel: int
    offset: int


@dataclass(frozen=True)
class FileDigest:
    """What a file must be to be the one that was written."""

    num_bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Self:
        """Of a file that lies on the disk."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(path.stat().st_size, digest)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> FileDigest:
    """Write a safetensors file, down to the disk. `safetensors.save_file` would first copy everything in memory."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:

        def write(content: bytes | memoryview) -> None:
            for first in range(0, len(content), _CHUNK_BYTES):
                chunk = content[first : first + _CHUNK_BYTES]
                digest.update(chunk)
                while chunk:
                    chunk = chunk[file.write(chunk) :]

        write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors.values():
            write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        os.fsync(file.fileno())
    return FileDigest(8 + len(encoded) + end, digest.hexdigest())


def write_pieces(
    path: Path,
    states: Mapping[str, Iterable[Tensor]],
    pieces: Iterable[Iterable[Piece]],
    shapes: Mapping[str, Sequence[int]],
) -> FileDigest:
    """Write flat tensors of one or more states of the weights, all cut in the same way.

    Args:
        path: The file.
        states: For each state (weights, moments, ...) its flat tensors.
        pieces: For each flat tensor what lies in it.
        shapes: Of the weights that they are pieces of, whole.
    """
    tensors = {f"{state}.{i}": flat for state, flats in states.items() for i, flat in enumerate(flats)}
    cut = [[astuple(piece) for piece in of_one] for of_one in pieces]
    return write_tensors(path, tensors, {_PIECES: json.dumps(cut), _SHAPES: json.dumps(shapes)})


class PiecedWeights:
    """The pieces of one or more files, as whole weights. A context: the files are open inside.

    Raises:
        ValueError: A file is damaged, or a piece is missing.
        OSError: A file cannot be read.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._stack = ExitStack()
        self._pieces: dict[str, list[tuple[int, int, Any, str, int]]] = {}
        self._shapes: dict[str, torch.Size] = {}
        for path in files:
            try:
                opened = self._stack.enter_context(safe_open(path, "pt"))
                cut = json.loads(opened.metadata()[_PIECES])
                self._shapes |= {n: torch.Size(s) for n, s in json.loads(opened.metadata()[_SHAPES]).items()}
            except (SafetensorError, KeyError, TypeError, ValueError) as error:
                self._stack.close()
                raise ValueError(f"{path} holds no pieces of weights: {error}") from None
            for index, pieces in enumerate(cut):
                for name, start, numel, offset in pieces:
                    self._pieces.setdefault(name, []).append((start, numel, opened, str(index), offset))
        for found in self._pieces.values():
            found.sort(key=lambda piece: piece[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def shapes(self) -> dict[str, torch.Size]:
        """Of every weight."""
        return dict(self._shapes)

    def read(self, state: str, name: str, start: int, numel: int) -> Tensor:
        """Values of a weight, flat, from `start` of the flattened weight on."""
        values, end, at = torch.empty(numel), start + numel, start
        pieces = self._pieces.get(name, [])
        first = max(bisect_right(pieces, start, key=lambda piece: piece[0]) - 1, 0)
        for piece_start, piece_numel, opened, index, offset in pieces[first:]:
            upto = min(end, piece_start + piece_numel)
            if piece_start > at or at == end:
                break
            if upto > at:
                within = offset + at - piece_start
                values[at - start : upto - start] = opened.get_slice(f"{state}.{index}")[within : within + upto - at]
                at = upto
        if at < end:
            raise ValueError(f"values {at} to {end} of {name} are missing")
        return values

    def whole(self, state: str, name: str, shape: torch.Size) -> Tensor:
        """A weight."""
        return self.read(state, name, 0, shape.numel()).view(shape)

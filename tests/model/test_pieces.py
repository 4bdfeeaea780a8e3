"""Weights that were cut in one way are read back in any other."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from mdseq.model.pieces import FileDigest, Piece, PiecedWeights, write_pieces, write_tensors

SHAPES = {"a": torch.Size([7, 3]), "b": torch.Size([5])}


def weights(state: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(state))
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def write_cut(folder: Path, borders: list[int], num_files: int, skip: int = -1) -> list[Path]:
    """All values one after another, cut at the borders and dealt to files, with padding; one piece may be left out."""
    places = [(name, i) for name, shape in SHAPES.items() for i in range(shape.numel())]
    ends = sorted({border for border in borders if border < len(places)} | {21, len(places)})
    flats: list[dict[str, list[torch.Tensor]]] = [{"weights": [], "average": []} for _ in range(num_files)]
    pieces: list[list[list[Piece]]] = [[] for _ in range(num_files)]
    start = 0
    for index, end in enumerate(ends):
        name, first = places[start]
        if index != skip:
            for state, flat in flats[index % num_files].items():
                values = weights(state)[name].flatten()[first : first + end - start]
                flat.append(torch.cat([torch.full((2,), 9.0), values, torch.full((1,), 9.0)]))
            pieces[index % num_files].append([Piece(name, first, end - start, offset=2)])
        start = end
    files = [folder / f"{i}.safetensors" for i in range(num_files)]
    for path, of_file, cut in zip(files, flats, pieces, strict=True):
        write_pieces(path, of_file, cut, SHAPES)
    return files


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(borders=st.lists(st.integers(1, 25), max_size=8), num_files=st.integers(1, 4), data=st.data())
def test_any_part_is_read_from_any_cut(tmp_path: Path, borders: list[int], num_files: int, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(list(SHAPES)))
    start = data.draw(st.integers(0, SHAPES[name].numel()))
    numel = data.draw(st.integers(0, SHAPES[name].numel() - start))
    with PiecedWeights(write_cut(tmp_path, borders, num_files)) as saved:
        assert saved.shapes() == SHAPES
        for state in ("weights", "average"):
            assert torch.equal(saved.whole(state, name, SHAPES[name]), weights(state)[name])
            part = weights(state)[name].flatten()[start : start + numel]
            assert torch.equal(saved.read(state, name, start, numel), part)


@pytest.mark.parametrize("skip", range(4))
def test_a_missing_piece_is_named(tmp_path: Path, skip: int) -> None:
    files = write_cut(tmp_path, [4, 10], 2, skip)
    lost, first = [("a", 0), ("a", 4), ("a", 10), ("b", 0)][skip]
    with PiecedWeights(files) as saved:
        with pytest.raises(ValueError, match=rf"values {first} to \d+ of {lost} are missing"):
            saved.whole("weights", lost, SHAPES[lost])
        if first:
            assert torch.equal(saved.read("weights", lost, 0, first), weights("weights")[lost].flatten()[:first])


@pytest.mark.parametrize("content", [b"", b"not a file of tensors", b"\0" * 100])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rank-0000.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="rank-0000"):
        PiecedWeights([path])


def test_files_are_those_that_safetensors_reads_and_their_digests_true(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 4), "b": torch.arange(5), "none": torch.zeros(0, 3), "one": torch.tensor(2.5),
        "half": torch.randn(4).bfloat16(), "turned": torch.randn(3, 4).T, "large": torch.randn(2**22 + 1),
    }  # fmt: skip
    path = tmp_path / "tensors.safetensors"
    digest = write_tensors(path, tensors, {"format": "pt"})
    assert (
        digest == FileDigest.of(path) == FileDigest(path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    )
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)

"""The picture of a model's attention shows its masks, and its table what they cost."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import matplotlib.image
import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from rich.console import Console

from mdseq.report.attention import AttentionRow, attention_table, packed
from mdseq.report.attention_plot import plot_attention
from mdseq.report.masks import cells_of, pooled_mask
from mdseq.sparse import Pattern
from mdseq.sparse.reference import visible

HYBRID = (Pattern(6), Pattern(6, (1, 4)), Pattern(6), Pattern(None))


def row_of(
    patterns: tuple[Pattern, ...] = HYBRID, lengths: tuple[int, ...] = (100,), num_global: int = 2, marked: int = 0
) -> AttentionRow:
    documents = packed(lengths)
    documents = documents.marked(documents.position_bl < marked)
    return AttentionRow("a model", patterns, documents, num_global, num_heads=4, head_dim=16)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved, still whole."""
    figures: list[Figure] = []
    monkeypatch.setattr(plt, "close", figures.append)
    return figures


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=4),
    st.integers(0, 3),
    st.sampled_from([Pattern(None), Pattern(3, (2,)), Pattern(100, (3,)), Pattern(5)]),
    st.integers(1, 30),
)
def test_a_cell_holds_its_share_of_the_mask(lengths: list[int], num_global: int, pattern: Pattern, most: int) -> None:
    layout = packed(lengths).layout(num_global)
    document_s = layout.document_bs[0].numpy()
    cell_s = cells_of(len(document_s), layout.num_global, most)
    member_sc = np.eye(cell_s[-1] + 1)[cell_s]
    mask_ss = visible(pattern, layout, pattern.dilations[0])[0].numpy()
    expected = (member_sc.T @ mask_ss @ member_sc) / np.outer(member_sc.sum(0), member_sc.sum(0))
    found = pooled_mask(pattern, pattern.dilations[0], document_s, layout.num_global, cell_s)
    np.testing.assert_allclose(found, expected)


def test_global_slots_and_tokens_share_no_cell() -> None:
    cell_s = cells_of(num_slots=25, num_global=5, most=4)
    assert cell_s.tolist() == [0, 0, 1, 1, 2] + [3 + i // 5 for i in range(20)]
    assert cells_of(num_slots=3, num_global=0, most=4).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "row",
    [
        row_of(),
        row_of(lengths=(1,), num_global=0),
        row_of(lengths=(60, 1, 30), marked=3),
        row_of(lengths=(4, 3), marked=9),  # every token is global
        row_of(tuple(Pattern(2, (d,)) for d in range(1, 10)), lengths=(900,)),
        row_of((Pattern(None),), num_global=0),
    ],
    ids=["hybrid", "one token", "documents", "all global", "nine patterns", "full"],
)
def test_a_png_is_drawn_and_a_table_printed(tmp_path: Path, row: AttentionRow) -> None:
    path = tmp_path / "attention.png"
    plot_attention(row, path)
    pixels = matplotlib.image.imread(path)
    assert pixels.shape[0] > 600
    assert 1200 < pixels.shape[1] < 2000
    assert pixels[..., :3].std() > 0.05
    Console(width=110).print(attention_table(row))


def test_the_panels_say_what_they_show(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_attention(row_of(lengths=(70, 30)), tmp_path / "attention.png")
    (figure,) = drawn
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles[:-1] == [
        "layers 1 and 3\nwindow 6, dilation 1",
        "layer 2\nheads 1 to 2: window 6, dilation 1",
        "layer 2\nheads 3 to 4: window 6, dilation 4",
        "layer 4\nwhole document",
    ]
    assert titles[-1].startswith("Receptive field of a token in the middle")
    field = figure.axes[-1]
    assert [label.get_text() for label in field.get_yticklabels()] == [
        "after layer 1", "after layer 2", "from layer 3 on"
    ]  # fmt: skip
    assert [text.get_text() for text in field.texts] == ["13 tokens, 19%", "61 tokens, 87%", "70 tokens, 100%"]


@pytest.mark.parametrize(
    ("layers", "name"),
    [
        ([3], "layer 3"),
        ([1, 2], "layers 1 and 2"),
        ([1, 2, 3, 7, 8, 10], "layers 1 to 3, 7, 8 and 10"),
        (list(range(1, 13)), "layers 1 to 12"),
        (list(range(1, 40, 2)), "layers 1, 3, 5, 7, 9, 11, ... and 39"),
    ],
)
def test_layers_are_named_in_few_words(tmp_path: Path, drawn: list[Figure], layers: list[int], name: str) -> None:
    patterns = [Pattern(5) if layer in layers else Pattern(7) for layer in range(1, max(layers) + 1)]
    plot_attention(row_of(tuple(patterns), lengths=(30,)), tmp_path / "attention.png")
    assert f"{name}\nwindow 5, dilation 1" in [axis.get_title() for axis in drawn[0].axes]


def test_the_receptive_field_counts_windows_and_globals() -> None:
    row = row_of((Pattern(2), Pattern(2), Pattern(2, (8,))), lengths=(20, 50), num_global=1, marked=4)
    assert row.ordinary_tokens == 46
    assert [int(seen.sum()) for seen in row.seen_through_windows] == [5, 9, 41]
    assert [row.seen_with_globals(layer) for layer in range(3)] == [9, 50, 50]
    without = row_of((Pattern(2), Pattern(2)), lengths=(50,), num_global=0)
    assert [without.seen_with_globals(layer) for layer in range(2)] == [5, 9]


def test_the_costs_are_those_of_the_mask() -> None:
    row = row_of(lengths=(60, 40))
    for pattern, cost in zip(row.patterns, row.costs(), strict=True):
        masks = [visible(pattern, row.layout, dilation).sum() for dilation in pattern.dilations]
        pairs = float(sum(masks)) / len(masks)  # of one head, on average
        assert cost.pairs_per_token == pytest.approx(pairs / 100)
        assert cost.of_dense == pytest.approx(pairs / (62**2 + 42**2))
        assert cost.flops == pytest.approx(4 * 16 * 4 * pairs)


def test_the_table_has_a_line_a_layer_and_a_sum() -> None:
    console = Console(width=80, record=True, file=StringIO())
    console.print(attention_table(row_of()))
    lines = console.export_text().splitlines()
    assert "a model: attention over 100 tokens, one document" in lines[0]
    rows = {words[0]: words for words in (line.split() for line in lines) if words}
    assert rows["1"][1:4] == ["6", "1", "6"]
    assert rows["2"][1:6] == ["6", "1", "|", "4", "24"]
    assert rows["4"][1] == "all"
    assert {"3", "all"} <= rows.keys()

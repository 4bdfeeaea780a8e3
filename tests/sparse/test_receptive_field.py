"""The receptive field is what a product of the layers' masks reaches."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from mdseq.sparse import Documents, Pattern
from mdseq.sparse.receptive_field import reachable
from mdseq.sparse.reference import visible

patterns = st.builds(
    Pattern, window=st.none() | st.integers(1, 9), dilations=st.sampled_from([(1,), (2,), (3,), (1, 4), (5, 2)])
)


@given(st.integers(1, 60), st.lists(patterns, min_size=1, max_size=5), st.data())
def test_it_is_the_product_of_the_masks(length: int, layers: list[Pattern], data: st.DataObject) -> None:
    position = data.draw(st.integers(0, length - 1))
    layout = Documents.whole(torch.tensor([length]), length).layout()
    product = torch.eye(length, dtype=torch.long)
    for pattern, found in zip(layers, reachable(layers, length, position), strict=True):
        mask = torch.stack([visible(pattern, layout, dilation)[0] for dilation in pattern.dilations]).any(dim=0)
        product = ((mask.long() @ product) > 0).long()  # outputs of this layer, by inputs of the first
        assert found.tolist() == (product[position] > 0).tolist()


def test_dilation_leaves_gaps_until_another_layer_fills_them() -> None:
    sparse, filled = reachable([Pattern(2, (4,)), Pattern(2, (1,))], 41, 20)
    assert np.flatnonzero(sparse).tolist() == [12, 16, 20, 24, 28]
    assert np.flatnonzero(filled).tolist() == list(range(10, 31))


def test_the_order_of_the_layers_matters_where_a_long_step_would_leave_the_document() -> None:
    short, long = Pattern(1), Pattern(1, (3,))
    assert np.flatnonzero(reachable([short, long], 4, 1)[-1]).tolist() == [0, 1, 2]
    assert np.flatnonzero(reachable([long, short], 4, 1)[-1]).tolist() == [0, 1, 2, 3]

"""Layers divided among the pieces of a pipeline."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoo.plan.legal import ENDS
from zoo.plan.stages import layers_of_pieces


@given(st.integers(1, 200), st.data())
def test_every_layer_has_one_place_and_pieces_are_even(layers: int, data: st.DataObject) -> None:
    pieces = data.draw(st.integers(1, layers + ENDS))
    found = layers_of_pieces(layers, pieces)
    assert [layer for piece in found for layer in piece] == list(range(layers))
    # `zoo.plan.work`: the fullest stage has ceil(layers / pieces).
    assert {len(piece) for piece in found} <= {-(-layers // pieces), -(-layers // pieces) - 1}
    assert len(found) == pieces


@pytest.mark.parametrize(
    ("layers", "pieces", "sizes"),
    [
        (8, 4, [2, 2, 2, 2]),
        (7, 4, [2, 2, 2, 1]),  # the head stands for a layer
        (6, 4, [1, 2, 2, 1]),  # and the embedding
        (2, 4, [0, 1, 1, 0]),
        (61, 16, [3, *[4] * 13, 3, 3]),
    ],
)
def test_ends_have_less(layers: int, pieces: int, sizes: list[int]) -> None:
    assert [len(piece) for piece in layers_of_pieces(layers, pieces)] == sizes

"""Rows cut into pieces, and what cannot be computed on pieces."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.models import ATTENTION, small_spec
from tests.parallel.pool import Pool
from zoo.blocks.base import Context
from zoo.decoder import build
from zoo.parallel import World, parallelize
from zoo.parallel.context import Zigzag
from zoo.plan.layout import Layout
from zoo.spec.base import ConfigError


def pieces(degree: int) -> tuple[list[int], bool, list[list[int]]]:
    """The own tokens of 0 ... 4 n - 1, whether all pieces are found again, and own documents with one token more."""
    zigzag = Zigzag(World.of(Layout(cp=degree)).cp)
    row = torch.arange(4 * degree)[None]
    own = zigzag.take(row)
    whole = torch.cat(zigzag.gather(own[..., None].to(torch.float32)), 1)[..., 0]
    documents = zigzag.documents(row // 3, 1)
    assert documents is not None
    return own[0].tolist(), torch.equal(whole, row.to(torch.float32)), documents.tolist()


def test_a_process_has_an_early_piece_and_a_late_one(pool: Pool) -> None:
    found = pool.run(2, pieces, 2)
    assert [own for own, _, _ in found] == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert all(again for _, again, _ in found)
    assert [documents for _, _, documents in found] == [[[0, 0, 0], [1, 2, 2]], [[0, 0, 1], [1, 1, 1]]]


def logits(layout: Layout) -> Any:
    """Of all tokens, on every process."""
    torch.manual_seed(0)
    model = build(small_spec(init={"std": 0.2, "depth_scaled": False}))
    world = World.of(layout)
    if layout.num_devices > 1:
        parallelize(model, world)
    with torch.no_grad():
        return model(torch.arange(16).view(2, 8)).numpy()


@pytest.mark.parametrize("layout", [Layout(cp=2), Layout(cp=2, tp=2)], ids=str)
def test_logits_are_those_of_whole_rows(layout: Layout, pool: Pool) -> None:
    (expected,) = pool.run(1, logits, Layout())
    for found in pool.run(layout.num_devices, logits, layout):
        assert np.allclose(found, expected, rtol=1e-4, atol=1e-5)


LINEAR = {"type": "mamba1", "d_state": 4}
INDEXED = {**ATTENTION, "indexer": {"num_heads": 2, "head_dim": 8, "block_size": 2, "top_k": 1}}
GROWING = {"scaling": {"type": "dynamic", "factor": 2.0, "original_context": 16}}
REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"attention": LINEAR},
        "layers.1.mixer has Mamba1, which does not pass its state on: set cp to 1",
    ),
    ({"attention": INDEXED}, "layers.1.mixer has an indexer, which chooses among all keys of a row"),
    ({"attention": {**ATTENTION, "rope": GROWING}}, "layers.1.mixer has rope.scaling dynamic, which depends on"),
]


def refusal(changes: dict[str, Any]) -> str:
    try:
        parallelize(build(small_spec(**changes), device="meta"), World.of(Layout(cp=2)))
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("changes", "reason"), REFUSED, ids=lambda value: str(value)[:40])
def test_mixers_that_need_whole_rows_are_refused(changes: dict[str, Any], reason: str, pool: Pool) -> None:
    for message in pool.run(2, refusal, changes):
        assert reason in message


def refused_rows(changes: dict[str, Any], length: int, padded: bool, packed: bool) -> str:
    world = World.of(Layout(cp=2))
    model = parallelize(build(small_spec(**changes)), world)
    tokens = torch.zeros(1, length, dtype=torch.int64)
    context = Context.of(tokens)
    context.padding = torch.zeros(1, dtype=torch.int64) if padded else None
    context.documents = torch.zeros_like(tokens) if packed else None
    try:
        model.loss(tokens, tokens, context)
    except ConfigError as error:
        return str(error)
    return ""


CHUNKED = {"attention": {**ATTENTION, "mask": "chunked", "window": 4}}
CONV = {"attention": {"type": "short_conv", "width": 4}}


@pytest.mark.parametrize(
    ("changes", "length", "padded", "packed", "reason"),
    [
        ({}, 6, False, False, "train.seq_len: found 6; twice layout.cp, 4, must divide it"),
        ({}, 8, True, False, "layout.cp: found 2; rows with padding are not cut"),
        (CHUNKED, 8, False, True, "with several documents in a row, chunks are not counted across pieces"),
        (CONV, 8, False, False, "pieces of 2 tokens are shorter than the convolution's 3 earlier tokens"),
        (CHUNKED, 8, False, False, ""),
        (CONV, 16, False, True, ""),
    ],
)
def test_rows_that_cannot_be_cut_are_refused(
    changes: dict[str, Any], length: int, padded: bool, packed: bool, reason: str, pool: Pool
) -> None:
    for message in pool.run(2, refused_rows, changes, length, padded, packed):
        assert reason in message
        assert bool(reason) == bool(message)

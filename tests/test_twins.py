"""The tiny twin of every model: it keeps the model's kinds, learns, and decodes from a cache what whole passes give."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest
import torch

import zoo
from tests.models import tokens
from zoo.blocks.base import Context
from zoo.decoder import Decoder, build
from zoo.spec.model import ModelSpec
from zoo.spec.pattern import expand
from zoo.spec.twin import shrink


@cache
def twins() -> dict[str, ModelSpec]:
    """One model for each different twin: sizes of one family often share theirs."""
    found: dict[str, tuple[str, ModelSpec]] = {}
    for name in zoo.list_models():
        twin = shrink(zoo.load(name))
        found.setdefault(twin.replace(name="").model_dump_json(), (name, twin))
    return dict(found.values())


def test_every_twin_keeps_the_kinds_and_is_small() -> None:
    for name in zoo.list_models():
        spec = zoo.load(name)
        twin = shrink(spec)
        assert set(twin.layer_kinds) == set(spec.layer_kinds), name
        assert {slot: block.type for slot, block in twin.slots.items()} == {s: b.type for s, b in spec.slots.items()}
        assert twin.params().total < 3_000_000, name
        transitions = set(pairwise(spec.layer_kinds))
        assert set(pairwise(expand(twin.layers))) <= transitions, name


@pytest.mark.parametrize("name", twins())
def test_twins_learn(name: str) -> None:
    torch.manual_seed(0)
    model = build(twins()[name])
    text = torch.arange(33) * torch.arange(1, 5)[:, None] % 97  # four sequences that can be continued
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(20):
        loss = model.loss(text[:, :-1], text[:, 1:])
        loss.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.items["cross_entropy"]))
    assert losses[-1] < losses[0] - 0.3  # nats; models that scale logits down learn slowest


def stirred(spec: ModelSpec) -> Decoder:
    """A twin in fp64 whose biases, sinks and norms have left their start."""
    torch.manual_seed(0)
    model = build(spec, dtype=torch.float64).eval()
    with torch.no_grad():
        for value in [*model.parameters(), *model.buffers()]:
            if value.is_floating_point():
                value += 0.05 * torch.randn_like(value)
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", twins())
def test_cached_decoding_equals_the_whole_pass(name: str) -> None:
    """Across the end of the window (32) and into the next chunk, token by token."""
    model = stirred(twins()[name])
    ids = tokens(2, 40, model.spec.vocab_size)
    states, past, rows = model.new_states(2, 40), 0, []
    for piece in ids.split([28, *[1] * 12], 1):
        rows.append(model(piece, Context(torch.arange(past, past + piece.shape[1])[None], past), states))
        past += piece.shape[1]
    torch.testing.assert_close(torch.cat(rows, 1), model(ids), rtol=0, atol=1e-9)

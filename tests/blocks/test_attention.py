"""Attention against a plain loop over queries and heads, and cached decoding against the whole pass."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.blocks.attention import Attention
from zoo.blocks.base import Context, initialize
from zoo.spec.base import ConfigError
from zoo.spec.norm import NormSpec

D = 48
BASE: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
LONGROPE = {
    "type": "longrope",
    "factor": 2.0,
    "original_context": 6,
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one_kv_head": {"num_kv_heads": 1},
    "own_value_width": {"v_head_dim": 6},
    "biases": {"qkv_bias": True, "out_bias": True},
    "qk_norm_head": {"qk_norm": "head"},
    "qk_norm_full": {"qk_norm": "full"},
    "qk_norm_after_rope": {"qk_norm": "head", "qk_norm_after_rope": True},
    "qk_norm_weightless": {"qk_norm": "head", "qk_norm_weight": "none"},
    "v_norm": {"v_norm": True},
    "no_positions": {"rope": None},
    "interleaved": {"rope": {"layout": "interleaved", "theta": 50.0}},
    "partial": {"rope": {"fraction": 0.5}},
    "yarn": {"rope": {"scaling": {"type": "yarn", "factor": 4.0, "original_context": 8}}},
    "longrope": {"rope": {"scaling": LONGROPE}},
    "dynamic": {"rope": {"scaling": {"type": "dynamic", "factor": 4.0, "original_context": 6}}},
    "query_scale": {"query_scale": {"beta": 0.3, "original_context": 4, "shift": 1}},
    "sliding": {"mask": "sliding", "window": 3},
    "sliding_one": {"mask": "sliding", "window": 1},
    "sliding_wide": {"mask": "sliding", "window": 100},
    "chunked": {"mask": "chunked", "window": 4},
    "scale": {"scale": 0.7},
    "softcap": {"softcap": 2.0},
    "sink": {"sink": True},
    "sink_sliding": {"sink": True, "mask": "sliding", "window": 3},
    "gate_element": {"gate": "element"},
    "gate_head": {"gate": "head"},
    "gate_softplus": {"gate": "head", "gate_activation": "softplus"},
    "value_scale": {"value_scale": 0.7},
    "shared_kv": {"shared_kv": True, "v_norm": True, "qk_norm": "head"},
    "qkv_clip": {"qkv_clip": 0.5},
}


def make(name: str, **more: Any) -> Attention:
    attention = Attention(D, norm=NormSpec(weight="plus_one"), **{**BASE, **OPTIONS[name], **more}).double()
    initialize(attention, 0.3, 0.3)
    for parameter in attention.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return attention


def plain(block: Attention, x: Tensor) -> Tensor:
    """One row [s, d], query by query, head by head, in the order of the definition."""
    spec, length = block.spec, len(x)
    head_dim, v_dim, repeats = block.head_dim, block.v_head_dim, spec.num_heads // spec.num_kv_heads

    def clip(y: Tensor) -> Tensor:
        return y if spec.qkv_clip is None else y.clamp(-spec.qkv_clip, spec.qkv_clip)

    q, k = clip(block.q(x)), clip(block.k(x))
    v = k if block.v is None else clip(block.v(x))
    if spec.qk_norm == "full":
        q, k = block.q_norm(q), block.k_norm(k)
    q, k, v = q.view(length, -1, head_dim), k.view(length, -1, head_dim), v.view(length, -1, v_dim)
    if spec.v_norm:
        v = block.v_norm(v)
    if spec.qk_norm == "head" and not spec.qk_norm_after_rope:
        q, k = block.q_norm(q), block.k_norm(k)
    q, k = turn(block, q), turn(block, k)
    if spec.qk_norm == "head" and spec.qk_norm_after_rope:
        q, k = block.q_norm(q), block.k_norm(k)
    rows = []
    for i in range(length):
        heads = []
        for h in range(spec.num_heads):
            g = h // repeats
            first = 0
            if spec.mask == "sliding":
                first = max(0, i - spec.window + 1)
            if spec.mask == "chunked":
                first = i // spec.window * spec.window
            query = q[i, h]
            if spec.query_scale:
                rule = spec.query_scale
                query = query * (1 + rule.beta * math.log(1 + (i + rule.shift) // rule.original_context))
            scores = k[first : i + 1, g] @ query * (spec.scale or head_dim**-0.5)
            if spec.softcap:
                scores = spec.softcap * torch.tanh(scores / spec.softcap)
            weights = scores.exp()
            weights = weights / (weights.sum() + (block.sink[h].exp() if spec.sink else 0))
            heads.append(weights @ v[first : i + 1, g] * spec.value_scale)
        y = torch.stack(heads)
        if block.gate is not None:
            gate = block.gate(x[i]).view(spec.num_heads, -1)
            y = y * (torch.sigmoid(gate) if spec.gate_activation == "sigmoid" else torch.log1p(gate.exp()))
        rows.append(block.out(y.flatten()))
    return torch.stack(rows)


def turn(block: Attention, x: Tensor) -> Tensor:
    """Each pair of channels as a complex number, times e^(i * angle); the frequencies are tested elsewhere."""
    from zoo.blocks.rope import frequencies

    rope = block.spec.rope
    if rope is None:
        return x
    dim = rope.rotary_dim(block.head_dim)
    inv_freq, temperature = frequencies(rope, dim, len(x))
    angles = torch.arange(len(x), dtype=torch.float32)[:, None] * inv_freq
    spin = torch.complex(angles.cos() * temperature, angles.sin() * temperature).to(torch.complex128)[:, None]
    part = x[..., :dim]
    pairs = part.unflatten(-1, (2, -1)).mT if rope.layout == "half" else part.unflatten(-1, (-1, 2))
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * spin)
    turned = turned.mT.flatten(-2) if rope.layout == "half" else turned.flatten(-2)
    return torch.cat((turned, x[..., dim:]), -1)


TOLERANCE = {"softcap": 1e-6, "query_scale": 1e-6, "gate_softplus": 1e-5}
"""Computed in fp32 inside, as released models do."""


@pytest.mark.parametrize("name", OPTIONS)
def test_equals_the_definition(name: str) -> None:
    block, x = make(name), torch.randn(2, 11, D, dtype=torch.float64)
    expected = torch.stack([plain(block, row) for row in x])
    torch.testing.assert_close(block(x), expected, rtol=0, atol=TOLERANCE.get(name, 1e-10))


@pytest.mark.parametrize("pieces", [[11], [1] * 11, [4, 1, 1, 5], [6, 5]])
@pytest.mark.parametrize("name", OPTIONS)
def test_cached_equals_whole(name: str, pieces: list[int]) -> None:
    block, x = make(name), torch.randn(2, 11, D, dtype=torch.float64)
    if block._keeps_raw_keys:  # the frequencies of a growing sequence change: compare each end with its own whole
        pieces_ends = [sum(pieces[: i + 1]) for i in range(len(pieces))]
        expected = torch.cat(
            [block(x[:, :end])[:, end - n : end] for end, n in zip(pieces_ends, pieces, strict=True)], 1
        )
    else:
        expected = block(x)
    state = block.new_state(2, 11, x.device, x.dtype)
    past, rows = 0, []
    for piece in x.split(pieces, 1):
        positions = torch.arange(past, past + piece.shape[1])[None]
        rows.append(block(piece, Context(positions, past), state))
        past += piece.shape[1]
    torch.testing.assert_close(torch.cat(rows, 1), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("pieces", [[9], [5, 1, 3]])
@pytest.mark.parametrize("name", OPTIONS)
def test_left_padding_changes_nothing(name: str, pieces: list[int]) -> None:
    block = make(name)
    padding = torch.tensor([0, 3, 1])
    x = torch.randn(3, 9, D, dtype=torch.float64)
    state, past, rows = block.new_state(3, 9, x.device, x.dtype), 0, []
    for piece in x.split(pieces, 1):
        positions = (torch.arange(past, past + piece.shape[1])[None] - padding[:, None]).clamp_min(0)
        rows.append(block(piece, Context(positions, past, padding), state))
        past += piece.shape[1]
    y = torch.cat(rows, 1)
    for row, start in enumerate(padding.tolist()):
        if block._keeps_raw_keys and (start or len(pieces) > 1):
            continue  # the frequencies follow the longest row
        torch.testing.assert_close(y[row, start:], block(x[row, None, start:])[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["plain", "sliding", "chunked", "sink", "softcap", "qk_norm_full"])
def test_documents_of_a_row_do_not_see_each_other(name: str) -> None:
    block, x = make(name), torch.randn(1, 10, D, dtype=torch.float64)
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1, 1]])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    y = block(x, Context(positions, documents=documents))
    if name != "chunked":  # chunks are cut from the row's start
        expected = torch.cat((block(x[:, :4]), block(x[:, 4:])), 1)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
    changed = x.clone()
    changed[:, :4] += 1
    assert torch.equal(block(changed, Context(positions, documents=documents))[:, 4:], y[:, 4:])


def test_every_weight_learns() -> None:
    for name in OPTIONS:
        block = make(name)
        block(torch.randn(2, 7, D, dtype=torch.float64)).square().sum().backward()
        still = [
            key for key, parameter in block.named_parameters() if parameter.grad is None or not parameter.grad.any()
        ]
        # A weightless head norm removes scale, never direction: all matrices still learn.
        assert still == [], name


def test_plain_arguments_are_checked_like_a_file() -> None:
    with pytest.raises(ConfigError, match=r"AttentionSpec\.num_kv_heads: found 4; must divide num_heads \(7\)"):
        Attention(D, num_heads=7, num_kv_heads=4)
    with pytest.raises(ConfigError, match="num_head: found 4; unknown key of AttentionSpec; did you mean num_heads"):
        Attention(D, num_head=4, num_heads=4, num_kv_heads=4)

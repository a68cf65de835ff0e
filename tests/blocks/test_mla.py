"""Latent attention against a plain loop, against transformers, and cached decoding against the whole pass."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.blocks.mla_weights import BASE, D, both, hf_config, run_hf
from zoo.blocks.base import Context, initialize
from zoo.blocks.mla import MLA, softmax_scale
from zoo.blocks.rope import frequencies
from zoo.spec.base import ConfigError, decode
from zoo.spec.mla import MLASpec
from zoo.spec.norm import NormSpec

YARN: dict[str, Any] = {"type": "yarn", "factor": 8.0, "original_context": 8}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "q_latent": {"d_q_latent": 20},
    "interleaved": {"rope": {"layout": "interleaved", "theta": 50.0}},
    "turned_in_fp32": {"rope": {"layout": "interleaved", "arithmetic": "fp32"}},
    "turned_as_complex": {"rope_head_dim": 32, "rope": {"layout": "interleaved", "arithmetic": "complex"}},
    "no_positions": {"rope": None},
    "no_shared_key": {"rope": None, "rope_head_dim": 0},
    "yarn": {"rope": {"scaling": {**YARN, "mscale": 0.5, "mscale_all_dim": 0.7}}},
    "wide_values": {"v_head_dim": 30, "d_kv_latent": 8},
    "biases": {"latent_bias": True, "out_bias": True, "d_q_latent": 20},
    "latent_eps": {"latent_eps": 0.1},
    "query_scale": {"query_scale": {"beta": 0.3, "original_context": 4}},
    "scale": {"scale": 0.4},
    "gate_element": {"gate": "element"},
    "gate_head": {"gate": "head"},
    "indexed": {"indexer": {"num_heads": 16, "head_dim": 12, "top_k": 4}},
    "indexed_interleaved": {
        "d_q_latent": 20,
        "rope": {"layout": "interleaved"},
        "indexer": {"num_heads": 16, "head_dim": 12, "top_k": 4, "rope_layout": "interleaved"},
    },
    "indexed_no_positions": {"rope": None, "indexer": {"num_heads": 16, "head_dim": 4, "top_k": 3}},
}
IN_FP32 = {"query_scale", "gate_element", "gate_head", "turned_in_fp32", "turned_as_complex"}
"""Computed in fp32 inside, as released models do."""


def make(name: str, **more: Any) -> MLA:
    block = MLA(D, norm=NormSpec(weight="plus_one"), **{**BASE, **OPTIONS[name], **more}).double()
    initialize(block, 0.3, 0.3)
    for parameter in block.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return block


def plain(block: MLA, x: Tensor) -> Tensor:
    """One row [s, d], query by query, head by head, in the order of the definition."""
    spec, length = block.spec, len(x)
    latent = block.kv_norm(block.kv_down(x))
    q_source = x if spec.d_q_latent is None else block.q_norm(block.q_down(x))
    q = block.q(q_source).view(length, spec.num_heads, -1)
    k_still, v = (part(latent).view(length, spec.num_heads, -1) for part in (block.k, block.v))
    q_still, q_turned = q[..., : spec.nope_head_dim], turn(block, q[..., spec.nope_head_dim :])
    shared = None if block.k_shared is None else turn(block, block.k_shared(x)[:, None])[:, 0]
    rows = []
    for i in range(length):
        keys = chosen(block, x[: i + 1], q_source[i])
        heads = []
        for h in range(spec.num_heads):
            scores = k_still[keys, h] @ q_still[i, h]
            if shared is not None:
                scores = scores + shared[keys] @ q_turned[i, h]
            rule = spec.query_scale
            scores = scores * (1 + rule.beta * math.log(1 + i // rule.original_context) if rule else 1)
            heads.append((scores * softmax_scale(spec)).softmax(-1) @ v[keys, h])
        y = torch.stack(heads)
        if block.gate is not None:
            y = y * torch.sigmoid(block.gate(x[i])).view(spec.num_heads, -1)
        rows.append(block.out(y.flatten()))
    return torch.stack(rows)


@torch.no_grad()
def chosen(block: MLA, x: Tensor, q_source: Tensor) -> list[int]:
    """The keys, of those of x [n, d], that its last token attends to."""
    indexer, n = block.indexer, len(x)
    if indexer is None:
        return list(range(n))
    rule = indexer.spec
    k = turn(block, indexer.k_norm(indexer.k(x))[:, None], rule.rope_layout)[:, 0]
    q = torch.zeros(n, rule.num_heads, rule.head_dim, dtype=x.dtype)
    q[-1] = indexer.q(q_source).view(rule.num_heads, -1)
    q = turn(block, q, rule.rope_layout)[-1]
    weights = indexer.weights(x[-1])
    scores = [sum(float(w) * max(0.0, float(head @ key)) for w, head in zip(weights, q, strict=True)) for key in k]
    return sorted(sorted(range(n), key=lambda index: -scores[index])[: rule.top_k])


def turn(block: MLA, x: Tensor, layout: str | None = None) -> Tensor:
    """Each pair of the leading channels as a complex number, times e^(i * angle); frequencies are tested elsewhere."""
    rope, dim = block.spec.rope, block.spec.rope_head_dim
    if rope is None:
        return x
    inv_freq, temperature = frequencies(rope, dim, len(x))
    angles = torch.arange(len(x), dtype=torch.float32)[:, None] * inv_freq
    spin = torch.complex(angles.cos() * temperature, angles.sin() * temperature).to(torch.complex128)[:, None]
    half = (layout or rope.layout) == "half"
    pairs = x[..., :dim].unflatten(-1, (2, -1)).mT if half else x[..., :dim].unflatten(-1, (-1, 2))
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * spin)
    return torch.cat(((turned.mT if half else turned).flatten(-2), x[..., dim:]), -1)


@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_equals_the_definition(name: str) -> None:
    block, x = make(name), torch.randn(2, 11, D, dtype=torch.float64)
    expected = torch.stack([plain(block, row) for row in x])
    assert (block(x) - expected).abs().max() < (1e-5 if name in IN_FP32 else 1e-10)


@pytest.mark.parametrize("name", ["biases", "yarn", "indexed"])
def test_gradients_equal_those_of_the_definition(name: str) -> None:
    block, x = make(name), torch.randn(1, 9, D, dtype=torch.float64, requires_grad=True)
    trained = [weight for key, weight in block.named_parameters() if not key.startswith("indexer.")]
    grads = [torch.autograd.grad((y * y).sum(), [x, *trained]) for y in (block(x), plain(block, x[0]))]
    for found, expected in zip(*grads, strict=True):
        assert (found - expected).abs().max() < 1e-9 * expected.abs().max()


@pytest.mark.parametrize("pieces", [[11], [1] * 11, [6, 1, 1, 3], [2, 5, 4]], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_cached_decoding_equals_the_whole_pass(name: str, pieces: list[int]) -> None:
    block, x = make(name), torch.randn(2, 11, D, dtype=torch.float64)
    assert (in_pieces(block, x, pieces) - block(x)).abs().max() < 1e-9


@pytest.mark.parametrize("name", ["plain", "indexed", "gate_head", "indexed_no_positions"])
@torch.no_grad()
def test_padding_changes_nothing(name: str) -> None:
    block, x, padding = make(name), torch.randn(2, 11, D, dtype=torch.float64), torch.tensor([0, 4])
    alone = block(x[1:, 4:])
    for pieces in ([11], [1] * 11, [6, 1, 1, 3]):
        y = in_pieces(block, x, pieces, padding)
        assert torch.isfinite(y).all()
        assert (y[1:, 4:] - alone).abs().max() < 1e-9
        assert (y[:1] - block(x[:1])).abs().max() < 1e-9


@pytest.mark.parametrize("name", ["plain", "indexed", "indexed_no_positions"])
@torch.no_grad()
def test_documents_are_apart(name: str) -> None:
    block, x = make(name), torch.randn(1, 11, D, dtype=torch.float64)
    documents = torch.tensor([[0] * 3 + [1] * 8])
    positions = torch.cat((torch.arange(3), torch.arange(8)))[None]
    y = block(x, Context(positions, documents=documents))
    assert (y[:, :3] - block(x[:, :3])).abs().max() < 1e-9
    assert (y[:, 3:] - block(x[:, 3:])).abs().max() < 1e-9


def in_pieces(block: MLA, x: Tensor, pieces: list[int], padding: Tensor | None = None) -> Tensor:
    state = block.new_state(len(x), x.shape[1], x.device, x.dtype)
    outputs, past = [], 0
    for size in pieces:
        positions = torch.arange(past, past + size)[None]
        if padding is not None:
            positions = (positions - padding[:, None]).clamp_min(0)
        outputs.append(block(x[:, past : past + size], Context(positions, past, padding), state))
        past += size
    return torch.cat(outputs, 1)


@torch.no_grad()
def test_state_follows_the_rows() -> None:
    block, x = make("indexed"), torch.randn(3, 9, D, dtype=torch.float64)
    state, rows = block.new_state(3, 9, x.device, x.dtype), torch.tensor([2, 0])
    block(x[:, :8], Context(torch.arange(8)[None]), state)
    state.select(rows)
    y = block(x[rows, 8:], Context(torch.tensor([[8]]), 8), state)
    assert (y - block(x)[rows, 8:]).abs().max() < 1e-9


@torch.no_grad()
def test_what_is_remembered_of_a_token() -> None:
    """The released sizes: 512 + 64 numbers, as arXiv:2405.04434 says, and 128 of the index key."""
    sizes = {"num_heads": 2, "d_kv_latent": 512, "rope_head_dim": 64, "nope_head_dim": 128, "v_head_dim": 128}
    for indexer, expected in ((None, 576), ({"num_heads": 2, "head_dim": 128, "top_k": 8}, 704)):
        block, x = MLA(D, **sizes, indexer=indexer), torch.randn(1, 1, D)
        initialize(block, 0.02, 0.02)
        state = block.new_state(1, 4, x.device, x.dtype)
        block(x, None, state)
        assert sum(buffer.numel() for buffer in state.buffers) == 4 * expected


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_absorbed_equals_direct(data: st.DataObject) -> None:
    """Results and gradients, at any sizes."""
    size = st.integers(1, 6)
    heads, latent, nope, v, keys = (data.draw(size, label) for label in ("heads", "latent", "nope", "v", "keys"))
    rope, queries = 2 * data.draw(st.integers(0, 3), "rope"), data.draw(st.integers(1, keys), "queries")
    sizes = {"num_heads": heads, "d_kv_latent": latent, "nope_head_dim": nope, "v_head_dim": v}
    block = MLA(5, **sizes, rope_head_dim=rope, rope=None).double()
    initialize(block, 0.5, 0.5)
    q = torch.randn(2, queries, heads, nope + rope, dtype=torch.float64, requires_grad=True)
    memory = torch.randn(2, keys, latent + rope, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None, None]
    inputs = [q, memory, block.k.weight, block.v.weight]
    results = [block._attend(q, memory, mask, absorb) for absorb in (False, True)]
    assert (results[0] - results[1]).abs().max() < 1e-10
    grads = [torch.autograd.grad((y * y.detach()).sum(), inputs) for y in results]
    for direct, absorbed in zip(*grads, strict=True):
        assert (direct - absorbed).abs().max() < 1e-10


def test_absorbing_pays_for_few_queries() -> None:
    sizes = {"num_heads": 2, "d_kv_latent": 512, "rope_head_dim": 64, "nope_head_dim": 128, "v_head_dim": 128}
    with torch.device("meta"):
        block = MLA(D, **sizes)
    assert block.absorbing_pays(1, 2)
    assert block.absorbing_pays(1, 100_000)
    assert block.absorbing_pays(100, 100_000)
    assert not block.absorbing_pays(300, 100_000)
    assert not block.absorbing_pays(8, 8)


HF_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 16}
SCALED = {"type": "yarn", "factor": 8.0, "original_context": 16}
DEFAULT = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
INTERLEAVED = {"rope": {"layout": "interleaved"}}
LOW_RANK = {"q_lora_rank": 24}
FAMILIES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "deepseek_v2_lite": (
        "deepseek_v2",
        "DeepseekV2",
        {"rope_parameters": {**HF_YARN, "mscale": 0.707, "mscale_all_dim": 0.707}},
        {
            "rope": {
                "layout": "interleaved",
                "scaling": {**SCALED, "mscale": 0.707, "mscale_all_dim": 0.707},
                "arithmetic": "complex",
            }
        },
    ),
    "deepseek_v2": (
        "deepseek_v2",
        "DeepseekV2",
        {**DEFAULT, **LOW_RANK},
        {"rope": {"layout": "interleaved", "arithmetic": "complex"}, "d_q_latent": 24},
    ),
    "deepseek_v3": (
        "deepseek_v3",
        "DeepseekV3",
        {"rope_parameters": {**HF_YARN, "mscale": 0.8, "mscale_all_dim": 1.3}, **LOW_RANK, "attention_bias": True},
        {
            "rope": {"layout": "interleaved", "scaling": {**SCALED, "mscale": 0.8, "mscale_all_dim": 1.3}},
            "d_q_latent": 24,
            "latent_bias": True,
            "out_bias": True,
        },
    ),
    "deepseek_v3_half": ("deepseek_v3", "DeepseekV3", {**DEFAULT, "rope_interleave": False}, {}),
    "glm4_moe_lite": ("glm4_moe_lite", "Glm4MoeLite", {**DEFAULT, **LOW_RANK}, {**INTERLEAVED, "d_q_latent": 24}),
    "axk1": ("axk1", "AXK1", {**DEFAULT, **LOW_RANK}, {**INTERLEAVED, "d_q_latent": 24}),
    "mistral4": (
        "mistral4",
        "Mistral4",
        {
            "rope_parameters": {
                **HF_YARN,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
                "partial_rotary_factor": 0.4,
            },
            **LOW_RANK,
            "head_dim": 20,
            "qk_head_dim": 20,
        },
        {
            "rope": {"layout": "interleaved", "scaling": {**SCALED, "mscale": 1.0, "mscale_all_dim": 1.0}},
            "d_q_latent": 24,
            "query_scale": {"beta": 0.1, "original_context": 16},
        },
    ),
    "kimi_linear": ("kimi_linear", "KimiLinear", {}, {"rope": None}),
    "bailing_hybrid": ("bailing_hybrid", "BailingHybrid", DEFAULT, {**INTERLEAVED, "gate": "head"}),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_equals_transformers(family: str, dtype: torch.dtype) -> None:
    name, prefix, theirs, ours = FAMILIES[family]
    config = hf_config(name, prefix, **theirs)
    for batch_size, length in ((2, 40), (4, 5), (3, 28)):  # multiples of 4: all of a gate fits vector registers
        hf, block = both(name, prefix, config, dtype, **ours)
        x = torch.randn(batch_size, length, D, dtype=dtype)
        expected = run_hf(hf, name, prefix, config, x)
        assert (block(x) - expected).abs().max() < (1e-9 if dtype == torch.float64 else 1e-4) * expected.std()


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"rope": {"fraction": 0.5}}, r"rope\.fraction: found 0\.5; must be 1"),
    ({"rope_head_dim": 3}, r"rope_head_dim: found 3; must be even and at least 2"),
    ({"rope_head_dim": 0}, r"rope_head_dim: found 0; .* or set rope to null"),
    ({"rope": {"scaling": {"type": "dynamic", "factor": 2.0, "original_context": 8}}}, r"rope\.scaling\.type: found"),
    (
        {"indexer": {"num_heads": 2, "head_dim": 4, "top_k": 3}},
        r"indexer\.head_dim: found 4; must be at least rope_head",
    ),
    ({"indexer": {"num_heads": 2, "head_dim": 8, "top_k": 0}}, r"indexer\.top_k: found 0"),
    ({"rope": {"arithmetic": "complex"}}, r"rope\.arithmetic: found 'complex'; needs layout interleaved"),
    ({"d_kv_latnt": 8}, r"d_kv_latnt: .*d_kv_latent"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=str)
def test_mistakes_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MLA(D, **{**BASE, **options})


@pytest.mark.parametrize("name", OPTIONS)
def test_twins_keep_the_options(name: str) -> None:
    spec = decode(MLASpec, {**BASE, **OPTIONS[name]})
    twin = spec.shrunk(D)
    assert twin == decode(MLASpec, twin.to_dict())
    for option in ("latent_bias", "out_bias", "gate", "latent_eps"):
        assert getattr(twin, option) == getattr(spec, option)
    for option in ("rope", "query_scale", "indexer", "d_q_latent"):
        assert (getattr(twin, option) is None) == (getattr(spec, option) is None)

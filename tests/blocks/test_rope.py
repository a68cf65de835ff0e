"""Rotary embeddings: every scaling against transformers' frequencies, and what must hold for any rotation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from zoo.blocks.base import Context
from zoo.blocks.rope import frequencies, rotary_tables, rotate
from zoo.spec.base import decode
from zoo.spec.rope import RopeSpec

DIM, ORIGINAL = 32, 64
YARN: dict[str, Any] = {"type": "yarn", "factor": 8.0, "original_context": ORIGINAL}
LONGROPE: dict[str, Any] = {
    "type": "longrope",
    "factor": 4.0,
    "original_context": ORIGINAL,
    "short_factor": [1.0 + 0.1 * i for i in range(DIM // 2)],
    "long_factor": [2.0 + 0.5 * i for i in range(DIM // 2)],
}
CASES: list[tuple[dict[str, Any], int]] = [
    ({"type": "linear", "factor": 4.0}, 100),
    ({"type": "dynamic", "factor": 4.0, "original_context": ORIGINAL}, 40),
    ({"type": "dynamic", "factor": 4.0, "original_context": ORIGINAL}, 200),
    ({"type": "bands", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context": 512}, 100),
    (YARN, 100),
    ({**YARN, "truncate": False, "beta_fast": 16.0, "beta_slow": 2.0}, 100),
    ({**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}, 100),
    ({**YARN, "attention_factor": 1.3}, 100),
    (LONGROPE, 50),
    (LONGROPE, 100),
    ({"type": "proportional", "fraction": 0.25}, 100),
    ({"type": "proportional", "fraction": 0.5, "factor": 8.0}, 100),
]


def reference(scaling: dict[str, Any], theta: float, seq_len: int) -> tuple[torch.Tensor, float]:
    """The frequencies of transformers for the same settings."""
    names = {
        "type": "rope_type",
        "original_context": "original_max_position_embeddings",
        "fraction": "partial_rotary_factor",
    }
    parameters = {names.get(key, key): value for key, value in scaling.items()} | {"rope_theta": theta}
    kind = {"bands": "llama3"}.get(scaling["type"], scaling["type"])
    parameters["rope_type"] = kind
    context = ORIGINAL if scaling["type"] == "dynamic" else ORIGINAL * 4
    config = LlamaConfig(
        hidden_size=4 * DIM,
        num_attention_heads=4,
        max_position_embeddings=context,
        rope_parameters=parameters,
    )
    inv_freq, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=seq_len)
    return inv_freq, factor


@pytest.mark.parametrize(("scaling", "seq_len"), CASES)
def test_scaled_frequencies_equal_transformers(scaling: dict[str, Any], seq_len: int) -> None:
    spec = decode(RopeSpec, {"theta": 10_000.0, "scaling": scaling})
    inv_freq, temperature = frequencies(spec, DIM, seq_len)
    expected, factor = reference(scaling, 10_000.0, seq_len)
    torch.testing.assert_close(inv_freq, expected, rtol=1e-7, atol=0)
    assert temperature == pytest.approx(factor, rel=1e-12)


def test_ntk_alpha_changes_the_base() -> None:
    spec = decode(RopeSpec, {"theta": 10_000.0, "scaling": {"type": "ntk_alpha", "alpha": 1000.0}})
    plain = RopeSpec(theta=10_000.0 * 1000 ** (DIM / (DIM - 2)))
    torch.testing.assert_close(frequencies(spec, DIM, 0)[0], frequencies(plain, DIM, 0)[0])


def turned(x: torch.Tensor, positions: torch.Tensor, layout: str, dim: int) -> torch.Tensor:
    cos, sin = rotary_tables(RopeSpec(theta=100.0), dim, Context(positions))
    return rotate(x, cos, sin, layout)


@settings(deadline=None, max_examples=30)
@given(layout=st.sampled_from(["half", "interleaved"]), shift=st.integers(0, 1000), dim=st.sampled_from([2, 4, 6, 8]))
def test_products_depend_on_distance_alone(layout: str, shift: int, dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 5, 2, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    positions = torch.arange(5)[None]

    def products(moved: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bqhk,bnhk->bhqn", turned(q, moved, layout, dim), turned(k, moved, layout, dim))

    torch.testing.assert_close(products(positions), products(positions + shift), rtol=0, atol=5e-4)
    torch.testing.assert_close(turned(q, positions, layout, dim).norm(dim=-1), q.norm(dim=-1), rtol=0, atol=1e-6)
    assert torch.equal(turned(q, positions, layout, dim)[..., dim:], q[..., dim:])


def test_layouts_are_one_rotation_of_permuted_channels() -> None:
    x = torch.randn(2, 7, 3, 8)
    to_pairs = [0, 4, 1, 5, 2, 6, 3, 7]
    positions = torch.arange(7)[None]
    half = turned(x, positions, "half", 8)
    torch.testing.assert_close(turned(x[..., to_pairs], positions, "interleaved", 8), half[..., to_pairs])

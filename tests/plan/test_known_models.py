"""Released models written down by hand, against the counts of transformers on the meta device."""

from __future__ import annotations

from typing import Any

import pytest

from zoo.spec import ModelSpec, decode

SPARSE = {"kinds": {"sparse": {"mixer": "attention", "ffn": "moe"}}}
DENSE = {"kinds": {"dense": {"mixer": "attention", "ffn": "mlp"}}}


def attention(num_heads: int, num_kv_heads: int, **options: Any) -> dict[str, Any]:
    return {"attention": {"type": "gqa", "num_heads": num_heads, "num_kv_heads": num_kv_heads, **options}}


def moe(num_experts: int, top_k: int, d_expert: int, **options: Any) -> dict[str, Any]:
    sizes = {"num_experts": num_experts, "top_k": top_k, "d_expert": d_expert}
    return {"moe": {"type": "moe", **sizes, **options}, **SPARSE}


def mlp(d_ffn: int, **options: Any) -> dict[str, Any]:
    return {"mlp": {"type": "mlp", "d_ffn": d_ffn, **options}, **DENSE}


KNOWN: dict[str, tuple[int, int, str, dict[str, Any]]] = {
    "llama3_8b": (4096, 128256, "32*dense", attention(32, 8) | mlp(14336)),
    "mixtral_8x7b": (4096, 32000, "32*sparse", attention(32, 8) | moe(8, 2, 14336)),
    "qwen3_30b_a3b": (
        2048,
        151936,
        "48*sparse",
        attention(32, 4, head_dim=128, qk_norm="head") | moe(128, 8, 768),
    ),
    "olmoe_1b_7b": (2048, 50304, "16*sparse", attention(16, 16, qk_norm="full") | moe(64, 8, 1024)),
    "gpt_oss_20b": (
        2880,
        201088,
        "24*sparse",
        attention(64, 8, head_dim=64, qkv_bias=True, out_bias=True, sink=True)
        | moe(32, 4, 2880, bias=True, router={"type": "top_k", "score_chosen": True, "logit_bias": True}),
    ),
    "qwen1_5_moe_a2_7b": (
        2048,
        151936,
        "24*sparse",
        attention(16, 16, qkv_bias=True)
        | moe(60, 4, 1408, num_shared_experts=1, d_shared_expert=5632, shared_gate=True),
    ),
    "gpt2_small": (
        768,
        50257,
        "12*dense",
        attention(12, 12, qkv_bias=True, out_bias=True, rope=None)
        | mlp(3072, gated=False, bias=True)
        | {"norm": {"type": "layer", "bias": True}, "embedding": {"positions": 1024}, "head": {"tied": True}},
    ),
    "gemma2_2b": (
        2304,
        256000,
        "26*dense",
        attention(8, 4, head_dim=256) | mlp(9216) | {"norm_placement": "sandwich", "head": {"tied": True}},
    ),
}
MEASURED = {
    "llama3_8b": (8_030_261_248, 8_030_261_248),
    "mixtral_8x7b": (46_702_792_704, 12_879_925_248),
    "qwen3_30b_a3b": (30_532_122_624, 3_353_032_704),
    "olmoe_1b_7b": (6_919_161_856, 1_282_017_280),
    "gpt_oss_20b": (20_914_757_184, 4_187_440_704),
    "qwen1_5_moe_a2_7b": (14_315_784_192, 2_689_173_504),
    "gpt2_small": (124_439_808, 124_439_808),
    "gemma2_2b": (2_614_341_888, 2_614_341_888),
}
"""Total and active."""


@pytest.mark.parametrize("name", KNOWN)
def test_counts(name: str) -> None:
    d_model, vocab_size, layers, blocks = KNOWN[name]
    spec = decode(ModelSpec, {"d_model": d_model, "vocab_size": vocab_size, "layers": layers, **blocks})
    count = spec.params()
    assert (count.total, count.active) == MEASURED[name]


def test_a_block_of_multi_token_prediction() -> None:
    """That of the largest model here: attention without positions, then a latent mixture of experts."""
    latent = moe(
        512,
        22,
        5120,
        num_shared_experts=1,
        d_shared_expert=10240,
        d_latent=2048,
        activation="relu2",
        gated=False,
    )
    blocks = attention(64, 2, head_dim=128, rope=None) | latent
    kinds = {"attention": {"mixer": "attention"}, "sparse": {"ffn": "moe"}}
    mtp = {"layers": "attention sparse", "depth": 2, "shared": True}
    settings = {**blocks, "kinds": kinds, "layers": "attention sparse", "mtp": mtp}
    assert decode(ModelSpec, {"d_model": 8192, "vocab_size": 131072, **settings}).params().mtp == 11_215_609_856

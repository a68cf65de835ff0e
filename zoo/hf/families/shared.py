"""What families have in common: rows of config tables are in `zoo.hf.rows`, these are names of weights."""

from __future__ import annotations

from collections.abc import Iterator

from zoo.hf.weights import Experts, Same, WeightRow

LAYER = "model.layers.{n}"


def trunk_weights() -> Iterator[WeightRow]:
    """Embedding, head and the norms of a layer with norms before its two blocks."""
    yield Same("embed.weight", ("model.embed_tokens.weight",))
    yield Same("norm.weight", ("model.norm.weight",))
    yield Same("head.weight", ("lm_head.weight",))
    yield Same("layers.{n}.mixer_norm.weight", (f"{LAYER}.input_layernorm.weight",))
    yield Same("layers.{n}.ffn_norm.weight", (f"{LAYER}.post_attention_layernorm.weight",))


def attention_weights() -> Iterator[WeightRow]:
    """Separate projections, with their biases and norms."""
    for ours, theirs in {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "o_proj"}.items():
        for kind in ("weight", "bias"):
            yield Same(f"layers.{{n}}.mixer.{ours}.{kind}", (f"{LAYER}.self_attn.{theirs}.{kind}",))
    for norm in ("q_norm", "k_norm"):
        yield Same(f"layers.{{n}}.mixer.{norm}.weight", (f"{LAYER}.self_attn.{norm}.weight",))


def mlp_weights() -> Iterator[WeightRow]:
    """A gated MLP."""
    for part in ("gate", "up", "down"):
        for kind in ("weight", "bias"):
            yield Same(f"layers.{{n}}.ffn.{part}.{kind}", (f"{LAYER}.mlp.{part}_proj.{kind}",))


def moe_weights() -> Iterator[WeightRow]:
    """A router and gated experts, stored apart on the hub and stacked in the memory of transformers 5."""
    experts = f"{LAYER}.mlp.experts"
    each = f"{experts}.{{e}}"
    yield Same("layers.{n}.ffn.router.weight", (f"{LAYER}.mlp.gate.weight",))
    yield Experts(
        "layers.{n}.ffn.experts.gate_up",
        (f"{each}.gate_proj.weight", f"{each}.up_proj.weight"),
        f"{experts}.gate_up_proj",
    )
    yield Experts("layers.{n}.ffn.experts.down", (f"{each}.down_proj.weight",), f"{experts}.down_proj")

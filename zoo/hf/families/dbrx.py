"""DBRX."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from zoo.hf.family import Family, Slot
from zoo.hf.keys import Keys
from zoo.hf.layers import Always, Layers
from zoo.hf.rope import Rope
from zoo.hf.rows import Const, Field, Inert, Only, Tree
from zoo.hf.weights import Flat, Fused, JointRow, Same, WeightRow
from zoo.spec.attention import AttentionSpec
from zoo.spec.moe import MoESpec

_BLOCK = "transformer.blocks.{n}"


@dataclass(frozen=True)
class _Rope(Rope):
    """On the hub, the base stands in `attn_config`; the class in transformers reads `rope_parameters` alone."""

    def read(self, keys: Keys, model: Tree) -> None:
        theta = keys.take("attn_config.rope_theta", None)
        if keys.config.get("rope_parameters") is None and theta is not None:
            keys = Keys({**keys.config, "rope_theta": theta}, {})
        super().read(keys, model)

    def write(self, model: Tree, config: dict[str, Any]) -> None:
        super().write(model, config)
        config["attn_config.rope_theta"] = config["rope_parameters"]["rope_theta"]


def _weights() -> Iterator[WeightRow | JointRow]:
    yield Same("embed.weight", ("transformer.wte.weight",))
    yield Same("norm.weight", ("transformer.norm_f.weight",))
    yield Same("head.weight", ("lm_head.weight",))
    yield Same("layers.{n}.mixer_norm.weight", (f"{_BLOCK}.norm_attn_norm.norm_1.weight",))
    yield Same("layers.{n}.ffn_norm.weight", (f"{_BLOCK}.norm_attn_norm.norm_2.weight",))
    qkv = tuple(f"layers.{{n}}.mixer.{part}.weight" for part in "qkv")
    yield Fused(qkv, f"{_BLOCK}.norm_attn_norm.attn.Wqkv.weight")
    yield Same("layers.{n}.mixer.out.weight", (f"{_BLOCK}.norm_attn_norm.attn.out_proj.weight",))
    yield Same("layers.{n}.ffn.router.weight", (f"{_BLOCK}.ffn.router.layer.weight",))
    experts = f"{_BLOCK}.ffn.experts.mlp"
    yield Flat("layers.{n}.ffn.experts.gate_up", (f"{experts}.w1", f"{experts}.v1"))
    yield Flat("layers.{n}.ffn.experts.down", (f"{experts}.w2",), transposed=True)


DBRX = Family(
    model_type="dbrx",
    architecture="DbrxForCausalLM",
    slots={"attention": Slot(AttentionSpec), "moe": Slot(MoESpec)},
    layers=Layers(Always("attention"), Always("moe"), {"sparse": ("attention", "moe")}, count="n_layers"),
    rows=(
        Field("d_model", "d_model hidden_size"),
        Field("vocab_size", "vocab_size"),
        Field("card.context", "max_seq_len max_position_embeddings"),
        Const("norm.type", "layer"),
        Const("norm.eps", 1e-5),
        Field("init.std", "initializer_range"),
        Only("tie_word_embeddings", False),
        Field("attention.num_heads", "n_heads num_attention_heads"),
        Field("attention.num_kv_heads", "attn_config.kv_n_heads"),
        Inert("num_key_value_heads"),
        *(Only(f"{place}is_encoder_decoder", False) for place in ("", "attn_config.", "ffn_config.")),
        Field("attention.qkv_clip", "attn_config.clip_qkv"),
        _Rope(nested=True),
        Field("moe.num_experts", "ffn_config.moe_num_experts"),
        Field("moe.top_k", "ffn_config.moe_top_k"),
        Field("moe.d_expert", "ffn_config.ffn_hidden_size"),
        Field("moe.activation", "ffn_config.ffn_act_fn", {"silu": "silu", "gelu": "gelu"}, inside="name"),
        Const("moe.router.type", "top_k"),
        Field("moe.router.normalize", "ffn_config.moe_normalize_expert_weights", {1.0: True, None: False}),
        Const("moe.router.arithmetic", "model"),
        Field("moe.balance.aux_loss", "ffn_config.moe_loss_weight"),
        *(Inert(key) for key in ("ffn_config.hidden_size", "router_aux_loss_coef")),
        # They act in training alone.
        *(Inert(key) for key in ("attn_config.attn_pdrop", "emb_pdrop", "resid_pdrop", "ffn_config.moe_jitter_eps")),
    ),
    weights=tuple(_weights()),
    nested=("attn_config", "ffn_config"),
    defaults={
        "attn_config.clip_qkv": None,
        "attn_config.kv_n_heads": 1,
        "ffn_config.ffn_act_fn": {"name": "silu"},
        "ffn_config.ffn_hidden_size": 3584,
        "ffn_config.moe_loss_weight": 0.01,
        "ffn_config.moe_normalize_expert_weights": 1.0,
        "ffn_config.moe_num_experts": 4,
        "ffn_config.moe_top_k": 1,
        "initializer_range": 0.02,
        "max_seq_len": 2048,
        "rope_theta": 10_000.0,
        "vocab_size": 32_000,
    },
)

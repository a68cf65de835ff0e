"""OLMo Hybrid, Jamba, LFM2 mixture of experts and LFM3: other mixers with attention now and then."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zoo.hf.families.qwen_next import delta_rows
from zoo.hf.families.shared import LAYER, attention_weights, mlp_weights, sigmoid_router, trunk_weights
from zoo.hf.family import Family, Slot
from zoo.hf.keys import Keys, refused
from zoo.hf.layers import Always, FirstDense, Layers, Listed
from zoo.hf.rope import Rope, RopeByType
from zoo.hf.rows import Const, Field, Inert, Only, Tree, heads, swiglu, trunk
from zoo.hf.weights import Experts, Fused, JointRow, Same, Split, WeightRow
from zoo.spec.attention import AttentionSpec
from zoo.spec.delta import DeltaSpec
from zoo.spec.mamba1 import Mamba1Spec
from zoo.spec.mlp import MLPSpec
from zoo.spec.moe import MoESpec
from zoo.spec.short_conv import ShortConvSpec

_OURS = "layers.{n}.mixer"


def _last_full(keys: Keys, num_layers: int) -> list[str]:
    """Every fourth layer is full; of fewer than four the last."""
    chosen = ["attention" if layer % 4 == 3 else "delta" for layer in range(num_layers)]
    return chosen if "attention" in chosen else [*chosen[:-1], "attention"]


def _separate_delta_weights(spec: DeltaSpec) -> Iterator[WeightRow]:
    theirs = f"{LAYER}.linear_attn"
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "beta": "b_proj", "decay": "a_proj"}
    for ours, name in {**names, "gate": "g_proj", "norm": "o_norm", "out": "o_proj"}.items():
        yield Same(f"{_OURS}.{ours}.weight", (f"{theirs}.{name}.weight",))
    parts = tuple(f"{theirs}.{part}_conv1d.weight" for part in "qkv")
    widths = (spec.qk_heads * spec.head_dim, spec.qk_heads * spec.head_dim, spec.num_heads * spec.v_width)
    yield Split(f"{_OURS}.conv.weight", parts, widths, f"{theirs}.conv1d.weight")
    yield Same(f"{_OURS}.a_log", (f"{theirs}.A_log",))
    yield Same(f"{_OURS}.dt_bias", (f"{theirs}.dt_bias",))


class DeltaWidths:
    """Widths of the delta rule that a config may leave out."""

    def read(self, keys: Keys, model: Tree) -> None:
        num_heads, hidden = keys.take("num_attention_heads"), keys.take("hidden_size")
        qk_heads = keys.take("linear_num_key_heads", None) or num_heads
        head_dim = keys.take("linear_key_head_dim", None) or int(0.75 * hidden / qk_heads)
        model.set("delta.num_qk_heads", qk_heads)
        model.set("delta.num_heads", keys.take("linear_num_value_heads", None) or num_heads)
        model.set("delta.head_dim", head_dim)
        model.set("delta.v_head_dim", keys.take("linear_value_head_dim", None) or 2 * head_dim)

    def write(self, model: Tree, config: dict[str, Any]) -> None:
        for row in delta_rows():
            row.write(model, config)


class NullableRope(Rope):
    """Rotary positions, unless their base is null."""

    def read(self, keys: Keys, model: Tree) -> None:
        parameters = keys.take("rope_parameters", None)
        if isinstance(parameters, Mapping) and "rope_theta" in parameters and parameters["rope_theta"] is None:
            keys.take("rope_theta", None)
            model.set(f"{self.slot}.rope", None)
        else:
            super().read(keys, model)

    def write(self, model: Tree, config: dict[str, Any]) -> None:
        if model.get(f"{self.slot}.rope") is None:
            config["rope_parameters"] = {"rope_type": "default", "rope_theta": None}
        else:
            super().write(model, config)


# transformers saves the norm after attention under the name of one before an MLP, and reads both names.
_AFTER_ATTENTION = (f"{LAYER}.feedforward_layer_norm.weight", f"{LAYER}.post_attention_layernorm.weight")

OLMO_HYBRID = Family(
    model_type="olmo_hybrid",
    architecture="OlmoHybridForCausalLM",
    slots={
        "attention": Slot(AttentionSpec),
        "delta": Slot(DeltaSpec, weights=_separate_delta_weights),
        "mlp": Slot(MLPSpec),
    },
    layers=Layers(
        Listed("layer_types", {"linear_attention": "delta", "full_attention": "attention"}, _last_full),
        Always("mlp"),
        {"linear": ("delta", "mlp"), "full": ("attention", "mlp")},
        options={"full": {"placement": "post"}},
    ),
    rows=(
        *trunk(),
        Const("norm.weight", "wide"),
        *heads(),
        Field("attention.head_dim", "head_dim"),
        Const("attention.qk_norm", "full"),
        Field("attention.qkv_bias", "attention_bias"),
        Field("attention.out_bias", "attention_bias"),
        NullableRope(),
        DeltaWidths(),
        Field("delta.conv_width", "linear_conv_kernel_dim"),
        Field("delta.beta_scale", "linear_allow_neg_eigval", {True: 2.0, False: 1.0}),
        Const("delta.norm_eps", 1e-5),
        *swiglu(),
        Only("hidden_act", "silu"),
        *map(Inert, ("linear_a_log_max", "linear_a_log_min", "linear_dt_init_floor", "linear_dt_max", "linear_dt_min")),
    ),
    weights=(
        *trunk_weights(),
        *attention_weights(),
        *mlp_weights(),
        Same(
            "layers.{n}.mixer_norm.weight",
            (f"{LAYER}.attention_layer_norm.weight", f"{LAYER}.input_layernorm.weight"),
        ),
        Same("layers.{n}.ffn_norm.weight", _AFTER_ATTENTION),
        Same("layers.{n}.mixer_post_norm.weight", _AFTER_ATTENTION),
        Same("layers.{n}.ffn_post_norm.weight", (f"{LAYER}.post_feedforward_layernorm.weight",)),
    ),
    defaults={
        "attention_bias": False,
        "head_dim": None,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "linear_allow_neg_eigval": True,
        "linear_conv_kernel_dim": 4,
        "max_position_embeddings": 65_536,
        "num_key_value_heads": None,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
    },
)


@dataclass(frozen=True)
class Periodic:
    """Of every so many layers, one that uses another slot."""

    name: str
    """What the keys for the period and the offset of that one begin with."""
    rare: str
    common: str
    unless: str | None = None
    """A key that must be above 1 for any layer to use it."""

    def read(self, keys: Keys, num_layers: int) -> list[str]:
        period, offset = (keys.integer(f"{self.name}_layer_{part}", 0, 1_000_000) for part in ("period", "offset"))
        if offset >= period:
            raise refused(f"{self.name}_layer_offset", offset, f"must be below {self.name}_layer_period ({period})")
        none = self.unless is not None and keys.integer(self.unless, 0, 1_000_000) <= 1
        return [self.rare if layer % period == offset and not none else self.common for layer in range(num_layers)]

    def write(self, chosen: Sequence[str | None], config: dict[str, Any]) -> None:
        places = [layer for layer, slot in enumerate(chosen) if slot == self.rare]
        first = places[0] if places else len(chosen)
        period = places[1] - places[0] if len(places) > 1 else len(chosen) + 1
        config[f"{self.name}_layer_period"], config[f"{self.name}_layer_offset"] = period, first
        if self.unless is not None and not places:
            config[self.unless] = 1


def _mamba1_weights(spec: Mamba1Spec) -> Iterator[WeightRow | JointRow]:
    theirs = f"{LAYER}.mamba"
    for kind in ("weight", "bias"):
        yield Fused((f"{_OURS}.x.{kind}", f"{_OURS}.z.{kind}"), f"{theirs}.in_proj.{kind}")
        yield Same(f"{_OURS}.conv.{kind}", (f"{theirs}.conv1d.{kind}",))
        yield Same(f"{_OURS}.out.{kind}", (f"{theirs}.out_proj.{kind}",))
    yield Fused(tuple(f"{_OURS}.{part}.weight" for part in ("dt_down", "b", "c")), f"{theirs}.x_proj.weight")
    for part in ("b", "c", "dt"):
        yield Same(f"{_OURS}.{part}_norm.weight", (f"{theirs}.{part}_layernorm.weight",))
    for ours, name in {"dt.weight": "dt_proj.weight", "dt_bias": "dt_proj.bias", "a_log": "A_log", "skip": "D"}.items():
        yield Same(f"{_OURS}.{ours}", (f"{theirs}.{name}",))


class InnerWidth:
    """Channels of Mamba-1, in proportion to the model's, and the rank of its steps."""

    def read(self, keys: Keys, model: Tree) -> None:
        hidden, rank = keys.take("hidden_size"), keys.take("mamba_dt_rank")
        model.set("mamba.d_inner", keys.take("mamba_expand") * hidden)
        model.set("mamba.dt_rank", -(-hidden // 16) if rank == "auto" else rank)

    def write(self, model: Tree, config: dict[str, Any]) -> None:
        if model.has("mamba"):
            config["mamba_expand"] = model.get("mamba.d_inner") // config["hidden_size"]
            config["mamba_dt_rank"] = model.get("mamba.dt_rank")


def _feed_forward_weights(parts: Mapping[str, str], router: str) -> Iterator[WeightRow]:
    """MLP and experts under one name, by the names of their matrices."""
    ffn = f"{LAYER}.feed_forward"
    for ours, theirs in parts.items():
        yield Same(f"layers.{{n}}.ffn.{ours}.weight", (f"{ffn}.{theirs}.weight",))
    gate, up, down = (f"{ffn}.experts.{{e}}.{parts[part]}.weight" for part in ("gate", "up", "down"))
    yield Experts("layers.{n}.ffn.experts.gate_up", (gate, up), f"{ffn}.experts.gate_up_proj")
    yield Experts("layers.{n}.ffn.experts.down", (down,), f"{ffn}.experts.down_proj")
    yield Same("layers.{n}.ffn.router.weight", (f"{ffn}.{router}.weight",))


JAMBA = Family(
    model_type="jamba",
    architecture="JambaForCausalLM",
    slots={
        "mamba": Slot(Mamba1Spec, weights=_mamba1_weights),
        "attention": Slot(AttentionSpec),
        "mlp": Slot(MLPSpec),
        "moe": Slot(MoESpec),
    },
    layers=Layers(
        Periodic("attn", "attention", "mamba"),
        Periodic("expert", "moe", "mlp", unless="num_experts"),
        {
            "mamba": ("mamba", "mlp"),
            "mamba_sparse": ("mamba", "moe"),
            "attention": ("attention", "mlp"),
            "attention_sparse": ("attention", "moe"),
        },
    ),
    rows=(
        *trunk(),
        *heads(),
        Field("attention.head_dim", "head_dim"),
        Const("attention.rope", None),
        InnerWidth(),
        Field("mamba.d_state", "mamba_d_state"),
        Field("mamba.conv_width", "mamba_d_conv"),
        Field("mamba.conv_bias", "mamba_conv_bias"),
        Field("mamba.bias", "mamba_proj_bias"),
        Const("mamba.inner_norms", True),
        *swiglu(),
        Only("hidden_act", "silu"),
        Field("moe.d_expert", "intermediate_size"),
        Field("moe.num_experts", "num_experts"),
        Field("moe.top_k", "num_experts_per_tok"),
        Const("moe.router.type", "top_k"),
        Const("moe.router.normalize", False),
        Field("moe.balance.aux_loss", "router_aux_loss_coef"),
        *map(Inert, ("mamba_inner_layernorms", "num_logits_to_keep", "sliding_window")),
        *map(Inert, ("use_associative_scan", "use_mamba_kernels", "use_mambapy")),
    ),
    weights=(
        *trunk_weights(),
        *attention_weights(),
        *_feed_forward_weights({"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}, "router"),
        Same("norm.weight", ("model.final_layernorm.weight",)),
        Same("layers.{n}.ffn_norm.weight", (f"{LAYER}.pre_ff_layernorm.weight",)),
    ),
    defaults={
        "attn_layer_offset": 4,
        "attn_layer_period": 8,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "head_dim": None,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "intermediate_size": 14_336,
        "mamba_conv_bias": True,
        "mamba_d_conv": 4,
        "mamba_d_state": 16,
        "mamba_dt_rank": "auto",
        "mamba_expand": 2,
        "mamba_proj_bias": False,
        "max_position_embeddings": 262_144,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
        "router_aux_loss_coef": 0.001,
        "tie_word_embeddings": False,
    },
)


def _conv_weights(spec: ShortConvSpec) -> Iterator[WeightRow | JointRow]:
    theirs = f"{LAYER}.conv"
    for kind in ("weight", "bias"):
        yield Fused(tuple(f"{_OURS}.{part}.{kind}" for part in "bcv"), f"{theirs}.in_proj.{kind}")
        yield Same(f"{_OURS}.conv.{kind}", (f"{theirs}.conv.{kind}",))
        yield Same(f"{_OURS}.out.{kind}", (f"{theirs}.out_proj.{kind}",))


def _lfm_weights() -> Iterator[WeightRow]:
    yield from trunk_weights()
    yield Same("norm.weight", ("model.embedding_norm.weight",))
    names = {"mixer_norm": "operator_norm", "ffn_norm": "ffn_norm"}
    for ours, theirs in {**names, "mixer_post_norm": "post_operator_norm", "ffn_post_norm": "post_ffn_norm"}.items():
        yield Same(f"layers.{{n}}.{ours}.weight", (f"{LAYER}.{theirs}.weight",))
    yield from attention_weights()
    yield from _feed_forward_weights({"gate": "w1", "up": "w3", "down": "w2"}, "gate")


_LFM_DEFAULTS: dict[str, Any] = {
    "conv_bias": False,
    "initializer_range": 0.02,
    "max_position_embeddings": 128_000,
    "norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


def _no_rule(keys: Keys, num_layers: int) -> list[str]:
    raise refused("layer_types", None, f"must be a list of {num_layers} names, one for each layer")


class LayerTypes(Listed):
    """`layer_types`, which must be given."""

    def read(self, keys: Keys, num_layers: int) -> list[str]:
        if keys.take(self.key, None) is None:
            return self.rule(keys, num_layers)
        return Listed(self.key, self.slots, lambda keys, num_layers: []).read(keys, num_layers)


LFM2_MOE = Family(
    model_type="lfm2_moe",
    architecture="Lfm2MoeForCausalLM",
    slots={
        "attention": Slot(AttentionSpec),
        "conv": Slot(ShortConvSpec, weights=_conv_weights),
        "mlp": Slot(MLPSpec),
        "moe": Slot(MoESpec),
    },
    layers=Layers(
        LayerTypes("layer_types", {"conv": "conv", "full_attention": "attention"}, _no_rule),
        FirstDense("num_dense_layers", listed=None),
        {
            "conv_dense": ("conv", "mlp"),
            "conv": ("conv", "moe"),
            "attention_dense": ("attention", "mlp"),
            "attention": ("attention", "moe"),
        },
    ),
    rows=(
        *trunk("norm_eps"),
        Field("head.tied", "tie_word_embeddings tie_embedding"),
        *heads(),
        Field("attention.head_dim", "head_dim"),
        Const("attention.qk_norm", "head"),
        Rope(),
        Field("conv.width", "conv_L_cache"),
        Field("conv.bias", "conv_bias"),
        Field("mlp.d_ffn", "intermediate_size"),
        Field("moe.num_experts", "num_experts"),
        Field("moe.top_k", "num_experts_per_tok"),
        Field("moe.d_expert", "moe_intermediate_size"),
        *sigmoid_router(),
        Const("moe.router.arithmetic", "model"),
        Field("moe.router.correction_bias", "use_expert_bias"),
        Field("moe.router.normalize", "norm_topk_prob"),
        Const("moe.router.normalize_eps", 1e-6),
    ),
    weights=(
        *_lfm_weights(),
        Same("layers.{n}.ffn.router.correction_bias", (f"{LAYER}.feed_forward.expert_bias",)),
        *(
            Same(f"{_OURS}.{ours}.{kind}", (f"{LAYER}.self_attn.{theirs}.{kind}",))
            for ours, theirs in {"q_norm": "q_layernorm", "k_norm": "k_layernorm", "out": "out_proj"}.items()
            for kind in ("weight", "bias")
        ),
    ),
    defaults={
        **_LFM_DEFAULTS,
        "conv_L_cache": 3,
        "head_dim": None,
        "intermediate_size": 7168,
        "moe_intermediate_size": 1792,
        "norm_topk_prob": True,
        "num_dense_layers": 2,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "num_key_value_heads": 8,
        "rope_theta": 1_000_000.0,
        "routed_scaling_factor": 1.0,
        "use_expert_bias": True,
    },
)


def _conv_between(keys: Keys, num_layers: int) -> list[str]:
    """Every second layer is a convolution; the others are full and sliding in turns, but for the first."""
    by_place = {2: "attention", 0: "local"}
    return [by_place.get(layer % 4, "conv") if layer else "conv" for layer in range(num_layers)]


_BY_TYPE = {"full_attention": "attention", "sliding_attention": "local"}

LFM3 = Family(
    model_type="lfm3",
    architecture="Lfm3ForCausalLM",
    slots={
        "attention": Slot(AttentionSpec, {"mask": "causal"}),
        "local": Slot(AttentionSpec, {"mask": "sliding"}, like="attention"),
        "conv": Slot(ShortConvSpec, weights=_conv_weights),
        "mlp": Slot(MLPSpec),
    },
    layers=Layers(
        Listed("layer_types", {"conv": "conv", **_BY_TYPE}, _conv_between),
        Always("mlp"),
        {"conv": ("conv", "mlp"), "full": ("attention", "mlp"), "local": ("local", "mlp")},
    ),
    rows=(
        *trunk("norm_eps"),
        Field("norm_placement", "use_sandwich_norm", {True: "sandwich", False: "pre"}),
        *heads(),
        Field("attention.head_dim", "head_dim"),
        Const("attention.qk_norm", "head"),
        Field("attention.qkv_bias", "attention_bias"),
        Field("attention.out_bias", "attention_bias"),
        Field("attention.gate", "use_attention_gate", {True: "head", False: "none"}),
        RopeByType(_BY_TYPE),
        Const("local.mask", "sliding"),
        Field("local.window", "sliding_window"),
        Field("conv.width", "conv_L_cache"),
        Field("conv.bias", "conv_bias"),
        Field("mlp.d_ffn", "intermediate_size"),
    ),
    weights=(
        *_lfm_weights(),
        Same(f"{_OURS}.gate.weight", (f"{LAYER}.self_attn.gate_proj.weight", f"{LAYER}.self_attn.g_proj.weight")),
    ),
    defaults={
        **_LFM_DEFAULTS,
        "attention_bias": False,
        "conv_L_cache": 7,
        "head_dim": 128,
        "num_key_value_heads": 4,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": 1_000_000.0,
                "partial_rotary_factor": 0.5,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
        "sliding_window": 256,
        "use_attention_gate": True,
        "use_sandwich_norm": True,
    },
)

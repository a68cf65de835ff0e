"""Arctic, whose code is on the hub and not in transformers."""

from __future__ import annotations

from collections.abc import Iterator

from zoo.hf.families.shared import LAYER, attention_weights, ends_weights, norm_weights
from zoo.hf.family import Family, Slot
from zoo.hf.layers import Always, Layers
from zoo.hf.rope import Rope
from zoo.hf.rows import ACTIVATIONS, Const, Field, Inert, Only, SameAs, Window, heads, trunk
from zoo.hf.weights import Experts, Same, WeightRow
from zoo.spec.attention import AttentionSpec
from zoo.spec.mlp import MLPSpec
from zoo.spec.moe import MoESpec

_IN_TRAINING = """
    moe_token_dropping moe_train_capacity_factor moe_eval_capacity_factor moe_min_capacity
    enable_expert_tensor_parallelism quantization
"""


def _weights() -> Iterator[WeightRow]:
    """A dense mixer after attention, and a routed one that reads the layer's input."""
    yield from ends_weights()
    yield from attention_weights()
    norms = {"mixer_norm": "input_layernorm", "ffn_norm": "residual_layernorm"}
    yield from norm_weights({**norms, "beside_norm": "post_attention_layernorm"})
    for ours, theirs in {"gate": "w1", "up": "w3", "down": "w2"}.items():
        yield Same(f"layers.{{n}}.ffn.{ours}.weight", (f"{LAYER}.residual_mlp.{theirs}.weight",))
    moe = f"{LAYER}.block_sparse_moe"
    each = f"{moe}.experts.{{e}}"
    yield Same("layers.{n}.beside.router.weight", (f"{moe}.gate.weight",))
    yield Experts("layers.{n}.beside.experts.gate_up", (f"{each}.w1.weight", f"{each}.w3.weight"), f"{moe}.gate_up")
    yield Experts("layers.{n}.beside.experts.down", (f"{each}.w2.weight",), f"{moe}.down")


ARCTIC = Family(
    model_type="arctic",
    architecture="ArcticForCausalLM",
    slots={"attention": Slot(AttentionSpec), "mlp": Slot(MLPSpec), "moe": Slot(MoESpec)},
    layers=Layers(
        Always("attention"),
        Always("mlp"),
        {"sparse": ("attention", "mlp")},
        options={"sparse": {"beside": "moe"}},
    ),
    rows=(
        *trunk(),
        *heads(),
        Field("attention.head_dim", "head_dim"),
        Window("attention"),
        Rope(),
        SameAs("mlp.d_ffn", "d_model"),
        Field("mlp.activation", "hidden_act", ACTIVATIONS),
        Field("moe.num_experts", "num_local_experts num_experts"),
        Field("moe.top_k", "num_experts_per_tok"),
        Field("moe.d_expert", "intermediate_size"),
        Field("moe.activation", "hidden_act", ACTIVATIONS),
        Const("moe.router.type", "top_k"),
        Field("moe.balance.aux_loss", "router_aux_loss_coef"),
        Only("parallel_attn_mlp_res", True, written=True),
        Only("use_residual", True, written=True),
        Only("moe_layer_frequency", 1, written=True),
        *(Inert(key) for key in _IN_TRAINING.split()),
    ),
    weights=tuple(_weights()),
    defaults={
        "head_dim": None,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 4096,
        "num_key_value_heads": None,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
)

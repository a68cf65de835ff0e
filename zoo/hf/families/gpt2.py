"""GPT-2."""

from __future__ import annotations

from collections.abc import Iterator

from zoo.hf.family import Family, Slot
from zoo.hf.layers import Always, Layers
from zoo.hf.rows import ACTIVATIONS, Const, Field, Inert, Only, SameAs
from zoo.hf.weights import Fused, JointRow, Same, Transposed, WeightRow
from zoo.spec.attention import AttentionSpec
from zoo.spec.mlp import MLPSpec

_LAYER = "transformer.h.{n}"


def _weights() -> Iterator[WeightRow | JointRow]:
    """Matrices are stored [in, out]."""
    yield Same("embed.weight", ("transformer.wte.weight", "wte.weight"))
    yield Same("embed.positions", ("transformer.wpe.weight", "wpe.weight"))
    yield Same("head.weight", ("lm_head.weight",))
    for kind in ("weight", "bias"):
        yield Same(f"norm.{kind}", (f"transformer.ln_f.{kind}",))
        yield Same(f"layers.{{n}}.mixer_norm.{kind}", (f"{_LAYER}.ln_1.{kind}",))
        yield Same(f"layers.{{n}}.ffn_norm.{kind}", (f"{_LAYER}.ln_2.{kind}",))
        qkv = tuple(f"layers.{{n}}.mixer.{part}.{kind}" for part in "qkv")
        yield Fused(qkv, f"{_LAYER}.attn.c_attn.{kind}", transposed=True)
    for ours, theirs in {"mixer.out": "attn.c_proj", "ffn.up": "mlp.c_fc", "ffn.down": "mlp.c_proj"}.items():
        yield Transposed(f"layers.{{n}}.{ours}.weight", f"{_LAYER}.{theirs}.weight")
        yield Same(f"layers.{{n}}.{ours}.bias", (f"{_LAYER}.{theirs}.bias",))


GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    slots={"attention": Slot(AttentionSpec), "mlp": Slot(MLPSpec)},
    layers=Layers(Always("attention"), Always("mlp"), {"dense": ("attention", "mlp")}, count="n_layer"),
    rows=(
        Field("d_model", "n_embd hidden_size"),
        Field("vocab_size", "vocab_size"),
        Field("embedding.positions", "n_positions max_position_embeddings n_ctx"),
        SameAs("card.context", "embedding.positions"),
        Const("norm.type", "layer"),
        Const("norm.bias", True),
        Field("norm.eps", "layer_norm_epsilon"),
        Field("head.tied", "tie_word_embeddings"),
        Field("init.std", "initializer_range"),
        Field("attention.num_heads", "n_head num_attention_heads"),
        SameAs("attention.num_kv_heads", "attention.num_heads"),
        Const("attention.rope", None),
        Const("attention.qkv_bias", True),
        Const("attention.out_bias", True),
        Field("mlp.d_ffn", "n_inner", if_null="n_embd", times=4),
        Field("mlp.activation", "activation_function", ACTIVATIONS),
        Const("mlp.gated", False),
        Const("mlp.bias", True),
        # They act in training alone, where this project has no dropout.
        *(Inert(key) for key in ("attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_first_dropout")),
        *(Inert(f"summary_{key}") for key in ("type", "use_proj", "activation", "proj_to_labels")),
        Only("scale_attn_weights", True),
        Only("scale_attn_by_inverse_layer_idx", False),
        Inert("reorder_and_upcast_attn"),
        Only("add_cross_attention", False),
    ),
    weights=tuple(_weights()),
    defaults={
        "activation_function": "gelu_new",
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-5,
        "n_inner": None,
        "n_positions": 1024,
        "tie_word_embeddings": True,
    },
    tied_head=("lm_head.weight", "transformer.wte.weight"),
    # Causal masks, as the oldest checkpoints hold them.
    ignored_weights=(r".*\.attn\.(masked_)?bias",),
)

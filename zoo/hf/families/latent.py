"""Multi-head latent attention, as the families that have it say it in the same words."""

from __future__ import annotations

from collections.abc import Iterator

from zoo.hf.families.shared import LAYER
from zoo.hf.rows import Const, Equal, Field, Inert, Only, Row
from zoo.hf.weights import Fused, JointRow, Same, WeightRow
from zoo.spec.mla import MLASpec

_MIXER = "layers.{n}.mixer"


def latent_rows(slot: str = "attention") -> Iterator[Row]:
    """Heads and latents. The classes of transformers leave the eps of the latents' norms at its default."""
    yield Field(f"{slot}.num_heads", "num_attention_heads")
    yield Equal("num_key_value_heads", "num_attention_heads")
    yield Only("attention_dropout", 0.0)
    yield Field(f"{slot}.d_kv_latent", "kv_lora_rank")
    yield Field(f"{slot}.d_q_latent", "q_lora_rank")
    yield Field(f"{slot}.nope_head_dim", "qk_nope_head_dim")
    yield Field(f"{slot}.rope_head_dim", "qk_rope_head_dim")
    yield Field(f"{slot}.v_head_dim", "v_head_dim")
    yield Field(f"{slot}.latent_bias", "attention_bias")
    yield Field(f"{slot}.out_bias", "attention_bias")
    yield Const(f"{slot}.latent_eps", 1e-6)
    yield Inert("head_dim")
    yield Inert("qk_head_dim")


def indexer_rows(slot: str = "attention") -> Iterator[Row]:
    """The side branch that chooses keys."""
    yield Field(f"{slot}.indexer.num_heads", "index_n_heads")
    yield Field(f"{slot}.indexer.head_dim", "index_head_dim")
    yield Field(f"{slot}.indexer.top_k", "index_topk")


def latent_weights(
    spec: MLASpec, theirs: str = f"{LAYER}.self_attn", out: str = "o_proj"
) -> Iterator[WeightRow | JointRow]:
    """Projections of keys and values are stored as one, head by head; so are the latent and the shared key."""
    names = {"kv_norm": "kv_a_layernorm", "out": out, "gate": "g_proj"}
    if spec.d_q_latent is None:
        names |= {"q": "q_proj"}
    else:
        names |= {"q_down": "q_a_proj", "q_norm": "q_a_layernorm", "q": "q_b_proj"}
    index = {"q": "wq_b", "k": "wk", "k_norm": "k_norm", "weights": "weights_proj"}
    names |= {f"indexer.{ours}": f"indexer.{name}" for ours, name in index.items()}
    for kind in ("weight", "bias"):
        for ours, name in names.items():
            yield Same(f"{_MIXER}.{ours}.{kind}", (f"{theirs}.{name}.{kind}",))
        down = f"{theirs}.kv_a_proj_with_mqa.{kind}"
        yield Fused((f"{_MIXER}.kv_down.{kind}", f"{_MIXER}.k_shared.{kind}"), down)
    up = f"{theirs}.kv_b_proj.weight"
    yield Fused((f"{_MIXER}.k.weight", f"{_MIXER}.v.weight"), up, groups=spec.num_heads)

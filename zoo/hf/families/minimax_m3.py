"""MiniMax-M3, the text model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from zoo.hf.families.shared import LAYER, attention_weights, sigmoid_router, trunk_weights
from zoo.hf.family import Family, Slot
from zoo.hf.keys import Keys, refused
from zoo.hf.layers import Layers, Listed
from zoo.hf.rope import Rope
from zoo.hf.rows import Const, Field, Inert, Only, SharedWidth, Twofold, heads, trunk
from zoo.hf.weights import Experts, Fused, JointRow, Same, WeightRow
from zoo.hf.wrapped import LAYOUTS, OTHER_WEIGHTS
from zoo.spec.attention import AttentionSpec
from zoo.spec.mlp import MLPSpec
from zoo.spec.moe import MoESpec

_SPARSE = "sparse_attention_config"


class Flagged(Listed):
    """Names of layer types; without them, a key holds 1 for layers of the first type and 0 for those of the second."""

    def __init__(self, key: str, slots: dict[str, str], flags: str, otherwise: str) -> None:
        def rule(keys: Keys, num_layers: int) -> list[str]:
            found = keys.take(flags, None)
            if found is None:
                return [slots[otherwise]] * num_layers
            if not isinstance(found, list) or len(found) != num_layers or any(flag not in (0, 1) for flag in found):
                raise refused(flags, found, f"must be a list of {num_layers} numbers 0 or 1")
            rare, common = slots.values()
            return [rare if flag else common for flag in found]

        super().__init__(key, slots, rule)
        object.__setattr__(self, "flags", flags)

    flags: str = ""

    def write(self, chosen: Sequence[str | None], config: dict[str, Any]) -> None:
        super().write(chosen, config)
        rare = next(iter(self.slots.values()))
        config[self.flags] = [int(slot == rare) for slot in chosen]


def _ffn_weights() -> Iterator[WeightRow | JointRow]:
    """Here transformers saves its memory's layout; the hub's holds all matrices apart."""
    ffn, theirs, hub = "layers.{n}.ffn", f"{LAYER}.mlp", f"{LAYER}.block_sparse_moe"
    for ours, here, there in (
        (ffn, theirs, theirs),
        (f"{ffn}.shared", f"{theirs}.shared_experts", f"{hub}.shared_experts"),
    ):
        apart = (f"{there}.gate_proj.weight", f"{there}.up_proj.weight")
        yield Fused((f"{ours}.gate.weight", f"{ours}.up.weight"), f"{here}.gate_up_proj.weight", apart=apart)
        yield Same(f"{ours}.down.weight", (f"{here}.down_proj.weight", f"{there}.down_proj.weight"))
    w1, w2, w3 = (f"{hub}.experts.{{e}}.w{number}.weight" for number in (1, 2, 3))
    yield Experts(f"{ffn}.experts.gate_up", (w1, w3), f"{theirs}.experts.gate_up_proj", stack=True)
    yield Experts(f"{ffn}.experts.down", (w2,), f"{theirs}.experts.down_proj", stack=True)
    yield Same(f"{ffn}.router.weight", (f"{theirs}.gate.weight", f"{hub}.gate.weight"))
    bias = "e_score_correction_bias"
    yield Same(f"{ffn}.router.correction_bias", (f"{theirs}.gate.{bias}", f"{hub}.{bias}"))


def _indexer_weights() -> Iterator[WeightRow]:
    for ours, theirs in {"q": "q_proj", "k": "k_proj", "q_norm": "q_norm", "k_norm": "k_norm"}.items():
        names = (f"{LAYER}.self_attn.indexer.{theirs}.weight", f"{LAYER}.self_attn.index_{theirs}.weight")
        yield Same(f"layers.{{n}}.mixer.indexer.{ours}.weight", names)


MINIMAX_M3 = Family(
    model_type="minimax_m3_vl_text",
    aliases=("minimax_m3",),
    architecture="MiniMaxM3VLForCausalLM",
    slots={
        "attention": Slot(AttentionSpec, {"indexer": None}),
        "indexed": Slot(AttentionSpec, like="attention"),
        "mlp": Slot(MLPSpec),
        "moe": Slot(MoESpec),
    },
    layers=Layers(
        Flagged(
            "layer_types",
            {"minimax_m3_sparse": "indexed", "full_attention": "attention"},
            f"{_SPARSE}.sparse_attention_freq",
            "full_attention",
        ),
        Flagged("mlp_layer_types", {"sparse": "moe", "dense": "mlp"}, "moe_layer_freq", "sparse"),
        {
            "dense": ("attention", "mlp"),
            "sparse": ("attention", "moe"),
            "indexed_dense": ("indexed", "mlp"),
            "indexed": ("indexed", "moe"),
        },
    ),
    rows=(
        *trunk(),
        Const("norm.weight", "plus_one"),
        Only("use_gemma_norm", True),
        *heads(),
        Field("attention.head_dim", "head_dim"),
        Const("attention.qk_norm", "head"),
        Only("use_qk_norm", True),
        Only("qk_norm_type", "per_head"),
        Only("attention_output_gate", False),
        Rope(fraction=True, rotary_dim="rotary_dim"),
        Twofold("indexed.indexer.num_heads", "index_n_heads", f"{_SPARSE}.sparse_num_index_heads"),
        Twofold("indexed.indexer.head_dim", "index_head_dim", f"{_SPARSE}.sparse_index_dim"),
        Twofold("indexed.indexer.block_size", "index_block_size", f"{_SPARSE}.sparse_block_size"),
        Twofold("indexed.indexer.top_k", "index_topk_blocks", f"{_SPARSE}.sparse_topk_blocks"),
        Twofold("indexed.indexer.num_local", "index_local_blocks", f"{_SPARSE}.sparse_local_block"),
        Only(f"{_SPARSE}.use_sparse_attention", True),
        Only(f"{_SPARSE}.sparse_score_type", "max"),
        Only(f"{_SPARSE}.sparse_init_block", 0),
        Inert(f"{_SPARSE}.sparse_disable_index_value"),  # the class never has such values
        Only("hidden_act", "silu", also=("swigluoai",)),
        Only("swiglu_alpha", 1.702, written=True),
        Const("mlp.activation", "clamped_swish"),
        Const("moe.activation", "clamped_swish"),
        Field("mlp.activation_limit", "swiglu_limit"),
        Field("moe.activation_limit", "swiglu_limit"),
        Field("mlp.d_ffn", "dense_intermediate_size"),
        Field("moe.num_experts", "num_local_experts num_experts"),
        Field("moe.top_k", "num_experts_per_tok"),
        Field("moe.d_expert", "intermediate_size moe_intermediate_size"),
        SharedWidth("moe", "shared_intermediate_size"),
        Only("n_shared_experts", 1),
        *sigmoid_router(arithmetic="mixed"),
        Only("scoring_func", "sigmoid"),
        Only("use_routing_bias", True),
        Only("router_jitter_noise", 0.0),
        *map(Inert, ("first_k_dense_replace", "num_mtp_modules", "num_nextn_predict_layers", "router_aux_loss_coef")),
    ),
    weights=(*trunk_weights(), *attention_weights(), *_indexer_weights(), *_ffn_weights()),
    nested=(_SPARSE,),
    layouts=LAYOUTS,
    ignored_weights=(*OTHER_WEIGHTS, r"patch_merge_mlp\..*", r"(?:.*\.)?mtp\..*"),
    defaults={
        "dense_intermediate_size": 12_288,
        "head_dim": 128,
        "index_block_size": 128,
        "index_head_dim": 128,
        "index_local_blocks": 1,
        "index_n_heads": 4,
        "index_topk_blocks": 16,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "max_position_embeddings": 524_288,
        "num_experts_per_tok": 4,
        "num_key_value_heads": 4,
        "num_local_experts": 128,
        "partial_rotary_factor": 1.0,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5_000_000.0,
        "rotary_dim": 64,
        "routed_scaling_factor": 2.0,
        "shared_intermediate_size": 3072,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
    },
)

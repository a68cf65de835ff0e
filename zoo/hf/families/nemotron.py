"""Nemotron-H and Nemotron 3: layers of one block each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zoo.hf.families.shared import router_groups, sigmoid_router
from zoo.hf.family import Family, Slot
from zoo.hf.keys import Keys, refused
from zoo.hf.layers import MAX_LAYERS, Always, Layers, Pair
from zoo.hf.mtp import NEMOTRON_NAMES, MTPNames
from zoo.hf.rows import ACTIVATIONS, Const, Field, Inert, Only, SharedWidth, Tree, heads, trunk
from zoo.hf.weights import Experts, Fused, JointRow, Same, WeightRow
from zoo.spec.attention import AttentionSpec
from zoo.spec.mamba2 import Mamba2Spec
from zoo.spec.mlp import MLPSpec
from zoo.spec.moe import MoESpec
from zoo.spec.pattern import expand

_LETTERS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
_NAMES = {
    "mamba": "mamba",
    "linear_attention": "mamba",
    "attention": "attention",
    "full_attention": "attention",
    "mlp": "mlp",
    "moe": "moe",
}
"""Names of layers, of the hub and of transformers 5, by kind."""


def _listed(keys: Keys, pattern_key: str, list_key: str) -> list[str] | None:
    """Kinds of layers from a pattern of letters or a list of names; both must agree."""
    pattern, names = keys.take(pattern_key, None), keys.take(list_key, None)
    for key, found, known in ((pattern_key, pattern, _LETTERS), (list_key, names, _NAMES)):
        if found is not None and not (
            isinstance(found, (str, list)) and 0 < len(found) <= MAX_LAYERS and all(item in known for item in found)
        ):
            raise refused(key, found, f"understood: 1 to {MAX_LAYERS} layers of {', '.join(known)}")
    if pattern is not None and names is not None and [_LETTERS[item] for item in pattern] != [_NAMES[n] for n in names]:
        raise refused(list_key, names, f"differs from {pattern_key} ({pattern!r})")
    if pattern is not None:
        return [_LETTERS[letter] for letter in pattern]
    return None if names is None else [_NAMES[name] for name in names]


def _as_pattern(kinds: Sequence[str]) -> str:
    letters = {kind: letter for letter, kind in _LETTERS.items()}
    return "".join(letters[kind] for kind in kinds)


@dataclass(frozen=True)
class SingleBlocks(Layers):
    """Layers with one block each, as a pattern of letters or a list of names."""

    def read(self, keys: Keys) -> list[str]:
        kinds = _listed(keys, "hybrid_override_pattern", "layers_block_type")
        if kinds is None:
            raise refused("hybrid_override_pattern", None, "give it, or layers_block_type")
        keys.take(self.count, None)  # the pattern beats it
        return kinds

    def write(self, pairs: Sequence[Pair], config: dict[str, Any]) -> None:
        kinds = [mixer or ffn or "" for mixer, ffn in pairs]
        config[self.count] = len(kinds)
        config["hybrid_override_pattern"] = _as_pattern(kinds)
        config["layers_block_type"] = kinds


@dataclass(frozen=True)
class OneBlockTwice:
    """Multi-token prediction: the release holds one block, trained to be used at two depths."""

    def read(self, keys: Keys, model: Tree) -> None:
        kinds = _listed(keys, "mtp_hybrid_override_pattern", "mtp_layers_block_type") or ["attention", "moe"]
        number = keys.take("num_nextn_predict_layers")
        if number not in (0, 1):
            raise refused("num_nextn_predict_layers", number, "understood: 0, 1")
        model.set("mtp", {"layers": " ".join(kinds), "depth": 2, "shared": True} if number else None)

    def write(self, model: Tree, config: dict[str, Any]) -> None:
        mtp = model.get("mtp")
        config["num_nextn_predict_layers"] = 1 if mtp else 0
        if mtp:
            config["mtp_layers_block_type"] = list(expand(mtp["layers"]))


@dataclass(frozen=True)
class StepBounds:
    """Bounds of the state-space models' steps.

    The released definition takes `time_step_limit`. transformers 5 takes `time_step_min`, which elsewhere says how
    weights begin: it is written so that steps there are the same.
    """

    UNBOUNDED, UNBOUNDED_ABOVE = 1e-30, 1e308
    """Bounds that change nothing; the lower one has a logarithm, which initial weights ask for."""

    slot: str = "mamba"
    by_minimum: bool = True
    """The class in transformers takes `time_step_min`."""

    def read(self, keys: Keys, model: Tree) -> None:
        if self.by_minimum:
            keys.take("time_step_min", None)
        limit = keys.take("time_step_limit", None)
        if limit is None:
            limit = [0.0, math.inf]
        if not isinstance(limit, Sequence) or len(limit) != 2:
            raise refused("time_step_limit", limit, "must be a list of two numbers")
        low, high = (float("inf") if isinstance(bound, Mapping) else bound for bound in limit)
        model.set(f"{self.slot}.dt_min", low or None)
        model.set(f"{self.slot}.dt_max", None if isinstance(high, (int, float)) and high > 1e300 else high)

    def write(self, model: Tree, config: dict[str, Any]) -> None:
        mixer = model.get(self.slot) or {}
        low, high = mixer.get("dt_min"), mixer.get("dt_max")
        if self.by_minimum or low is not None or high is not None:
            config["time_step_limit"] = [low or 0.0, self.UNBOUNDED_ABOVE if high is None else high]
        if self.by_minimum:
            config["time_step_min"] = low or self.UNBOUNDED


_OURS, _LAYER = "layers.{n}.mixer", "backbone.layers.{n}"


def mamba2_weights(spec: Mamba2Spec, mixer: str = f"{_LAYER}.mixer") -> Iterator[WeightRow | JointRow]:
    """Projections are stored as one."""
    for kind in ("weight", "bias"):
        parts = tuple(f"{_OURS}.{part}.{kind}" for part in ("z", "x", "b", "c", "dt"))
        yield Fused(parts, f"{mixer}.in_proj.{kind}")
        for part, theirs in {"conv": "conv1d", "norm": "norm", "out": "out_proj"}.items():
            yield Same(f"{_OURS}.{part}.{kind}", (f"{mixer}.{theirs}.{kind}",))
    for part, theirs in {"a_log": "A_log", "dt_bias": "dt_bias", "skip": "D"}.items():
        yield Same(f"{_OURS}.{part}", (f"{mixer}.{theirs}",))


def _attention_weights(spec: AttentionSpec) -> Iterator[WeightRow]:
    for ours, theirs in {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "o_proj"}.items():
        yield Same(f"{_OURS}.{ours}.weight", (f"{_LAYER}.mixer.{theirs}.weight",))


def _ffn_weights() -> Iterator[WeightRow]:
    ffn, theirs = "layers.{n}.ffn", f"{_LAYER}.mixer"
    for part in ("up", "down"):
        yield Same(f"{ffn}.{part}.weight", (f"{theirs}.{part}_proj.weight",))
        yield Same(f"{ffn}.shared.{part}.weight", (f"{theirs}.shared_experts.{part}_proj.weight",))
        one, all_of_them = f"{theirs}.experts.{{e}}.{part}_proj.weight", f"{theirs}.experts.{part}_proj"
        yield Experts(f"{ffn}.experts.{part}", (one,), all_of_them)
    yield Same(f"{ffn}.router.weight", (f"{theirs}.gate.weight",))
    yield Same(f"{ffn}.router.correction_bias", (f"{theirs}.gate.e_score_correction_bias",))
    yield Same(f"{ffn}.latent_down.weight", (f"{theirs}.fc1_latent_proj.weight",))
    yield Same(f"{ffn}.latent_up.weight", (f"{theirs}.fc2_latent_proj.weight",))


NEMOTRON_H = Family(
    model_type="nemotron_h",
    architecture="NemotronHForCausalLM",
    slots={
        "mamba": Slot(Mamba2Spec, weights=mamba2_weights),
        "attention": Slot(AttentionSpec, weights=_attention_weights),
        "mlp": Slot(MLPSpec),
        "moe": Slot(MoESpec),
    },
    layers=SingleBlocks(
        Always("mamba"),
        Always("mlp"),
        {"mamba": ("mamba", None), "attention": ("attention", None), "mlp": (None, "mlp"), "moe": (None, "moe")},
    ),
    rows=(
        *trunk("layer_norm_epsilon rms_norm_eps norm_eps"),
        Const("norm.weight", "fp32"),
        Field("init.depth_scaled", "rescale_prenorm_residual"),
        Only("residual_in_fp32", False),
        Only("hidden_dropout", 0.0),
        *heads(),
        Field("attention.head_dim", "head_dim attention_head_dim"),
        Const("attention.rope", None),
        Only("attention_bias", False),
        Only("sliding_window", None),
        Field("mamba.num_heads", "mamba_num_heads"),
        Field("mamba.head_dim", "mamba_head_dim"),
        Field("mamba.num_groups", "n_groups mamba_n_groups"),
        Field("mamba.d_state", "ssm_state_size"),
        Field("mamba.conv_width", "conv_kernel mamba_d_conv"),
        Field("mamba.conv_bias", "use_conv_bias mamba_conv_bias"),
        Field("mamba.bias", "use_bias"),
        Field("mamba.chunk_size", "chunk_size mamba_chunk_size"),
        StepBounds(),
        Only("mamba_hidden_act", "silu"),
        Const("mlp.gated", False),
        Field("mlp.d_ffn", "intermediate_size"),
        Field("mlp.activation", "mlp_hidden_act", ACTIVATIONS),
        Only("mlp_bias", False),
        Const("moe.gated", False),
        Field("moe.activation", "mlp_hidden_act", ACTIVATIONS),
        Field("moe.num_experts", "n_routed_experts"),
        Field("moe.top_k", "num_experts_per_tok"),
        Field("moe.d_expert", "moe_intermediate_size"),
        Field("moe.d_latent", "moe_latent_size"),
        SharedWidth("moe", "moe_shared_expert_intermediate_size"),
        Only("n_shared_experts", 1, written=True),
        *sigmoid_router(),
        *router_groups(),
        OneBlockTwice(),
        *map(
            Inert,
            "expand mamba_expand mamba_proj_bias mamba_ssm_cache_dtype moe_shared_expert_overlap num_logits_to_keep"
            " partial_rotary_factor rope_theta time_step_floor time_step_max time_step_rank use_mamba_kernels".split(),
        ),
    ),
    weights=(
        Same("embed.weight", ("backbone.embeddings.weight",)),
        Same("norm.weight", ("backbone.norm_f.weight",)),
        Same("head.weight", ("lm_head.weight",)),
        Same("layers.{n}.mixer_norm.weight", (f"{_LAYER}.norm.weight",)),
        Same("layers.{n}.ffn_norm.weight", (f"{_LAYER}.norm.weight",)),
        *_ffn_weights(),
    ),
    layouts=({"backbone.": "model."},),
    tied_head=("lm_head.weight", "backbone.embeddings.weight"),
    mtp=MTPNames(NEMOTRON_NAMES, "backbone.", "mtp."),
    defaults={
        "chunk_size": 128,
        "conv_kernel": 4,
        "head_dim": 128,
        "initializer_range": 0.02,
        "intermediate_size": 21_504,
        "layer_norm_epsilon": 1e-5,
        "max_position_embeddings": 4096,
        "mlp_hidden_act": "relu2",
        "moe_intermediate_size": 7688,
        "moe_latent_size": None,
        "moe_shared_expert_intermediate_size": 7688,
        "n_group": 1,
        "n_groups": 8,
        "n_routed_experts": 8,
        "norm_topk_prob": True,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 8,
        "num_nextn_predict_layers": 0,
        "rescale_prenorm_residual": True,
        "routed_scaling_factor": 1.0,
        "ssm_state_size": 128,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "use_bias": False,
        "use_conv_bias": True,
    },
)

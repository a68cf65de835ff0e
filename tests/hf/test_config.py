"""Hugging Face configurations, read and written."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

import zoo
from zoo.hf import spec_from_hf, spec_to_hf
from zoo.spec import ConfigError, ModelSpec
from zoo.spec.rope import BandsScaling, DynamicScaling, LinearScaling, LongRopeScaling, RopeScaling, YarnScaling

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 128,
}
MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_key_value_heads": 2}
QWEN3 = {**LLAMA, "model_type": "qwen3", "head_dim": 16, "max_window_layers": 28}
QWEN3_MOE = {
    **LLAMA,
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}


def attention_of(config: dict[str, Any], slot: str = "attention") -> Any:
    return spec_from_hf(config).slots[slot]


def test_configs_need_no_torch() -> None:
    code = "import sys, zoo.hf; zoo.hf.spec_from_hf; zoo.hf.spec_to_hf; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_absent_keys_are_the_defaults_of_transformers() -> None:
    spec = spec_from_hf(LLAMA)
    assert spec.slots["attention"].num_kv_heads == 4  # type: ignore[attr-defined]
    assert spec.slots["attention"].head_dim == 8  # type: ignore[attr-defined]
    assert attention_of(LLAMA).rope.theta == 10_000
    assert attention_of(MIXTRAL).rope.theta == 1_000_000
    assert attention_of({**LLAMA, "model_type": "qwen3"}).head_dim == 128
    assert spec.norm.eps == 1e-6
    assert not spec.head.tied


SCALINGS: list[tuple[dict[str, Any], RopeScaling]] = [
    ({"rope_type": "linear", "factor": 2.0}, LinearScaling(factor=2.0)),
    ({"rope_type": "dynamic", "factor": 2.0}, DynamicScaling(factor=2.0, original_context=128)),
    (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        BandsScaling(factor=8.0, original_context=16),
    ),
    (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "truncate": False},
        YarnScaling(factor=4.0, original_context=32, truncate=False),
    ),
    (
        {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 32, "mscale": 0.7},
        YarnScaling(factor=4.0, original_context=32, mscale=0.7),
    ),
    (
        {
            "rope_type": "longrope",
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 32,
        },
        LongRopeScaling(short_factor=(1.0,) * 4, long_factor=(2.0,) * 4, original_context=32, factor=4.0),
    ),
]


@pytest.mark.parametrize(("parameters", "scaling"), SCALINGS, ids=lambda value: getattr(value, "type", ""))
def test_both_spellings_of_rope(parameters: dict[str, Any], scaling: RopeScaling) -> None:
    new = {**LLAMA, "rope_parameters": {"rope_theta": 5e5, **parameters}}
    old_type = {"type" if key == "rope_type" else key: value for key, value in parameters.items()}
    old = {**LLAMA, "rope_theta": 5e5, "rope_scaling": old_type}
    for config in (new, old, spec_to_hf(spec_from_hf(new))):
        rope = attention_of(config).rope
        assert rope.theta == 5e5
        assert rope.scaling == scaling


def test_rope_spellings_that_disagree_are_refused() -> None:
    config = {**LLAMA, "rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_scaling": {"factor": 4.0}}
    with pytest.raises(ConfigError, match="differ in factor"):
        spec_from_hf(config)


def test_window_over_all_layers() -> None:
    assert attention_of({**MIXTRAL, "sliding_window": 5}).window == 5
    assert attention_of(MIXTRAL).mask == "causal"
    assert attention_of({**QWEN3_MOE, "sliding_window": 5, "use_sliding_window": False}).mask == "causal"
    assert attention_of({**QWEN3_MOE, "sliding_window": 5, "use_sliding_window": True}).window == 5


def test_windows_in_some_layers() -> None:
    late = {**QWEN3, "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    assert spec_from_hf(late).layers == "dense 2*local"
    listed = {**late, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    assert spec_from_hf(listed).layers == "local dense local"
    assert attention_of(listed, "local").window == 5
    assert spec_from_hf(spec_to_hf(spec_from_hf(listed))) == spec_from_hf(listed)


def test_sparse_and_dense_layers() -> None:
    config = {**QWEN3_MOE, "num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    spec = spec_from_hf(config)
    assert spec.layer_kinds == ("dense", "sparse", "dense", "dense", "dense", "sparse")
    written = spec_to_hf(spec)
    assert written["mlp_only_layers"] == [0, 2, 3, 4]
    assert spec_from_hf(written) == spec


def test_spellings_of_the_number_of_experts() -> None:
    other = {key: value for key, value in QWEN3_MOE.items() if key != "num_experts"} | {"num_local_experts": 4}
    assert spec_from_hf(other) == spec_from_hf(QWEN3_MOE)
    with pytest.raises(ConfigError, match="num_local_experts is 8"):
        spec_from_hf({**QWEN3_MOE, "num_local_experts": 8})


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "qwen3_mo"}, "did you mean qwen3_moe"),
    ({"model_type": None}, "model_type: found None; understood: .*llama"),
    ({"logit_cap": 30.0}, "not understood for model_type 'llama': logit_cap"),
    ({"head_dims": 16}, "did you mean head_dim"),
    ({"attention_dropout": 0.1}, "attention_dropout: found 0.1; understood: 0.0"),
    ({"hidden_act": "mish"}, "hidden_act: found 'mish'; understood: 'silu'"),
    ({"hidden_act": ["silu"]}, "hidden_act: found"),
    ({"rope_scaling": {"rope_type": "spiral"}}, "rope_type: found 'spiral'; understood: default, linear"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "twist": 3}}, "rope_scaling.twist: found 3"),
    ({"rope_scaling": [2.0]}, "rope_scaling: found"),
    ({"num_hidden_layers": 10**12}, "num_hidden_layers: found 1000000000000"),
    ({"num_hidden_layers": "two"}, "num_hidden_layers: found 'two'"),
    ({"num_key_value_heads": 3}, "num_kv_heads: found 3; must divide num_heads"),
    ({"hidden_size": "wide"}, "model.d_model: found 'wide'"),
    ({"quantization_config": {"quant_method": "fp8"}}, "dequantize"),
    ({"is_encoder_decoder": True}, "is_encoder_decoder: found True"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=lambda value: next(iter(value)) if value else None)
def test_what_is_not_understood_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spec_from_hf({**LLAMA, **change})


def test_a_missing_size_is_named() -> None:
    with pytest.raises(ConfigError, match="hidden_size is missing"):
        spec_from_hf({key: value for key, value in LLAMA.items() if key != "hidden_size"})


def test_a_sliding_layer_needs_its_window() -> None:
    with pytest.raises(ConfigError, match="use_sliding_window"):
        spec_from_hf({**QWEN3, "layer_types": ["sliding_attention", "full_attention"]})


def changed(name: str, *overrides: str) -> ModelSpec:
    return zoo.load(name, *overrides)


@pytest.mark.parametrize(
    ("spec", "model_type"),
    [
        (changed("tiny_dense"), "qwen3"),
        (changed("tiny_moe"), "qwen3_moe"),
        (changed("tiny_dense", "model.attention.qk_norm=none"), "llama"),
        (changed("tiny_moe", "model.attention.qk_norm=none"), "mixtral"),
        (changed("tiny_moe", "model.attention.qk_norm=full", "model.moe.router.normalize=false"), "olmoe"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_the_family_that_expresses_a_model_is_found(spec: ModelSpec, model_type: str) -> None:
    assert spec_to_hf(spec)["model_type"] == model_type


def test_names_of_slots_and_kinds_do_not_matter() -> None:
    spec = changed("tiny_dense").to_dict()
    spec["looking"], spec["thinking"] = spec.pop("attention"), spec.pop("mlp")
    spec |= {"kinds": {"step": {"mixer": "looking", "ffn": "thinking"}}, "layers": "4*step"}
    assert spec_to_hf(ModelSpec.model_validate(spec)) == spec_to_hf(changed("tiny_dense"))


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("model.attention.softcap=30.0", "attention.softcap: 30.0 here, None there"),
        ("+model.residual_scale=0.5", "residual_scale: 0.5 here, 1.0 there"),
        ("+model.norm_placement=post", "kinds.dense.placement: 'post' here, 'pre' there"),
        ("+model.embedding.positions=512", "embedding.positions: 512 here, None there"),
    ],
)
def test_what_no_family_expresses_is_named(override: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"nearest is qwen3, but\n  {reason}"):
        spec_to_hf(changed("tiny_dense", override))


def test_balancing_and_initial_weights_are_no_obstacle() -> None:
    spec = changed("tiny_moe", "model.moe.balance.z_loss=0.1", "+model.init.depth_scaled=false")
    assert spec_to_hf(spec)["router_aux_loss_coef"] == 0.01

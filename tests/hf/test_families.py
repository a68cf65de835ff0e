"""Families of attention, dense and routed blocks, held against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.hf.checks import (
    LLAMA3,
    SIZES,
    YARN,
    Twin,
    check_layout_in_memory,
    check_logits,
    check_round_trip,
    filled,
    logits,
    scaled,
    stored,
)
from zoo.decoder import build
from zoo.hf import from_pretrained, save_pretrained, spec_from_hf
from zoo.hf.tensors import SINGLE
from zoo.spec import ConfigError


def by_type(full: dict[str, Any], **sliding: Any) -> dict[str, Any]:
    windowed = {"rope_type": "default", "rope_theta": 1000.0, **sliding}
    return {"rope_parameters": {"full_attention": full, "sliding_attention": windowed}}


OWN_NAMES = {"vocab_size": 61, "bos_token_id": None, "eos_token_id": None}
LINEAR = scaled("linear", factor=8.0)["rope_parameters"]
PROPORTIONAL = {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e5}
MIXED = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
LONG = {"rope_type": "longrope", "rope_theta": 5000.0, "long_factor": [1.0, 2.0, 3.0], "short_factor": [1.0, 1.1, 1.2]}
PHI_LONG = {
    "rope_type": "longrope",
    "rope_theta": 5000.0,
    "long_factor": [1.0, 2.0, 3.0, 4.0],
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_mscale": 1.3,
    "short_mscale": 1.1,
}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
ROUTED = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "n_group": 4, "topk_group": 2}
SHARED = {**ROUTED, "n_shared_experts": 2, "routed_scaling_factor": 2.5, "head_dim": 12}
GEMMA = {"head_dim": 10, "sliding_window": 5, "query_pre_attn_scalar": 9}
GEMMA4 = {
    "num_hidden_layers": 7,
    "head_dim": 10,
    "global_head_dim": 16,
    "num_global_key_value_heads": 1,
    "hidden_size_per_layer_input": 0,
    "sliding_window": 5,
    **by_type(PROPORTIONAL),
}
TWINS = [
    Twin("gpt2", "gpt2", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}, OWN_NAMES),
    Twin("mistral", "mistral", {"sliding_window": 5, "num_key_value_heads": 1, "head_dim": 10}),
    Twin(
        "ministral3",
        "ministral3",
        {"head_dim": 10, "rope_parameters": {**YARN["rope_parameters"], "llama_4_scaling_beta": 0.3}},
    ),
    Twin(
        "qwen2",
        "qwen2",
        {"num_key_value_heads": 1, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    Twin(
        "qwen2_moe",
        "qwen2_moe",
        {
            **EXPERTS,
            "shared_expert_intermediate_size": 28,
            "use_sliding_window": True,
            "sliding_window": 5,
            "mlp_only_layers": [1],
            **YARN,
        },
    ),
    Twin("gemma", "gemma", {"head_dim": 10, "num_key_value_heads": 1}),
    Twin("gemma2", "gemma2", {**GEMMA, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0}),
    Twin("gemma3", "gemma3_text", {**GEMMA, "num_hidden_layers": 7, **by_type(LINEAR)}),
    Twin("gemma4", "gemma4_text", {**GEMMA4, "final_logit_softcapping": 4.0}),
    Twin(
        "gemma4_moe",
        "gemma4_text",
        {
            **GEMMA4,
            "attention_k_eq_v": True,
            "enable_moe_block": True,
            "num_experts": 5,
            "top_k_experts": 2,
            "moe_intermediate_size": 20,
        },
    ),
    Twin(
        "gpt_oss",
        "gpt_oss",
        {
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "head_dim": 10,
            "sliding_window": 5,
            "rope_parameters": {**YARN["rope_parameters"], "truncate": False},
        },
    ),
    Twin("gpt_oss_unscaled", "gpt_oss", {"num_local_experts": 5, "rope_parameters": {"rope_type": "default"}}),
    Twin(
        "llama4",
        "llama4_text",
        {
            "num_hidden_layers": 5,
            "head_dim": 10,
            "attention_chunk_size": 5,
            "num_local_experts": 5,
            "intermediate_size_mlp": 40,
            "interleave_moe_layer_step": 2,
            "floor_scale": 7,
            **LLAMA3,
        },
    ),
    Twin(
        "llama4_untuned",
        "llama4_text",
        {
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "use_qk_norm": False,
            "attn_temperature_tuning": False,
            "no_rope_layers": [0, 1, 1],
            "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
            "attention_chunk_size": 5,
        },
    ),
    Twin("olmo2", "olmo2", {"num_key_value_heads": 1, **YARN}),
    Twin("olmo3", "olmo3", {"num_hidden_layers": 5, "sliding_window": 5, **by_type(YARN["rope_parameters"])}),
    Twin("glm4", "glm4", {"head_dim": 12, "num_key_value_heads": 1}),
    Twin("glm4_moe", "glm4_moe", {**SHARED, "use_qk_norm": True, "attention_bias": True}),
    Twin("glm4_moe_air", "glm4_moe", {**SHARED, "first_k_dense_replace": 2, "norm_topk_prob": False}),
    Twin(
        "phi3",
        "phi3",
        {
            "sliding_window": 5,
            "num_key_value_heads": 1,
            "original_max_position_embeddings": 8,
            "rope_parameters": {**LONG, "partial_rotary_factor": 0.75},
        },
    ),
    # transformers takes the short factors for long sequences too: equal ones, or a short sequence.
    Twin(
        "phimoe",
        "phimoe",
        {
            "num_local_experts": 5,
            "attention_bias": True,
            "lm_head_bias": True,
            "router_jitter_noise": 0.4,
            "rope_parameters": {
                **PHI_LONG,
                "short_factor": PHI_LONG["long_factor"],
                "original_max_position_embeddings": 8,
            },
        },
    ),
    Twin(
        "phimoe_short",
        "phimoe",
        {"num_local_experts": 5, "rope_parameters": {**PHI_LONG, "original_max_position_embeddings": 40}},
    ),
    Twin(
        "granitemoe",
        "granitemoe",
        {
            "num_local_experts": 5,
            "embedding_multiplier": 12.0,
            "logits_scaling": 6.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.3,
        },
    ),
    Twin(
        "minimax_m2", "minimax_m2", {"num_local_experts": 5, "num_experts_per_tok": 3, "head_dim": 12, "rotary_dim": 8}
    ),
    Twin(
        "hunyuan",
        "hunyuan_v1_moe",
        {
            "num_experts": 5,
            "moe_topk": [2, 2, 2],
            "head_dim": 10,
            "rope_parameters": {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0, "rope_theta": 5000.0},
        },
    ),
    Twin("hy_v3", "hy_v3", {**EXPERTS, "head_dim": 10, "num_shared_experts": 2}),
    Twin("ernie4_5", "ernie4_5", {"use_bias": True, "head_dim": 10}),
    Twin("ernie4_5_moe", "ernie4_5_moe", {"moe_num_experts": 6, "moe_k": 3, "moe_intermediate_size": 20}),
    Twin(
        "dbrx",
        "dbrx",
        {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 3,
            "max_seq_len": 64,
            "attn_config": {"clip_qkv": 1.0, "kv_n_heads": 2, "rope_theta": 5e5},
            "ffn_config": {"ffn_hidden_size": 20, "moe_num_experts": 5, "moe_top_k": 2},
        },
        OWN_NAMES,
    ),
    Twin("solar_open", "solar_open", SHARED),
    Twin(
        "mimo_v2_flash",
        "mimo_v2_flash",
        {
            **ROUTED,
            "num_hidden_layers": 7,
            "head_dim": 24,
            "v_head_dim": 10,
            "num_key_value_heads": 1,
            "sliding_window": 5,
            **by_type(
                {"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.334}, partial_rotary_factor=0.334
            ),
        },
    ),
    # The gates of a batch fill whole vector registers: transformers rounds softplus otherwise in those that are left.
    Twin(
        "laguna",
        "laguna",
        {
            **EXPERTS,
            "num_attention_heads": 8,
            "num_hidden_layers": 4,
            "shared_expert_intermediate_size": 28,
            "head_dim": 12,
            "sliding_window": 5,
            "layer_types": MIXED,
            "num_attention_heads_per_layer": [8, 16, 16, 8],
            "moe_routed_scaling_factor": 2.0,
            **by_type({**YARN["rope_parameters"], "partial_rotary_factor": 0.5}, partial_rotary_factor=1.0),
        },
    ),
    Twin(
        "laguna_elementwise",
        "laguna",
        {**EXPERTS, "num_hidden_layers": 4, "head_dim": 12, "layer_types": MIXED, "gating": "per-element"},
    ),
    Twin(
        "mellum",
        "mellum",
        {
            **EXPERTS,
            "num_hidden_layers": 4,
            "head_dim": 12,
            "sliding_window": 5,
            "layer_types": MIXED,
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
            **by_type(YARN["rope_parameters"]),
        },
    ),
    Twin("smollm3", "smollm3", {"num_hidden_layers": 5, **YARN}),
    Twin(
        "smollm3_windows",
        "smollm3",
        {"num_hidden_layers": 5, "no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 5},
    ),
]
twins = pytest.mark.parametrize("twin", TWINS, ids=lambda twin: twin.name)


@twins
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)], ids=["fp32", "fp64"])
def test_logits_equal_those_of_transformers(twin: Twin, dtype: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    check_logits(twin.build(seed=dtype.itemsize, dtype=dtype), 37, tolerance, tmp_path)


@twins
def test_zoo_to_hugging_face_and_back_is_bit_identical(twin: Twin, tmp_path: Path) -> None:
    check_round_trip(twin.build(), tmp_path)


STACKED = [
    "qwen2_moe",
    "glm4_moe",
    "phimoe",
    "granitemoe",
    "minimax_m2",
    "hunyuan",
    "hy_v3",
    "ernie4_5_moe",
    "solar_open",
    "mimo_v2_flash",
    "laguna",
    "mellum",
]


@pytest.mark.parametrize("name", STACKED)
def test_experts_stacked_as_in_the_memory_of_transformers(name: str, tmp_path: Path) -> None:
    check_layout_in_memory(next(twin for twin in TWINS if twin.name == name).build(), tmp_path)
    assert any(name.endswith("experts.gate_up_proj") for name in stored(tmp_path))


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
@pytest.mark.parametrize(("name", "outer"), [("gemma3", "gemma3"), ("llama4", "llama4"), ("mistral", "mistral3")])
def test_the_text_model_of_one_that_also_sees(name: str, outer: str, prefix: str, tmp_path: Path) -> None:
    reference = next(twin for twin in TWINS if twin.name == name).build()
    reference.save_pretrained(tmp_path)
    head = prefix.removesuffix("model.") if prefix.startswith("language") else ""
    tensors = {
        prefix + name.removeprefix("model.") if name.startswith("model.") else head + name: tensor
        for name, tensor in stored(tmp_path).items()
    }
    vision = {"multi_modal_projector.weight": torch.ones(2), "vision_tower.layers.0.weight": torch.ones(3)}
    save_file({**tensors, **vision}, tmp_path / SINGLE)
    text = json.loads((tmp_path / "config.json").read_text())
    config = {"model_type": outer, "text_config": text, "vision_config": {"hidden_size": 8}, "image_token_index": 7}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokens = torch.randint(0, 61, (1, 9))
    torch.testing.assert_close(logits(from_pretrained(tmp_path), tokens), logits(reference, tokens))

    (tmp_path / "config.json").write_text(json.dumps({**config, "logit_twist": 2}))
    with pytest.raises(ConfigError, match="not understood beside text_config: logit_twist"):
        from_pretrained(tmp_path)


def test_step_3_which_transformers_has_as_a_part_alone(tmp_path: Path) -> None:
    from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig
    from transformers.models.step3p7.modeling_step3p7 import Step3p7TextModel

    changes = {
        **{**ROUTED, "share_expert_dim": 28, "num_hidden_layers": 4, "head_dim": 12, "sliding_window": 5},
        **{"num_sliding_attention_heads": 6, "moe_router_scaling_factor": 2.0, "query_pre_attn_scalar": 9},
        **{"mlp_layer_types": ["dense", "dense", "sparse", "sparse"], "layer_types": MIXED},
        **by_type({**YARN["rope_parameters"], "partial_rotary_factor": 0.5}),
    }
    sizes = {**SIZES, **{key: value for key, value in changes.items() if key not in ("n_group", "topk_group")}}
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
        torch.manual_seed(0)
        config = Step3p7TextConfig(**{**sizes, "pad_token_id": 0})
        config._experts_implementation = "eager"
        trunk = Step3p7TextModel._from_config(config, dtype=dtype).eval()
        filled(trunk)
        head = torch.randn(61, 32, dtype=dtype)
        tensors = {f"model.{name}": tensor for name, tensor in trunk.state_dict().items()}
        save_file({**tensors, "lm_head.weight": head}, tmp_path / SINGLE)
        (tmp_path / "config.json").write_text(json.dumps({**config.to_dict(), "model_type": "step3p5"}))
        tokens = torch.randint(0, 61, (2, 37))
        with torch.no_grad():
            expected = trunk(tokens).last_hidden_state @ head.T
        model = from_pretrained(tmp_path)
        assert (logits(model, tokens) - expected).abs().max() < tolerance * expected.std()
        save_pretrained(model, tmp_path / "zoo")
        assert "model.layers.2.moe.up_proj.weight" in stored(tmp_path / "zoo")
        again = from_pretrained(tmp_path / "zoo")
        assert all(torch.equal(ours, again.state_dict()[name]) for name, ours in model.state_dict().items())


@pytest.mark.parametrize(
    ("twin", "key", "name"),
    [
        ("glm4_moe", "num_nextn_predict_layers", "model.layers.3.eh_proj.weight"),
        ("qwen2", "num_nextn_predict_layers", "model.mtp_layers.0.input_proj.weight"),
    ],
)
def test_blocks_of_multi_token_prediction(twin: str, key: str, name: str, tmp_path: Path) -> None:
    next(found for found in TWINS if found.name == twin).build().save_pretrained(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, key: 1}))
    trunk = from_pretrained(tmp_path / "hf")
    assert trunk.spec.mtp is not None
    model = build(trunk.spec.replace(mtp=trunk.spec.mtp.replace(enabled=True)))
    model.load_state_dict(trunk.state_dict(), strict=False)
    save_pretrained(model, tmp_path / "zoo")
    projection, proj = stored(tmp_path / "zoo")[name], model.state_dict()["mtp.0.proj.weight"]
    # One family has the embedding's half first, as we have, and the other one last.
    assert torch.equal(projection, proj if twin == "glm4_moe" else torch.cat((proj[:, 32:], proj[:, :32]), 1))
    back = from_pretrained(tmp_path / "zoo", spec=model.spec)
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in model.state_dict().items())
    tokens = torch.randint(0, 61, (1, 9))
    assert torch.equal(logits(from_pretrained(tmp_path / "zoo"), tokens), logits(trunk, tokens))


KEYS = {
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
}
SAME: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (
        "gemma3_text",
        {"rope_theta": 5e5, "rope_local_base_freq": 1e3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        by_type({"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5}),
    ),
    (
        "gemma3_text",
        {"sliding_window_pattern": 2},
        {"layer_types": ["sliding_attention", "full_attention"] * 3 + MIXED[1:2]},
    ),
    ("gemma", {"hidden_act": "gelu"}, {"hidden_act": "gelu_pytorch_tanh"}),
    ("olmo3", {"rope_theta": 5e3}, by_type({"rope_type": "default", "rope_theta": 5e3}, rope_theta=5e3)),
    ("phi3", {"partial_rotary_factor": 0.5}, {"rope_parameters": {"partial_rotary_factor": 0.5}}),
    ("minimax_m2", {"rotary_dim": 64}, {"rope_parameters": {"partial_rotary_factor": 0.5}}),
    ("glm4_moe", {"num_local_experts": 16}, {"n_routed_experts": 16}),
    ("hy_v3", {"first_k_dense_replace": 2}, {"mlp_layer_types": ["dense"] * 2 + ["sparse"] * 5}),
    ("llama4_text", {"interleave_moe_layer_step": 3}, {"moe_layers": [2, 5]}),
    (
        "mimo_v2_flash",
        {
            "hybrid_layer_pattern": [0, 1, 1, 0, 1, 1, 0],
            "moe_layer_freq": [0, 0, 1, 1, 1, 1, 1],
            "sliding_window_size": 4,
        },
        {
            "layer_types": [*MIXED, *MIXED[1:]],
            "mlp_layer_types": ["dense"] * 2 + ["sparse"] * 5,
            "sliding_window": 5,
        },
    ),
    ("smollm3", {"no_rope_layer_interval": 3}, {"no_rope_layers": [1, 1, 0, 1, 1, 0, 1]}),
]


@pytest.mark.parametrize(("model_type", "hub", "new"), SAME, ids=lambda value: value if isinstance(value, str) else "")
def test_spellings_that_mean_the_same(model_type: str, hub: dict[str, Any], new: dict[str, Any]) -> None:
    config = {**KEYS, "model_type": model_type}
    assert spec_from_hf({**config, **hub}) == spec_from_hf({**config, **new})
    assert spec_from_hf({**config, **hub}) != spec_from_hf(config) or model_type == "gemma"


def test_the_rotary_base_of_dbrx_that_transformers_overlooks() -> None:
    config = {"model_type": "dbrx", "d_model": 32, "n_heads": 4, "n_layers": 1, "attn_config": {"rope_theta": 5e5}}
    assert spec_from_hf(config).slots["attention"].rope.theta == 5e5  # type: ignore[attr-defined]
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
    assert spec_from_hf(config).slots["attention"].rope.theta == 1e4  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("model_type", "change", "message"),
    [
        ("gemma4_text", {"hidden_size_per_layer_input": 256}, "hidden_size_per_layer_input: found 256; understood: 0"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention: found True"),
        ("step3p5", {"swiglu_limits": [7.0]}, "swiglu_limits: found"),
        ("hunyuan_v1_moe", {"moe_topk": [1, 2]}, "moe_topk: found .* must be the same in all layers"),
        ("hunyuan_v1_moe", {"use_mla": True}, "use_mla: found True; understood: False"),
        ("mimo_v2_flash", {"swa_num_key_value_heads": 2}, "swa_num_key_value_heads: found 2; must be 4"),
        ("laguna", {"num_attention_heads_per_layer": [4, 8]}, "must be the same in all full_attention layers"),
        ("llama4_text", {"no_rope_layers": [1]}, "no_rope_layers: found .* must be a list of 7 numbers"),
        ("olmo3", {"rope_parameters": {"rope_type": "yarn"}}, "must be an object of objects"),
    ],
)
def test_what_is_not_understood_is_refused(model_type: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spec_from_hf({**KEYS, "model_type": model_type, **change})

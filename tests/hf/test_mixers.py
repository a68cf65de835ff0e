"""Families whose layers mix the sequence otherwise than by attention to keys and values, held against transformers."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.hf import checks
from tests.hf.checks import (
    EXPERTS,
    SIZES,
    YARN,
    check_layout_in_memory,
    check_logits,
    check_round_trip,
    logits,
    same_tensors,
    stored,
)
from zoo.hf import from_pretrained, save_pretrained
from zoo.hf.tensors import SINGLE

LENGTH = 40
"""Long against windows and chunks. Sizes then fill vector registers: of a rest, torch rounds sigmoids differently."""


def uneven(model: nn.Module) -> None:
    """Random weights as for other families, with the decays and convolutions of recurrences in their range."""
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            nn.init.uniform_(parameter, -2.0, 0.0)
        elif parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.8 if "conv" in name else 0.2)
        else:
            parameter.data += torch.rand_like(parameter) - 0.5
    for name, buffer in model.named_buffers():
        if name.endswith("bias"):
            nn.init.uniform_(buffer, -0.5, 0.5)


Twin = partial(checks.Twin, fill=uneven)


LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
}
CHOICE = {
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
}
ROUTED = {**CHOICE, "n_routed_experts": 8}
DEEP_YARN = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 5000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 8,
        "mscale": 0.9,
        "mscale_all_dim": 0.7,
    }
}
DENSE_FIRST = {"first_k_dense_replace": 1}
MAMBA = {
    "mamba_num_heads": 8,
    "mamba_head_dim": 6,
    "n_groups": 2,
    "ssm_state_size": 10,
    "chunk_size": 16,
    "head_dim": 12,
    "time_step_min": 1e-30,  # transformers bounds steps by it; the released definition does not
}
DELTA = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
    "head_dim": 16,
}
QWEN_EXPERTS = {
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 28,
}
KDA = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
GRANITE = {
    "layer_types": ["mamba", "attention", "mamba"],
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 10,
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.7,
    "logits_scaling": 4.0,
}
LFM = {"layer_types": ["conv", "full_attention", "conv"], "conv_bias": True, "num_key_value_heads": 1, "head_dim": 8}
TWINS = [
    Twin("deepseek_v2_lite", "deepseek_v2", {**LATENT, **ROUTED, **DENSE_FIRST, **DEEP_YARN, "q_lora_rank": None}),
    Twin(
        "deepseek_v2",
        "deepseek_v2",
        {**LATENT, **ROUTED, **DENSE_FIRST, "topk_method": "group_limited_greedy", "attention_bias": True},
    ),
    Twin("deepseek_v3", "deepseek_v3", {**LATENT, **ROUTED, **DENSE_FIRST, **DEEP_YARN, "rms_norm_eps": 1e-5}),
    Twin(
        "deepseek_v3_half",
        "deepseek_v3",
        {**LATENT, **ROUTED, **DENSE_FIRST, "q_lora_rank": None, "rope_interleave": False, "attention_bias": True},
    ),
    Twin(
        "deepseek_v32",
        "deepseek_v32",
        {**LATENT, **ROUTED, **DENSE_FIRST, **DEEP_YARN, "index_topk": 7, "index_n_heads": 8, "index_head_dim": 10},
    ),
    Twin("glm4_moe_lite", "glm4_moe_lite", {**LATENT, **ROUTED, "q_lora_rank": None, "rope_interleave": False}),
    Twin(
        "glm_moe_dsa",
        "glm_moe_dsa",
        {
            **LATENT,
            **ROUTED,
            **DENSE_FIRST,
            "num_hidden_layers": 5,
            "indexer_types": ["full", "shared", "full", "shared", "shared"],
            "index_topk": 7,
            "index_n_heads": 8,
            "index_head_dim": 12,
        },
    ),
    Twin("axk1", "axk1", {**LATENT, **ROUTED, **DEEP_YARN}),
    Twin(
        "mistral4",
        "mistral4",
        {
            **LATENT,
            **ROUTED,
            "q_lora_rank": None,
            "rope_parameters": {
                **DEEP_YARN["rope_parameters"],
                "llama_4_scaling_beta": 0.3,
                "partial_rotary_factor": 8 / 14,
            },
        },
    ),
    Twin("nemotron_h", "nemotron_h", {**MAMBA, "hybrid_override_pattern": "M-*M-", "num_key_value_heads": 1}),
    Twin(
        "nemotron_3",
        "nemotron_h",
        {
            **MAMBA,
            **ROUTED,
            "n_shared_experts": 1,
            "hybrid_override_pattern": "ME*EM",
            "moe_latent_size": 12,
            "moe_shared_expert_intermediate_size": 24,
            "use_conv_bias": False,
        },
    ),
    Twin(
        "qwen3_next",
        "qwen3_next",
        {
            **DELTA,
            **QWEN_EXPERTS,
            "num_key_value_heads": 1,
            "decoder_sparse_step": 2,
            "partial_rotary_factor": 0.5,
        },
    ),
    Twin("qwen3_5", "qwen3_5_text", {**DELTA, "linear_num_key_heads": 4, "linear_value_head_dim": 6}),
    Twin("qwen3_5_moe", "qwen3_5_moe_text", {**DELTA, **QWEN_EXPERTS, "tie_word_embeddings": True}),
    Twin(
        "kimi_linear",
        "kimi_linear",
        {
            **LATENT,
            **CHOICE,
            **KDA,
            "q_lora_rank": None,
            "mlp_layer_types": ["sparse", "sparse", "sparse"],  # it misnames the dense when it saves
            "num_experts": 8,
            "linear_num_heads": 3,
            "linear_head_dim": 6,
        },
    ),
    Twin(
        "bailing_hybrid",
        "bailing_hybrid",
        {**LATENT, **CHOICE, **KDA, **DENSE_FIRST, "q_lora_rank": None, "num_experts": 8, "head_dim": 12},
    ),
    Twin(
        "granite_hybrid",
        "granitemoehybrid",
        {
            **GRANITE,
            "num_local_experts": 5,
            "shared_intermediate_size": 24,
            "tie_word_embeddings": True,
            "time_step_limit": [0.1, 0.5],
            "mamba_proj_bias": True,
        },
    ),
    Twin(
        "granite_hybrid_dense",
        "granitemoehybrid",
        {**GRANITE, "num_local_experts": 0, "num_experts_per_tok": 0, "position_embedding_type": "rope"},
    ),
    Twin("olmo_hybrid", "olmo_hybrid", {**DELTA, "linear_num_key_heads": 4, "linear_value_head_dim": 6, **YARN}),
    Twin(
        "jamba",
        "jamba",
        {
            **EXPERTS,
            "attn_layer_period": 3,
            "attn_layer_offset": 1,
            "expert_layer_offset": 0,
            "num_key_value_heads": 1,
            "num_hidden_layers": 4,
            "mamba_d_state": 5,
            "mamba_proj_bias": True,
        },
    ),
    Twin("lfm2_moe", "lfm2_moe", {**LFM, **EXPERTS, "num_dense_layers": 1, "moe_intermediate_size": 20}),
    Twin("lfm2_moe_unbiased", "lfm2_moe", {**LFM, **EXPERTS, "num_dense_layers": 1, "use_expert_bias": False}),
    Twin("lfm3", "lfm3", {**LFM, "layer_types": [*LFM["layer_types"][:-1], "sliding_attention"], "sliding_window": 5}),
    Twin("lfm3_plain", "lfm3", {**LFM, "use_sandwich_norm": False, "use_attention_gate": False, "head_dim": 12}),
    Twin(
        "minimax_m3",
        "minimax_m3_vl_text",
        {
            "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
            "mlp_layer_types": ["dense", "dense", "sparse"],
            "dense_intermediate_size": 44,
            "shared_intermediate_size": 28,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "rotary_dim": 8,
            "index_n_heads": 2,
            "index_head_dim": 12,
            "index_block_size": 4,
            "index_topk_blocks": 3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
        },
    ),
]
twins = pytest.mark.parametrize("twin", TWINS, ids=lambda twin: twin.name)


class Wide:
    """Whether transformers' casts to fp32 are casts to fp64 just now.

    Its recurrent mixers compute in fp32 whatever the dtype, and ours in the wider of the two. Two ways to sum up agree
    in fp64 only if both are in it. Norms, softmax and rotations inside and outside of them stay as they are.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._inside = [False]
        self._patch, to_fp32 = monkeypatch, torch.Tensor.float
        self._patch.setattr(torch.Tensor, "float", lambda x: x.double() if self._inside[-1] else to_fp32(x))

    def __getattr__(self, name: str) -> Any:
        """The module torch, as a modeling file sees it."""
        return torch.float64 if name == "float32" and self._inside[-1] else getattr(torch, name)

    def widen(self, model: nn.Module) -> None:
        """Let casts inside the recurrent mixers of a model be wide, and that of its logits."""
        self._patch.setattr(f"{type(model).__module__}.torch", self)
        inside_delta = {f"{name}.norm" for name, module in model.named_modules() if "Delta" in type(module).__name__}
        for name, module in model.named_modules():
            kind = type(module).__name__
            if name == "model" or ("Norm" in kind and name.replace(".o_norm", ".norm") not in inside_delta):
                self._while_inside(module, False)
            elif not name or any(word in kind for word in ("Delta", "Mamba2", "MambaLayer")):
                self._while_inside(module, True)
            elif kind.endswith("Experts"):  # one class sums up in the dtype of the weights
                module.register_forward_pre_hook(lambda _, given: tuple(map(_doubled, given)))

    def _while_inside(self, module: nn.Module, wide: bool) -> None:
        module.register_forward_pre_hook(lambda *_: self._inside.append(wide))
        module.register_forward_hook(lambda *_: self._inside.__delitem__(-1))


def _doubled(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


@twins
def test_logits_equal_those_of_transformers(twin: checks.Twin, tmp_path: Path) -> None:
    check_logits(twin.build(), LENGTH, 1e-4, tmp_path)


@twins
def test_fp64_logits_equal_those_of_transformers(
    twin: checks.Twin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = twin.build(1, torch.float64)
    reference.save_pretrained(tmp_path / "hf")
    tokens = torch.randint(0, SIZES["vocab_size"], (2, LENGTH))
    as_it_is = logits(reference, tokens)
    Wide(monkeypatch).widen(reference)
    expected = logits(reference, tokens)
    model = from_pretrained(tmp_path / "hf")
    found = logits(model, tokens)
    assert found.dtype == torch.float64
    assert (found - expected).abs().max() < 1e-9 * expected.std()
    assert (found - as_it_is).abs().max() < 1e-4 * expected.std()
    save_pretrained(model, tmp_path / "zoo")
    assert same_tensors(tmp_path / "hf", tmp_path / "zoo")


@twins
def test_zoo_to_hugging_face_and_back_is_bit_identical(twin: checks.Twin, tmp_path: Path) -> None:
    check_round_trip(twin.build(), tmp_path)


@twins
def test_layouts_of_the_memory_of_transformers(twin: checks.Twin, tmp_path: Path) -> None:
    check_layout_in_memory(twin.build(), tmp_path)


def twin_of(name: str) -> checks.Twin:
    return next(twin for twin in TWINS if twin.name == name)


def test_the_bound_of_steps_is_a_departure_that_a_description_can_switch_on(tmp_path: Path) -> None:
    """transformers bounds the steps of this family by `time_step_min`; the released definition does not."""
    twin = twin_of("nemotron_h")
    reference = Twin("bounded", twin.model_type, {**twin.changes, "time_step_min": 0.3}).build()
    reference.save_pretrained(tmp_path)
    tokens = torch.randint(0, SIZES["vocab_size"], (2, LENGTH))
    expected = logits(reference, tokens)
    released = from_pretrained(tmp_path)
    assert (logits(released, tokens) - expected).abs().max() > 1e-2 * expected.std()

    mamba = released.spec.slots["mamba"].replace(dt_min=0.3)
    bounded = from_pretrained(tmp_path, spec=released.spec.replace(slots={**released.spec.slots, "mamba": mamba}))
    assert (logits(bounded, tokens) - expected).abs().max() < 1e-4 * expected.std()


def as_on_the_hub(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A tensor of the text model of MiniMax-M3 in the names of its release."""
    name = f"language_model.{name}".replace(".indexer.", ".index_")
    if ".mlp.experts." in name:
        begin = name.replace(".mlp.", ".block_sparse_moe.").rpartition(".")[0]
        parts = {"w1": 0, "w3": 1} if name.endswith("gate_up_proj") else {"w2": 0}
        split = tensor.chunk(len(parts), 1)
        return {
            f"{begin}.{expert}.{part}.weight": split[index][expert].clone()
            for part, index in parts.items()
            for expert in range(len(tensor))
        }
    for inside in ("gate.weight", "shared_experts."):
        name = name.replace(f".mlp.{inside}", f".block_sparse_moe.{inside}")
    name = name.replace(".mlp.gate.e_score", ".block_sparse_moe.e_score")
    if "gate_up_proj" in name:
        gate, up = tensor.chunk(2)
        return {name.replace("gate_up", "gate"): gate.clone(), name.replace("gate_up", "up"): up.clone()}
    return {name: tensor}


def test_a_model_that_also_sees_is_read_as_its_release_holds_it(tmp_path: Path) -> None:
    reference = twin_of("minimax_m3").build()
    reference.save_pretrained(tmp_path)
    tensors = {
        "vision_tower.vision_model.embeddings.weight": torch.zeros(2),
        "patch_merge_mlp.linear_1.bias": torch.ones(2),
    }
    for name, tensor in stored(tmp_path).items():
        tensors |= as_on_the_hub(name, tensor)
    save_file(tensors, tmp_path / SINGLE)
    text = json.loads((tmp_path / "config.json").read_text())
    whole = {"model_type": "minimax_m3_vl", "text_config": text, "vision_config": {"hidden_size": 2}}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    tokens = torch.randint(0, SIZES["vocab_size"], (2, LENGTH))
    torch.testing.assert_close(logits(from_pretrained(tmp_path), tokens), logits(reference, tokens))

"""Whole mixture-of-experts blocks against those of transformers: outputs and the gradient of the input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Config, DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Config, DeepseekV3MoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssMLP
from transformers.models.llama4.modeling_llama4 import Llama4TextConfig, Llama4TextMoe
from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2Config, MiniMaxM2SparseMoeBlock
from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHConfig, NemotronHMoE
from transformers.models.olmoe.modeling_olmoe import OlmoeConfig, OlmoeSparseMoeBlock
from transformers.models.phimoe.modeling_phimoe import PhimoeConfig, PhimoeSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeConfig, Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeSparseMoeBlock

from zoo.blocks.moe import MoE

D, E, C, F = 32, 8, 2, 16
MODEL = {"hidden_size": D, "num_experts_per_tok": C}
ROUTED = {
    **MODEL,
    "n_routed_experts": E,
    "moe_intermediate_size": F,
    "routed_scaling_factor": 2.5,
    "n_shared_experts": 2,
}
GROUPS = {"n_group": 4, "topk_group": 2}
IN_GROUPS = {"num_groups": 4, "top_groups": 2}
SIGMOID = {"type": "top_k", "score": "sigmoid", "correction_bias": True}
SCALED = {**SIGMOID, "route_scale": 2.5}
NEMOTRON = {
    **ROUTED,
    "n_group": 1,
    "topk_group": 1,
    "moe_shared_expert_intermediate_size": 40,
    "mlp_hidden_act": "relu2",
}
NEMOTRON_OPTIONS = {
    "router": SCALED,
    "num_shared_experts": 1,
    "d_shared_expert": 40,
    "gated": False,
    "activation": "relu2",
}

PEERS: dict[str, tuple[Any, Any, dict[str, Any], dict[str, Any]]] = {
    "mixtral": (
        MixtralSparseMoeBlock,
        MixtralConfig,
        {**MODEL, "num_local_experts": E, "intermediate_size": F},
        {},
    ),
    "qwen2_moe": (
        Qwen2MoeSparseMoeBlock,
        Qwen2MoeConfig,
        {**MODEL, "num_experts": E, "moe_intermediate_size": F, "shared_expert_intermediate_size": 40},
        {
            "router": {"type": "top_k", "normalize": False},
            "num_shared_experts": 1,
            "d_shared_expert": 40,
            "shared_gate": True,
        },
    ),
    "qwen3_moe": (
        Qwen3MoeSparseMoeBlock,
        Qwen3MoeConfig,
        {**MODEL, "num_experts": E, "moe_intermediate_size": F, "norm_topk_prob": True},
        {},
    ),
    "olmoe": (
        OlmoeSparseMoeBlock,
        OlmoeConfig,
        {**MODEL, "num_experts": E, "intermediate_size": F, "norm_topk_prob": False},
        {"router": {"type": "top_k", "normalize": False}},
    ),
    "deepseek_v2": (
        DeepseekV2Moe,
        DeepseekV2Config,
        {**ROUTED, **GROUPS, "num_attention_heads": 1, "topk_method": "group_limited_greedy"},
        {
            "router": {"type": "top_k", "normalize": False, "route_scale": 2.5, "group_score": "max", **IN_GROUPS},
            "num_shared_experts": 2,
        },
    ),
    "deepseek_v3": (
        DeepseekV3MoE,
        DeepseekV3Config,
        {**ROUTED, **GROUPS},
        {"router": {**SCALED, **IN_GROUPS}, "num_shared_experts": 2},
    ),
    "gpt_oss": (
        GptOssMLP,
        GptOssConfig,
        {**MODEL, "num_local_experts": E, "intermediate_size": F},
        {
            "router": {"type": "top_k", "score_chosen": True, "logit_bias": True},
            "activation": "clamped_swish",
            "activation_limit": 7.0,
            "bias": True,
        },
    ),
    "llama4": (
        Llama4TextMoe,
        Llama4TextConfig,
        {**MODEL, "num_local_experts": E, "intermediate_size": F, "num_experts_per_tok": 1},
        {
            "top_k": 1,
            "router": {"type": "top_k", "score": "sigmoid", "score_chosen": True, "normalize": False, "weigh": "input"},
            "num_shared_experts": 1,
        },
    ),
    "llama4_top2": (
        Llama4TextMoe,
        Llama4TextConfig,
        {**MODEL, "num_local_experts": E, "intermediate_size": F},
        {
            "router": {"type": "top_k", "score": "sigmoid", "score_chosen": True, "normalize": False, "weigh": "input"},
            "num_shared_experts": 1,
        },
    ),
    "minimax_m2": (
        MiniMaxM2SparseMoeBlock,
        MiniMaxM2Config,
        {**MODEL, "num_local_experts": E, "intermediate_size": F},
        {"router": SIGMOID},
    ),
    "nemotron_h": (NemotronHMoE, NemotronHConfig, {**NEMOTRON, "moe_latent_size": None}, NEMOTRON_OPTIONS),
    "nemotron_h_latent": (
        NemotronHMoE,
        NemotronHConfig,
        {**NEMOTRON, "moe_latent_size": 24},
        {**NEMOTRON_OPTIONS, "d_latent": 24},
    ),
    "phimoe": (
        PhimoeSparseMoeBlock,
        PhimoeConfig,
        {**MODEL, "num_local_experts": E, "intermediate_size": F, "router_jitter_noise": 0.05},
        {"router": {"type": "sparse_mixer", "jitter": 0.05}},
    ),
}

NAMES = {
    "shared_experts": "shared",
    "shared_expert": "shared",
    "shared_expert_gate": "shared_gate",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "gate_up_proj": "gate_up",
    "gate_up_proj_bias": "gate_up_bias",
    "down_proj_bias": "down_bias",
    "fc1_latent_proj": "latent_down",
    "fc2_latent_proj": "latent_up",
    "e_score_correction_bias": "correction_bias",
}


def own_name(name: str) -> str:
    parts = name.split(".")
    if parts[0] == "gate":
        parts[0] = "router"
    if parts == ["e_score_correction_bias"]:
        parts = ["router", *parts]
    return ".".join(NAMES.get(part, part) for part in parts)


def transposed(tensor: Tensor) -> Tensor:
    return tensor.mT if tensor.ndim == 3 else tensor


def deinterleaved(tensor: Tensor) -> Tensor:
    """Gate and up columns in turns, to gate rows above up rows."""
    tensor = torch.cat((tensor[..., ::2], tensor[..., 1::2]), -1)
    return transposed(tensor)


def layout(name: str, parameter: str) -> Callable[[Tensor], Tensor]:
    if name == "gpt_oss" and "gate_up" in parameter:
        return deinterleaved
    return transposed if name in ("gpt_oss", "llama4", "llama4_top2") else lambda tensor: tensor


def like(moe: MoE, peer: nn.Module, name: str) -> None:
    """Random weights, the same in both; every tensor of ours is set."""
    mine = moe.state_dict()
    for other, tensor in [*peer.named_parameters(), *peer.named_buffers()]:
        tensor.data.normal_(std=0.3)
        own = mine.pop(own_name(other))
        own.copy_(layout(name, other)(tensor.data).reshape(own.shape))
    assert not mine


@pytest.mark.parametrize("backend", ["auto", "grouped", "loop"])
@pytest.mark.parametrize("name", PEERS)
def test_equals_transformers(name: str, backend: str) -> None:
    peer_class, config_class, config, options = PEERS[name]
    peer = peer_class(config_class(**config)).eval()
    moe = MoE(D, **{"num_experts": E, "top_k": C, "d_expert": F, **options}).eval()
    moe.experts.backend = backend
    like(moe, peer, name)
    x = torch.randn(3, 20, D, requires_grad=True)
    expected = peer(x)
    expected = expected[0] if isinstance(expected, tuple) else expected
    expected, found = expected.view(x.shape), moe(x)
    close = {"rtol": 1e-5, "atol": 1e-5 * float(expected.detach().abs().max())}
    torch.testing.assert_close(found, expected, **close)

    probe = torch.randn(x.shape)
    (mine,) = torch.autograd.grad((found * probe).sum(), x)
    (other,) = torch.autograd.grad((expected * probe).sum(), x)
    torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))

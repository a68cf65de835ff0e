"""Small latent attention of both worlds, with the same weights."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from zoo.blocks.mla import MLA
from zoo.spec.norm import NormSpec

D = 48
BASE: dict[str, Any] = {
    "num_heads": 4,
    "d_kv_latent": 16,
    "nope_head_dim": 12,
    "rope_head_dim": 8,
    "v_head_dim": 10,
}
HF_BASE: dict[str, Any] = {
    "hidden_size": D,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "max_position_embeddings": 128,
}


def hf_config(name: str, prefix: str, **changes: Any) -> Any:
    """The config of a small model of a family of transformers."""
    module = importlib.import_module(f"transformers.models.{name}.configuration_{name}")
    config = getattr(module, f"{prefix}Config")(**{**HF_BASE, **changes})
    config._attn_implementation = "sdpa"
    return config


def hf_class(name: str, title: str) -> Any:
    return getattr(importlib.import_module(f"transformers.models.{name}.modeling_{name}"), title)


def copy_weights(hf: nn.Module, block: MLA) -> None:
    """From an attention of transformers: its projections of keys and values are fused by head."""
    spec = block.spec
    fused = hf.kv_b_proj.weight.unflatten(0, (spec.num_heads, -1))
    down = hf.kv_a_proj_with_mqa
    pairs = {"kv_norm": hf.kv_a_layernorm, "out": hf.o_proj}
    if spec.d_q_latent is None:
        pairs |= {"q": hf.q_proj}
    else:
        pairs |= {"q_down": hf.q_a_proj, "q_norm": hf.q_a_layernorm, "q": hf.q_b_proj}
    if spec.gate != "none":
        pairs |= {"gate": hf.g_proj}
    if block.indexer is not None:
        names = {"q": "wq_b", "k": "wk", "k_norm": "k_norm", "weights": "weights_proj"}
        pairs |= {f"indexer.{name}": getattr(hf.indexer, theirs) for name, theirs in names.items()}
    weights = {f"{name}.{key}": tensor for name, module in pairs.items() for key, tensor in module.named_parameters()}
    for key, tensor in down.named_parameters():
        weights[f"kv_down.{key}"], weights[f"k_shared.{key}"] = tensor.split((spec.d_kv_latent, spec.rope_head_dim))
    weights["k.weight"] = fused[:, : spec.nope_head_dim].flatten(0, 1)
    weights["v.weight"] = fused[:, spec.nope_head_dim :].flatten(0, 1)
    block.load_state_dict(weights)


def both(name: str, prefix: str, config: Any, dtype: torch.dtype, **options: Any) -> tuple[nn.Module, MLA]:
    """An attention of transformers with large random weights, and ours. Its latent norms have eps 1e-6 always."""
    hf = hf_class(name, f"{prefix}Attention")(config, 0)
    for parameter in hf.parameters():
        parameter.data.normal_(std=0.3)
    block = MLA(D, norm=NormSpec(eps=1e-5), latent_eps=1e-6, **{**BASE, **options})
    copy_weights(hf, block)
    return hf.to(dtype), block.to(dtype)


def run_hf(hf: nn.Module, name: str, prefix: str, config: Any, x: Tensor) -> Tensor:
    """What transformers makes of whole rows x [b, s, d]."""
    positions = torch.arange(x.shape[1])[None]
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril().expand(len(x), 1, -1, -1)
    arguments: dict[str, Any] = {"attention_mask": mask, "position_ids": positions}
    if name != "kimi_linear":
        arguments["position_embeddings"] = hf_class(name, f"{prefix}RotaryEmbedding")(config)(x, positions)
    y: Tensor = hf(hidden_states=x, **arguments)[0]
    return y

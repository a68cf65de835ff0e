"""Small models that tests share."""

from __future__ import annotations

from typing import Any

import torch

from zoo.decoder import Decoder, build
from zoo.spec.base import decode
from zoo.spec.model import ModelSpec

ATTENTION: dict[str, Any] = {"type": "gqa", "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
SLIDING: dict[str, Any] = {**ATTENTION, "mask": "sliding", "window": 4}
MLP: dict[str, Any] = {"type": "mlp", "d_ffn": 48}
MOE: dict[str, Any] = {"type": "moe", "num_experts": 6, "top_k": 2, "d_expert": 16, "balance": {"aux_loss": 0.01}}


def small_spec(**changes: Any) -> ModelSpec:
    """One dense and one sparse layer, the first with a window."""
    settings: dict[str, Any] = {
        "d_model": 32,
        "vocab_size": 64,
        "local": SLIDING,
        "attention": ATTENTION,
        "mlp": MLP,
        "moe": MOE,
        "kinds": {"dense": {"mixer": "local", "ffn": "mlp"}, "sparse": {"mixer": "attention", "ffn": "moe"}},
        "layers": "dense sparse",
    }
    return decode(ModelSpec, {**settings, **changes})


def small_model(dtype: torch.dtype = torch.float32, std: float = 0.2, **changes: Any) -> Decoder:
    """A model of `small_spec` whose weights are large enough that every part matters."""
    return build(small_spec(init={"std": std, "depth_scaled": False}, **changes), dtype=dtype)


def tokens(batch_size: int, seq_len: int, vocab_size: int = 64, seed: int = 0) -> torch.Tensor:
    """Random token ids [batch_size, seq_len]."""
    return torch.randint(0, vocab_size, (batch_size, seq_len), generator=torch.Generator().manual_seed(seed))

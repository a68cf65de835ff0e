"""Families whose layers mix the sequence otherwise than by attention to keys and values, held against transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from tests.hf.test_checkpoint import SIZES, logits, reopened, same_tensors, stored
from zoo.hf import from_pretrained, save_pretrained


@dataclass(frozen=True)
class Twin:
    """A small model of a transformers class with an odd shape."""

    name: str
    model_type: str
    changes: dict[str, Any]

    def build(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Random weights of a size that makes logits sharp, norms uneven and choices differ from scores."""
        torch.manual_seed(seed)
        config = transformers.AutoConfig.for_model(self.model_type, **{**SIZES, **self.changes})
        model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager", dtype=dtype)
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.3)
            elif name.endswith((".A_log", ".dt_bias")):
                nn.init.uniform_(parameter, -1.0, 1.0)
            else:
                nn.init.uniform_(parameter, 0.5, 1.5)
        for name, buffer in model.named_buffers():
            if name.endswith("bias"):
                nn.init.uniform_(buffer, -0.5, 0.5)
        return model.eval()


LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
}
ROUTED = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
}
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
]
twins = pytest.mark.parametrize("twin", TWINS, ids=lambda twin: twin.name)


@pytest.fixture(autouse=True)
def quiet_transformers() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@twins
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)], ids=["fp32", "fp64"])
def test_logits_equal_those_of_transformers(twin: Twin, dtype: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    reference = twin.build(int(dtype == torch.float64), dtype)
    reference.save_pretrained(tmp_path / "hf")
    tokens = torch.randint(0, SIZES["vocab_size"], (2, 37))
    expected = logits(reference, tokens)
    model = from_pretrained(tmp_path / "hf")
    found = logits(model, tokens)
    assert found.dtype == dtype
    assert (found - expected).abs().max() < tolerance * expected.std()

    save_pretrained(model, tmp_path / "zoo")
    assert same_tensors(tmp_path / "hf", tmp_path / "zoo")
    again = logits(reopened(tmp_path / "zoo"), tokens)
    assert (again - expected).abs().max() < tolerance * expected.std()


@twins
def test_zoo_to_hugging_face_and_back_is_bit_identical(twin: Twin, tmp_path: Path) -> None:
    twin.build().save_pretrained(tmp_path / "hf")
    model = from_pretrained(tmp_path / "hf", dtype=torch.bfloat16)
    save_pretrained(model, tmp_path / "zoo", max_shard_bytes=4000)
    back = from_pretrained(tmp_path / "zoo")
    assert back.spec == model.spec
    for (name, ours), (other, theirs) in zip(model.state_dict().items(), back.state_dict().items(), strict=True):
        assert name == other
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["deepseek_v3"])
def test_layouts_of_the_memory_of_transformers(name: str, tmp_path: Path) -> None:
    reference = next(twin for twin in TWINS if twin.name == name).build()
    reference.save_pretrained(tmp_path, save_original_format=False)
    assert any(name.endswith("experts.down_proj") for name in stored(tmp_path))
    tokens = torch.randint(0, SIZES["vocab_size"], (1, 9))
    torch.testing.assert_close(logits(from_pretrained(tmp_path), tokens), logits(reference, tokens))

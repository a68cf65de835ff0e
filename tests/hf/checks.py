"""Small models of transformers, and what is held against them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from zoo.hf import from_pretrained, save_pretrained
from zoo.hf.config import family_of

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2}


def scaled(rope_type: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 5000.0, **parameters}}


LLAMA3 = scaled("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8)
YARN = scaled("yarn", factor=4.0, original_max_position_embeddings=8)


def filled(model: nn.Module) -> None:
    """Random weights of a size that makes logits sharp, norms uneven and choices differ from scores."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "correction" in name:
            nn.init.uniform_(tensor, -0.3, 0.3)
        elif name.endswith("inv_freq") or name.endswith("embed_scale"):
            continue
        elif tensor.ndim > 1:
            nn.init.normal_(tensor, std=0.3)
        else:
            nn.init.uniform_(tensor, 0.5, 1.5)


@dataclass(frozen=True)
class Twin:
    """A small model of a transformers class with an odd shape."""

    name: str
    model_type: str
    changes: dict[str, Any]
    sizes: dict[str, Any] = field(default_factory=lambda: SIZES)
    fill: Callable[[nn.Module], None] = filled

    def build(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
        torch.manual_seed(seed)
        config = transformers.AutoConfig.for_model(self.model_type, **{**self.sizes, **self.changes})
        config._experts_implementation = "eager"  # the grouped matrix product has no fp64
        model = class_of(family_of({"model_type": self.model_type}).architecture)._from_config(config, dtype=dtype)
        self.fill(model)
        return model.eval()


def class_of(architecture: str) -> Any:
    """By name: some have no place in AutoModelForCausalLM."""
    return getattr(transformers, architecture)


def reopened(directory: Path) -> nn.Module:
    architecture = json.loads((directory / "config.json").read_text())["architectures"][0]
    return class_of(architecture).from_pretrained(directory, dtype="auto", experts_implementation="eager")


def stored(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def same_tensors(one: Path, other: Path) -> bool:
    a, b = stored(one), stored(other)
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        output = model(tokens)
    return output if isinstance(output, Tensor) else output.logits


def check_logits(reference: nn.Module, length: int, tolerance: float, folder: Path) -> None:
    """Opened by zoo, and opened by transformers after zoo has saved it, a model gives the same logits."""
    reference.save_pretrained(folder / "hf")
    tokens = torch.randint(0, SIZES["vocab_size"], (2, length))
    expected = logits(reference, tokens)
    model = from_pretrained(folder / "hf")
    found = logits(model, tokens)
    assert found.dtype == next(reference.parameters()).dtype
    assert (found - expected).abs().max() < tolerance * expected.std()

    save_pretrained(model, folder / "zoo")
    assert same_tensors(folder / "hf", folder / "zoo")
    again = logits(reopened(folder / "zoo"), tokens)
    assert (again - expected).abs().max() < tolerance * expected.std()


def check_round_trip(reference: nn.Module, folder: Path) -> None:
    """From zoo to files and back, in several shards, every bit stays."""
    reference.save_pretrained(folder / "hf")
    model = from_pretrained(folder / "hf", dtype=torch.bfloat16)
    save_pretrained(model, folder / "zoo", max_shard_bytes=4000)
    back = from_pretrained(folder / "zoo")
    assert back.spec == model.spec
    for (name, ours), (other, theirs) in zip(model.state_dict().items(), back.state_dict().items(), strict=True):
        assert name == other
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def check_layout_in_memory(reference: nn.Module, folder: Path) -> None:
    """Files as transformers holds the tensors in memory, which need not be those of the release, are read too."""
    reference.save_pretrained(folder, save_original_format=False)
    tokens = torch.randint(0, SIZES["vocab_size"], (1, 9))
    torch.testing.assert_close(logits(from_pretrained(folder), tokens), logits(reference, tokens))

"""GGUF files of transformers models, written as llama.cpp writes them, with the names of the package gguf."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor, nn

KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
NAMES = {
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "gemma3_text": "gemma3",
}
"""Types of transformers whose architecture has another name."""
QUANTIZED = gguf.GGMLQuantizationType.Q8_0


def write_gguf(
    path: Path, model: nn.Module, settings: dict[str, Any], *, quantize: bool = False, **tensors: Tensor
) -> Path:
    """Write `model`; `settings` are further metadata, without the architecture's name unless they have a dot first."""
    config = model.config
    name = NAMES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, name)
    said = {key: getattr(config, theirs) for key, theirs in KEYS.items()}
    for key, value in {**said, **settings}.items():
        put(writer, key.removeprefix(".") if key.startswith(".") else f"{name}.{key}", value)
    for theirs, tensor in {**stored(model, name), **{key.replace("__", "."): t for key, t in tensors.items()}}.items():
        data = tensor.float().contiguous().numpy()
        if quantize and data.ndim == 2:
            writer.add_tensor(theirs, gguf.quantize(data, QUANTIZED), raw_dtype=QUANTIZED)
        else:
            writer.add_tensor(theirs, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def put(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    (writer.add_array if isinstance(value, list) else add[type(value)])(key, value)


def stored(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The tensors as llama.cpp's converter leaves them."""
    config, found = model.config, {}
    arch = next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for theirs, tensor in model.state_dict().items():
        if theirs == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, kind = theirs.rsplit(".", 1) if theirs.endswith((".weight", ".bias")) else (theirs, "weight")
        if match := re.fullmatch(r"model\.layers\.(\d+)\.mlp\.experts\.gate_up_proj", theirs):
            gates, ups = tensor.chunk(2, 1)
            found |= {f"blk.{match[1]}.ffn_gate_exps.weight": gates, f"blk.{match[1]}.ffn_up_exps.weight": ups}
            continue
        if config.model_type == "mixtral":
            stem = stem.replace(".mlp.gate", ".block_sparse_moe.gate")
        if name == "llama" and (match := re.search(r"(q|k)_proj", stem)):
            heads = config.num_attention_heads if match[1] == "q" else config.num_key_value_heads
            tensor = tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
        if name.startswith("gemma") and stem.endswith("norm"):
            tensor = tensor + 1
        if stem.endswith("shared_expert_gate"):
            tensor = tensor[0]
        known = names.get_name(stem)
        assert known, theirs
        found[f"{known}.{kind}"] = tensor
    return found


def llama3_divisors(theta: float, head_dim: int, factor: float) -> Tensor:
    """What llama.cpp stores of that scaling: https://github.com/ggml-org/llama.cpp, convert_hf_to_gguf.py."""
    low, high, context = 1.0, 4.0, 8192
    found = []
    for channel in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (channel / head_dim)
        if wavelength < context / high:
            found.append(1.0)
        elif wavelength > context / low:
            found.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return torch.from_numpy(np.array(found, np.float32))

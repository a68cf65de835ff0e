"""GGUF files: their metadata as a config.json, their tensors dequantized one at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.hf.config import spec_from_hf
from zoo.hf.family import Family
from zoo.hf.gguf_file import StoredTensor, read_head
from zoo.hf.gguf_tables import ARCHITECTURES, COMMON_KEYS, NEEDED, WITH_EXPERTS, Architecture
from zoo.spec.base import ConfigError, near
from zoo.spec.model import ModelSpec

TOKEN_IDS = ("bos", "eos", "pad")
_STORED_IDS = {"bos": "bos", "eos": "eos", "pad": "padding"}
_SCALINGS = {
    "linear": {"factor": "factor"},
    "yarn": {
        "factor": "factor",
        "original_context_length": "original_max_position_embeddings",
        "yarn_beta_fast": "beta_fast",
        "yarn_beta_slow": "beta_slow",
    },
}
_NO_SETTING = {"vocab_size", "rope.dimension_count", "attention.value_length", "rope.scaling.finetuned"}
"""Settings that repeat others, which is checked, or that change nothing."""
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What every release with that scaling has; files hold its result alone."""


def open_gguf(path: Path) -> tuple[dict[str, Any], ModelSpec, Family, GGUFTensors]:
    """What a GGUF file holds: its config.json, the model that this describes, the table of its tensors, the tensors.

    Raises:
        ConfigError: the package gguf is missing; the file is unsound, or of an architecture or with settings that are
            not understood.
    """
    tensors = GGUFTensors(path)
    metadata = tensors.metadata
    name = str(metadata.get("general.architecture"))
    if name not in ARCHITECTURES:
        advice = near(name, ARCHITECTURES) or f"understood: {', '.join(ARCHITECTURES)}"
        raise ConfigError(f"{path}: general.architecture: found {name!r}; {advice}")
    if metadata.get("split.count", 0) > 1:
        raise ConfigError(f"{path}: is one of {metadata['split.count']} parts; join them: llama-gguf-split --merge")
    experts = bool(metadata.get(f"{name}.expert_count"))
    architecture = WITH_EXPERTS.get(name, ARCHITECTURES[name]) if experts else ARCHITECTURES[name]
    tensors.plus_one = architecture.plus_one
    config = _config(path, name, architecture, tensors)
    try:
        spec = spec_from_hf(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: its metadata, in the words of config.json:\n{error}") from None
    return config, spec, architecture.family, tensors


class GGUFTensors:
    """The tensors of a GGUF file, all of them fp32."""

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ModuleNotFoundError:
            raise ConfigError(f"{path}: a GGUF file needs the package gguf; pip install 'moe-zoo[gguf]'") from None
        self._path, self._gguf = path, gguf
        metadata, self._tensors = read_head(path)
        self.metadata = {name: _plain(value) for name, value in metadata.items()}
        self._raw = {name: self._checked(name, tensor) for name, tensor in self._tensors.items()}
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        self.dtypes = dict.fromkeys(self.shapes, torch.float32)
        self.plus_one = False
        """Norm weights are stored with the 1 that the model adds to them."""

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU. It is read, not mapped: pages of a mapped file would pile up in memory."""
        found, (kind, shape) = self._tensors[name], self._raw[name]
        raw = np.fromfile(self._path, np.uint8, math.prod(shape), offset=found.start)
        try:
            values = self._gguf.dequantize(raw.reshape(shape), kind)
        except (NotImplementedError, ValueError) as error:
            raise ConfigError(f"{self._path}: {name}: cannot be dequantized: {error}") from None
        tensor = torch.from_numpy(np.ascontiguousarray(values, np.float32)).reshape(found.shape)
        return tensor - 1 if self.plus_one and name.endswith("norm.weight") else tensor

    def _checked(self, name: str, tensor: StoredTensor) -> tuple[Any, tuple[int, ...]]:
        """The type of a tensor and its shape in bytes, all of which are in the file."""
        try:
            kind = self._gguf.GGMLQuantizationType(tensor.type)
            shape = self._gguf.quant_shape_to_byte_shape(tensor.shape, kind)
        except (ValueError, LookupError) as error:
            raise ConfigError(f"{self._path}: {name}: cannot be read: {error}") from None
        if tensor.start + math.prod(shape) > self._path.stat().st_size:
            raise ConfigError(f"{self._path}: {name}: not a sound GGUF file: it ends too early")
        return kind, shape


def _plain(value: Any) -> Any:
    """Numbers as a person wrote them: fp32 holds 1e-5 as 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _config(path: Path, name: str, architecture: Architecture, tensors: GGUFTensors) -> dict[str, Any]:
    """The config.json that says what the metadata say."""
    metadata, family = tensors.metadata, architecture.family
    settings = {key.removeprefix(f"{name}."): value for key, value in metadata.items() if key.startswith(f"{name}.")}
    keys = {**COMMON_KEYS, **architecture.keys}
    for key in keys:
        value = settings.get(key)
        if value is None and key in NEEDED:
            raise ConfigError(f"{path}: {name}.{key} is missing from its metadata")
        if value is not None and not (isinstance(value, (int, float)) and value > 0):
            raise ConfigError(f"{path}: {name}.{key}: found {value!r}; must be one positive number for all layers")
    config: dict[str, Any] = {"model_type": family.model_type, "architectures": [family.architecture]}
    # What llama.cpp takes for settings that are absent.
    config |= {"rope_theta": 10_000.0, "num_key_value_heads": settings["attention.head_count"], **architecture.config}
    config |= {keys[key]: value for key, value in settings.items() if key in keys}
    config["vocab_size"] = tensors.shapes.get("token_embd.weight", (0,))[0]
    config["tie_word_embeddings"] = "output.weight" not in tensors.shapes
    config |= {key: tensor in tensors.shapes for key, tensor in architecture.told_by.items()}
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    config |= architecture.derive(config)
    config |= {f"{ours}_token_id": metadata.get(f"tokenizer.ggml.{_STORED_IDS[ours]}_token_id") for ours in TOKEN_IDS}
    scaling, scaling_keys = _scaling(path, settings, config, tensors)
    if scaling is not None:
        config["rope_scaling"] = scaling
    _check(path, name, settings, config, keys.keys() | scaling_keys)
    return config


def _check(path: Path, name: str, settings: Mapping[str, Any], config: Mapping[str, Any], known: set[str]) -> None:
    """Refuse what has not been understood, and what contradicts itself."""
    unknown = [
        key for key in settings if key not in known | _NO_SETTING and not (key == "expert_count" and not settings[key])
    ]
    if unknown:
        raise ConfigError(
            f"{path}: {name}.{unknown[0]}: found {settings[unknown[0]]!r}; this setting is not understood"
        )
    repeated = {"vocab_size": "vocab_size", "rope.dimension_count": "head_dim", "attention.value_length": "head_dim"}
    for key, other in repeated.items():
        if settings.get(key, config[other]) != config[other]:
            raise ConfigError(f"{path}: {name}.{key}: found {settings[key]!r}; understood: {config[other]} ({other})")


def _scaling(
    path: Path, settings: Mapping[str, Any], config: Mapping[str, Any], tensors: GGUFTensors
) -> tuple[dict[str, Any] | None, set[str]]:
    """The scaling of rotary positions, and the settings that it has taken."""
    kind = settings.get("rope.scaling.type", "none")
    taken = {"rope.scaling.type"}
    if "rope_freqs.weight" in tensors.shapes:
        return _llama3_scaling(path, config, tensors.read("rope_freqs.weight")), taken
    if kind == "none":
        return None, taken
    if kind not in _SCALINGS:
        raise ConfigError(f"{path}: rope.scaling.type: found {kind!r}; understood: none, {', '.join(_SCALINGS)}")
    names = {f"rope.scaling.{theirs}": ours for theirs, ours in _SCALINGS[kind].items()}
    found = {ours: settings[theirs] for theirs, ours in names.items() if theirs in settings}
    return {"rope_type": kind, **found}, taken | names.keys()


def _llama3_scaling(path: Path, config: Mapping[str, Any], divisors: Tensor) -> dict[str, Any]:
    """The llama3 scaling whose divisors of the frequencies a file holds.

    Raises:
        ConfigError: no such scaling gives them.
    """
    factor = _plain(float(divisors.max()))
    frequencies = config["rope_theta"] ** (-2 / config["head_dim"] * torch.arange(len(divisors), dtype=torch.float64))
    low, high, context = LLAMA3_ROPE.values()
    smooth = ((context * frequencies / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if not torch.allclose(divisors.double(), expected, rtol=1e-4):
        raise ConfigError(f"{path}: rope_freqs.weight: not the llama3 scaling of factor {factor}; not understood")
    return {"rope_type": "llama3", "factor": factor, **LLAMA3_ROPE}

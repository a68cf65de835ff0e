"""A checkpoint that holds adapters alone, read as the plain model that they make of the one they stand on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from zoo.blocks.adapted import merged
from zoo.hf.parameters import Cast, Parameters, StoredParameters
from zoo.hf.source import Tensors, open_checkpoint
from zoo.hf.weights import Shape
from zoo.spec.base import ConfigError, decode
from zoo.spec.finetune import LoraFinetune
from zoo.spec.model import ModelSpec

MAX_DEPTH = 8
"""Checkpoints of adapters that may stand on each other."""
_DEPTH: ContextVar[int] = ContextVar("depth", default=0)


class MergedTensors:
    """The parameters of a model, each made when it is read: that of the base, with its adapter merged."""

    def __init__(self, base: Parameters, adapters: Tensors, scale: float) -> None:
        """
        Args:
            adapters: by their names in the model.
            scale: what B A counts.

        Raises:
            ConfigError: adapters without a weight that they fit.
        """
        self._base, self._adapters, self._scale = base, adapters, scale
        self.shapes: dict[str, Shape] = dict(base.shapes)
        self.dtypes = dict(base.dtypes)
        self._beside = dict(_pairs(adapters.shapes))
        for weight, parts in self._beside.items():
            shape, (a, b) = self.shapes.get(weight, ()), (adapters.shapes[part] for part in parts)
            if (a, b) != ((*shape[:-2], *a[-2:-1], *shape[-1:]), (*shape[:-1], *a[-2:-1])):
                there = list(shape) or "not there"
                raise ConfigError(f"{weight}: found adapters {list(a)} and {list(b)}; the weight is {there}")

    def read(self, name: str) -> Tensor:
        """One parameter, on the CPU."""
        weight = self._base[name]
        if name not in self._beside:
            return weight
        a, b = (self._adapters.read(part) for part in self._beside[name])
        return merged(weight, a, b, self._scale)


def on_base(settings: Mapping[str, Any], adapters: Tensors) -> Tensors:
    """The tensors of a run that trained adapters.

    Args:
        settings: those of the run.
        adapters: what its checkpoint holds.

    Raises:
        ConfigError: the checkpoint that they stand on is gone or another one.
    """
    lora = decode(LoraFinetune, settings["finetune"], "settings.finetune")
    spec = decode(ModelSpec, settings["model"], "settings.model")
    if _DEPTH.get() == MAX_DEPTH:
        raise ConfigError(f"{lora.path}: adapters stand on adapters {MAX_DEPTH} deep, or on themselves")
    deeper = _DEPTH.set(_DEPTH.get() + 1)
    try:
        base = open_checkpoint(lora.path)
    finally:
        _DEPTH.reset(deeper)
    precision = settings.get("precision")
    wide = isinstance(precision, Mapping) and precision.get("weights") == "fp32"
    stored = StoredParameters(base, spec)
    return MergedTensors(Cast(stored, torch.float32, spec) if wide else stored, adapters, lora.scale)


def _pairs(names: Mapping[str, Shape]) -> Iterator[tuple[str, tuple[str, str]]]:
    """The weights that adapters stand beside, each with the names of A and B."""
    for name in names:
        prefix, _, last = name.rpartition(".")
        stem = last.removesuffix("lora_a").removesuffix("lora_b")
        if stem == last or stem not in ("", "gate_up_", "up_", "down_"):
            raise ConfigError(f"{name}: is no adapter; a checkpoint of adapters holds lora_a and lora_b alone")
        pair = f"{prefix}.{stem}lora_a", f"{prefix}.{stem}lora_b"
        for part in pair:
            if part not in names:
                raise ConfigError(f"{part}: is missing, the other half of an adapter")
        yield f"{prefix}.{stem[:-1] or 'weight'}", pair

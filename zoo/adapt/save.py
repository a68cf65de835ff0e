"""Adapters on disk, without the model that they stand on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from zoo.adapt.lora import adapters_of
from zoo.decoder import Decoder
from zoo.hf.tensors import SINGLE
from zoo.spec.base import ConfigError
from zoo.spec.finetune import LoraFinetune
from zoo.train.rundir import FORMAT, STATE


def save_adapters(model: Decoder, lora: LoraFinetune, path: str | os.PathLike[str]) -> None:
    """Write a model's adapters as a directory: safetensors, and a state.json that says what they are and stand on.

    `zoo.from_pretrained` opens it as the merged model, as it opens the checkpoints of runs.

    Args:
        lora: what the model was adapted by; `lora.path` is the checkpoint that its weights came from.

    Raises:
        ConfigError: the model has no adapters.
    """
    tensors = {name: value.contiguous() for name, value in adapters_of(model).items()}
    if not tensors:
        raise ConfigError("save_adapters: the model has none; adapt it first: zoo.adapt.lora.adapt")
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    base = str(Path(lora.path).expanduser().absolute())
    settings: dict[str, Any] = {"model": model.spec.to_dict(), "finetune": {**lora.to_dict(), "path": base}}
    if model.embed.weight.dtype == torch.float32:
        settings["precision"] = {"weights": "fp32"}
    save_file(tensors, directory / SINGLE)
    (directory / STATE).write_text(json.dumps({"format": FORMAT, "settings": settings}, indent=1), encoding="utf-8")

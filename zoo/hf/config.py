"""Model descriptions from Hugging Face configurations, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from zoo.hf.families import FAMILIES
from zoo.hf.family import Family, WrongBlocks
from zoo.hf.keys import refused
from zoo.hf.wrapped import text_of
from zoo.spec.base import ConfigError, near
from zoo.spec.model import ModelSpec


def spec_from_hf(config: Mapping[str, Any]) -> ModelSpec:
    """The model that a Hugging Face config.json describes.

    Args:
        config: The file's content, as on the hub or as transformers 5 writes it. Of a model that also sees or hears,
            the text model is described.

    Raises:
        ConfigError: the family is not known, or keys are missing, refused or not understood. No key that would change
            the computation is passed over.
    """
    if not isinstance(config, Mapping):
        raise ConfigError(f"config.json: found {type(config).__name__}; must be an object")
    config = text_of(config)
    if config.get("quantization_config") is not None:
        raise ConfigError("config.json: quantization_config: quantized weights are not read; dequantize them first")
    return family_of(config).read({name: value for name, value in config.items() if name != "quantization_config"})


def spec_to_hf(spec: ModelSpec) -> dict[str, Any]:
    """The Hugging Face config.json of a model, in the first family that expresses its whole computation.

    The family that the model's card names comes first. What acts in training alone (initial weights, balancing) is
    written as far as the family has keys for it. Special tokens are null.

    Raises:
        ConfigError: no family expresses the model; with what keeps the nearest one from it.
    """
    named = spec.card.family if spec.card else ""
    failures: list[tuple[Family, ConfigError]] = []
    for family in sorted(FAMILIES, key=lambda family: _kinship(family, named)):
        try:
            return family.write(spec)
        except ConfigError as error:
            failures.append((family, error))
    nearest, obstacle = min(failures, key=lambda failure: _distance(failure[1]))
    listed = "\n".join(f"  {reason}" for reason in str(obstacle).splitlines())
    raise ConfigError(f"no Hugging Face family expresses this model; nearest is {nearest.model_type}, but\n{listed}")


def _kinship(family: Family, named: str) -> int:
    """0 for the family of that name, 1 where one name goes on from the other (`qwen3_5_text`, `qwen3.5`), else 2."""
    names = (family.model_type, *family.aliases)
    if named in names:
        return 0
    plain = [re.sub(r"\W|_", "", name) for name in (named, *names)]
    return 1 if named and any(n.startswith(plain[0]) or plain[0].startswith(n) for n in plain[1:]) else 2


def _distance(error: ConfigError) -> tuple[bool, int]:
    return isinstance(error, WrongBlocks), len(str(error).splitlines())


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that a config.json names.

    Raises:
        ConfigError: it names none, or one that zoo does not know.
    """
    name = text_of(config).get("model_type")
    known = {name: family for family in FAMILIES for name in (family.model_type, *family.aliases)}
    if not isinstance(name, str) or name not in known:
        raise refused("model_type", name, near(name, known) or f"understood: {', '.join(sorted(known))}")
    return known[name]

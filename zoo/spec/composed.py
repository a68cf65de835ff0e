"""From a composed configuration to descriptions."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from zoo.spec.base import ConfigError, Spec, choice_of, decode
from zoo.spec.finetune import FinetuneSpec, FromCheckpoint
from zoo.spec.model import ModelSpec

if TYPE_CHECKING:
    from omegaconf import DictConfig


def plain(cfg: DictConfig) -> dict[str, Any]:
    """A composed configuration as plain data.

    Raises:
        ConfigError: values are missing, or an interpolation leads nowhere.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        missing = sorted(OmegaConf.missing_keys(cfg))
        if missing:
            raise ConfigError("\n".join(f"{key}: missing; give it a value: {key}=..." for key in missing))
        data = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        reason = str(error.msg or error).split("\n")[0]
        raise ConfigError(f"{error.full_key or error.key}: {reason}") from None
    assert isinstance(data, dict)
    return {str(key): value for key, value in data.items()}


def take_model(data: Mapping[str, Any], name: str | None) -> tuple[ModelSpec, dict[str, Any]]:
    """The model that a composed configuration describes, and the settings beside it.

    Every way from a configuration to a model passes here.

    Args:
        data: All of the configuration, plain.
        name: The option of the group `model` that was chosen; the model's name unless its file gives another.

    Raises:
        ConfigError: there is no model, or its description is unsound.
    """
    rest = {key: value for key, value in data.items() if key not in ("model", "model_scale", "match")}
    model = data.get("model")
    start = start_of(data)
    if start is not None:
        return _of_checkpoint(start, data, name), rest
    if not isinstance(model, Mapping):
        raise ConfigError(f"model: found {model!r}; choose a model by name: model=tiny_moe")
    named = {"name": name, **model} if name else model
    return _derived(decode(ModelSpec, named, "model"), data), rest


def start_of(data: Mapping[str, Any]) -> FromCheckpoint | None:
    """The checkpoint that a configuration starts from; None: weights are random.

    Raises:
        ConfigError: its description is unsound.
    """
    if "finetune" not in data:
        return None
    found = decode(_Start, {"finetune": data["finetune"]}).finetune
    return found if isinstance(found, FromCheckpoint) else None


class _Start(Spec):
    finetune: choice_of(FinetuneSpec)  # type: ignore[valid-type]


def _of_checkpoint(start: FromCheckpoint, data: Mapping[str, Any], name: str | None) -> ModelSpec:
    for key, usual in {"model_scale": "full", "match": "none"}.items():
        if data.get(key, usual) != usual:
            raise ConfigError(f"{key}: found {data[key]!r}; a model that comes from a checkpoint stays what it is")
    given = data.get("model") or {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"model: found {given!r}; the checkpoint {start.path} describes it; leave model=... out")
    # To open a checkpoint is the work of a higher floor, asked for only here.
    found: ModelSpec = importlib.import_module("zoo.adapt.origin").model_of(start, given, name)
    return found


def _derived(spec: ModelSpec, data: Mapping[str, Any]) -> ModelSpec:
    """The tiny twin and the dense counterpart of a model, where the configuration asks for them."""
    scale, match = data.get("model_scale", "full"), data.get("match", "none")
    if scale not in ("full", "tiny"):
        raise ConfigError(f"model_scale: found {scale!r}; allowed: full, tiny")
    if match not in ("none", "active", "total", "flops"):
        raise ConfigError(f"match: found {match!r}; allowed: none, active, total, flops")
    if scale == "tiny":
        from zoo.spec.twin import shrink

        spec = shrink(spec)
    if match != "none":
        # The count of parameters is the question of another floor, asked only here.
        spec = importlib.import_module("zoo.plan.match").dense_counterpart(spec, match)
    return spec

"""From a composed configuration to descriptions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from zoo.spec.base import ConfigError, decode
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
    rest = {key: value for key, value in data.items() if key != "model"}
    model = data.get("model")
    if not isinstance(model, Mapping):
        raise ConfigError(f"model: found {model!r}; choose a model by name: model=tiny_moe")
    named = {"name": name, **model} if name else model
    return decode(ModelSpec, named, "model"), rest

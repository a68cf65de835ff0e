"""Composing configurations by Hydra, from a list of overrides: the same strings as on the command line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from threading import RLock
from typing import TYPE_CHECKING

from zoo.registry import config_folders, load_entry_points
from zoo.spec.base import ConfigError
from zoo.spec.composed import plain, take_model
from zoo.spec.model import ModelSpec

if TYPE_CHECKING:
    from omegaconf import DictConfig

_LOCK = RLock()
"""Hydra composes with state that the whole process shares."""


def list_models(pattern: str = "*") -> list[str]:
    """The names of all models that match a shell pattern, sorted: `list_models("*moe*")`."""
    return options_of("model", pattern)


def list_hardware(pattern: str = "*") -> list[str]:
    """The names of all hardware profiles that match a shell pattern, sorted."""
    return options_of("hardware", pattern)


def options_of(group: str, pattern: str = "*") -> list[str]:
    """The options of a config group, from zoo and from registered folders, sorted."""
    load_entry_points()
    names = {path.stem for folder in config_folders() for path in (folder / group).glob("*.yaml")}
    return sorted(name for name in names if fnmatchcase(name, pattern))


def load(model: str, *overrides: str) -> ModelSpec:
    """The description of a model.

    Args:
        model: Its name (`list_models()`).
        overrides: Changes, as on the command line: `"model.moe.num_experts=64"`, `"model/moe/router=sigmoid"`.

    Raises:
        ConfigError: no such model, or overrides that cannot be read or do not fit it; one line for each mistake.
    """
    if model not in list_models():
        from zoo.config_errors import unknown_option

        raise ConfigError(unknown_option("model", model, list_models()))
    for override in overrides:
        if override.lstrip("+").startswith("model="):
            raise ConfigError(f"{override}: the model is already named: {model}; leave one of them out")
    if all(_concerns(override, ("model",)) for override in overrides):
        cfg = _compose(None, [f"+model={model}", *overrides])
    else:
        cfg = _compose("config", [f"model={model}", *overrides])
    spec, _ = take_model(plain(cfg), model)
    return spec


def compose(overrides: Sequence[str]) -> DictConfig:
    """The whole configuration of a run; `model.name` is the chosen model's.

    Raises:
        ConfigError: overrides that cannot be read, or that name keys or options that do not exist.
    """
    return _compose("config", list(overrides))


def compose_groups(groups: Mapping[str, str], overrides: Sequence[str]) -> DictConfig:
    """Some groups alone, without the rest of a run: `{"model": "tiny_moe", "hardware": "h100_8x"}`.

    Overrides that concern other groups have the whole configuration composed.

    Raises:
        ConfigError: as for `compose`.
    """
    if all(_concerns(override, groups) for override in overrides):
        return _compose(None, [*(f"+{group}={option}" for group, option in groups.items()), *overrides])
    return compose([*(f"{group}={option}" for group, option in groups.items()), *overrides])


def opened(overrides: Sequence[str]) -> list[str]:
    """`overrides` with those of keys below `model` allowed to name keys that no file mentions.

    Files leave defaults out, so Hydra cannot know a model's keys; the strict decoder does, and refuses all others.
    """
    return [f"++{override}" if override.startswith("model.") else override for override in overrides]


def _concerns(override: str, groups: Iterable[str]) -> bool:
    """Whether the files of some groups are enough to apply an override."""
    starts = tuple(f"{group}{mark}" for group in groups for mark in "./")
    return override.lstrip("+~").startswith(starts) and "${" not in override


def _compose(config_name: str | None, overrides: list[str]) -> DictConfig:
    from hydra.errors import HydraException

    load_entry_points()
    with explained(config_name, overrides):
        try:
            cfg, choices = compose_once(config_name, overrides)
        except HydraException:
            found = _compose_opened(config_name, overrides)
            if found is None:
                raise
            cfg, choices = found
    if choices.get("model") and cfg.get("model") and "name" not in cfg.model:
        from omegaconf import open_dict

        with open_dict(cfg):
            cfg.model.name = choices["model"]
    return cfg


def _compose_opened(config_name: str | None, overrides: list[str]) -> tuple[DictConfig, dict[str, str]] | None:
    """Compose `opened(overrides)`; None when that is no different, fails too, or names keys that do not exist."""
    from hydra.errors import HydraException

    if opened(overrides) == overrides:
        return None
    try:
        cfg, choices = compose_once(config_name, opened(overrides))
        take_model(plain(cfg), choices.get("model"))
    except HydraException:
        return None
    except ConfigError as error:
        if error.misplaced:
            return None
        raise
    return cfg, choices


@contextmanager
def explained(config_name: str | None, overrides: Sequence[str]) -> Iterator[None]:
    """What Hydra raises inside while it composes `overrides` is raised as a ConfigError.

    Args:
        config_name: As for `compose_once`.
        overrides: As for `compose_once`; read when there is something to explain.
    """
    from hydra.errors import HydraException
    from yaml import YAMLError

    try:
        yield
    except ConfigError:
        raise
    except (HydraException, YAMLError, ValueError) as error:
        from zoo.config_errors import explain

        raise ConfigError(explain(error, config_name, overrides)) from None


def compose_once(config_name: str | None, overrides: list[str]) -> tuple[DictConfig, dict[str, str]]:
    """Compose, with Hydra's own errors.

    Args:
        config_name: The file to start from; None: nothing but what `overrides` add.
        overrides: As on the command line.

    Returns:
        The configuration, and the option chosen in each group: `{"model": "tiny_moe", "model/moe": "routed", ...}`.
    """
    import hydra
    from omegaconf import open_dict

    with _own_hydra():
        cfg = hydra.compose(config_name, overrides, return_hydra_config=True)
    choices = {group: option for group, option in cfg.hydra.runtime.choices.items() if not group.startswith("hydra/")}
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg, choices


@contextmanager
def _own_hydra() -> Iterator[None]:
    """A Hydra that looks into `zoo.conf`; an application around us finds its own unchanged afterwards."""
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.utils import JobRuntime
    from hydra.version import VersionBase

    with _LOCK:
        shared, version, job = GlobalHydra.instance(), VersionBase.instance(), JobRuntime.instance()
        before = shared.hydra, version.version_base, job.conf.copy()
        shared.clear()
        try:
            with initialize_config_module("zoo.conf", version_base="1.3"):
                yield
        finally:
            shared.hydra, version.version_base, job.conf = before
            GlobalHydra.set_instance(shared)

"""What `zoo launch` and `zoo export` read alike: a model, a machine, keys of the plan, settings of `zoo train`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from zoo.cli.settings import BudgetKeys, InferenceKeys, OutputKeys, PlanKeys, Settings, read_settings
from zoo.spec.base import ConfigError, near

TRAIN_GROUPS = (
    "checkpoint",
    "data",
    "debug",
    "experiment",
    "hydra",
    "kernels",
    "logger",
    "schedule",
    "tokenizer",
    "train",
)
"""Groups of the configuration of a run that the plan says nothing about."""
PLANNED_GROUPS = ("optimizer", "precision")
"""Groups whose bare names are keys of the plan; what stands below them is a setting of the run."""


class Words(NamedTuple):
    """What was typed, sorted."""

    settings: Settings
    """Model, machine and plan."""
    own: dict[str, str]
    """The verb's own keys."""
    train: list[str]
    """Settings of `zoo train`."""

    def options(self) -> dict[str, Any]:
        """Of the plan, as far as they were given."""
        return self.settings.given(PlanKeys)


def read_words(verb: str, words: Sequence[str], keys: Collection[str]) -> Words:
    """Sort what was typed.

    Args:
        keys: The verb's own keys.

    Raises:
        ConfigError: a key is given twice or unknown, or no model is named.
    """
    own: dict[str, str] = {}
    train, rest = [], []
    for word in words:
        key, equals, value = word.partition("=")
        group, _, below = key.lstrip("+~").replace("/", ".").partition(".")
        if key in keys and equals:
            if key in own:
                raise ConfigError(f"{key}: is given twice; leave one of them out")
            own[key] = value
        elif (group in TRAIN_GROUPS and (equals or key.startswith("~"))) or (group in PLANNED_GROUPS and below):
            train.append(word)
        else:
            rest.append(word)
    if not any(word.startswith("model=") or "=" not in word for word in rest):
        raise ConfigError(f"zoo {verb}: found no model; name one, and a machine: zoo {verb} MODEL h100_8x")
    settings = read_settings(rest)
    for kind in (BudgetKeys, InferenceKeys, OutputKeys):
        settings.refuse(kind, f"zoo {verb} has no such key; zoo plan has")
    return Words(settings, own, train)


def chosen(verb: str, own: dict[str, str], targets: Collection[str]) -> str:
    """The target that was named.

    Raises:
        ConfigError: none, or an unknown one.
    """
    allowed = ", ".join(targets)
    if "target" not in own:
        raise ConfigError(f"target: missing; give it a value: zoo {verb} ... target={'|'.join(targets)}")
    if own["target"] not in targets:
        hint = near(own["target"], targets)
        raise ConfigError(f"target: found {own['target']!r}; allowed: {allowed}{f'; {hint}' if hint else ''}")
    return own["target"]


def count_of(own: dict[str, str], key: str) -> int | None:
    """A key that is a positive whole number, where it was given.

    Raises:
        ConfigError: it is none.
    """
    text = own.get(key)
    if text is None:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{key}: found {text!r}; must be a positive integer")
    return int(text)

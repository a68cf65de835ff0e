"""What was typed after `zoo plan`: a model, a machine, overrides of both, and keys of its own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, PositiveFloat, PositiveInt
from pydantic_core import PydanticCustomError

from zoo.cli.keys import read_keys
from zoo.spec.base import ConfigError, Items, Spec


def _once(value: Any) -> Any:
    """The text of a key that is read as it was typed."""
    if isinstance(value, list) and len(value) > 1:
        raise PydanticCustomError("twice", "is given twice; leave one of them out")
    return value[0] if isinstance(value, list) else value


Typed = Annotated[str, BeforeValidator(_once)]
Precisions = Annotated[
    str | Items[str], BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
]


class PlanKeys(Spec):
    """As `zoo.plan` takes them."""

    seq_len: PositiveInt | None = None
    global_batch: PositiveInt | None = None
    micro_batch: PositiveInt | None = None
    tp: PositiveInt | None = None
    pp: PositiveInt | None = None
    vp: PositiveInt | None = None
    cp: PositiveInt | None = None
    ep: PositiveInt | None = None
    etp: PositiveInt | None = None
    dp: PositiveInt | None = None
    shard: PositiveInt | None = None
    precision: Precisions | None = None
    recompute: Typed | None = None
    engine: str | None = None
    optimizer: str | None = None
    mtp: bool | None = None
    routing: str | None = None
    graphs: str | None = None
    reserve: float | None = None


class BudgetKeys(Spec):
    """As `zoo.plan.budget.budget` takes them."""

    tokens: PositiveFloat | None = None
    days: PositiveFloat | None = None
    device_hours: PositiveFloat | None = None
    energy_mwh: PositiveFloat | None = None
    cost: PositiveFloat | None = None
    price_per_device_hour: PositiveFloat | None = None
    pue: PositiveFloat | None = None
    checkpoint_every: PositiveInt | None = None
    checkpoint_async: bool = False


class InferenceKeys(Spec):
    """As `zoo.plan.inference.inference` takes them."""

    context: PositiveInt | None = None
    batch: PositiveInt | None = None
    cache_precision: str | None = None


class OutputKeys(Spec):
    """What is shown and written."""

    report: Typed | None = None
    png: Typed | None = None
    out: Typed | None = None
    sensitivity: bool = False
    inference: bool = False


class ZooPlan(PlanKeys, BudgetKeys, InferenceKeys, OutputKeys):
    """All keys of `zoo plan`."""


TEXTS = ("recompute", "report", "png", "out")
GROUPS = ("model", "hardware")
DERIVED = ("model_scale", "match")
"""ZooPlan of the configuration that change the model as a whole."""


@dataclass(frozen=True)
class Settings:
    """What was typed."""

    model: str
    hardware: str
    overrides: tuple[str, ...]
    keys: ZooPlan

    def given(self, kind: type[Spec]) -> dict[str, Any]:
        """The keys of one kind that were given."""
        return {name: getattr(self.keys, name) for name in kind.model_fields if name in self.keys.model_fields_set}

    def refuse(self, kind: type[Spec], why: str, but: Sequence[str] = ()) -> None:
        """Raise for keys that mean nothing here.

        Raises:
            ConfigError: one of them was given.
        """
        for name, value in self.given(kind).items():
            if name not in but:
                raise ConfigError(f"{name}: found {value!r}; {why}")


def read_settings(words: Sequence[str]) -> Settings:
    """Read the words of `zoo plan`.

    Raises:
        ConfigError: a key is unknown, a value is not of its kind, or no model is named.
    """
    named: dict[str, str] = {}
    overrides: list[str] = []
    own: list[str] = []
    for word in words:
        key, equals, text = word.partition("=")
        if not equals and not word.startswith("~"):
            _name(named, word)
        elif key in GROUPS:
            if key in named:
                raise ConfigError(f"{word}: the {key} is already named: {named[key]}; leave one of them out")
            named[key] = text
        elif _is_override(word):
            overrides.append(word)
        else:
            own.append(word.removeprefix("parallel."))
    if "model" not in named:
        raise ConfigError("zoo plan: found no model; name one, and a machine: zoo plan MODEL h100_8x")
    keys = read_keys(ZooPlan, own, TEXTS)
    return Settings(named["model"], named.get("hardware", "auto"), tuple(overrides), keys)


def _name(named: dict[str, str], word: str) -> None:
    """A word that stands alone names the model, and the next one the machine."""
    for group in GROUPS:
        if group not in named:
            named[group] = word
            return
    raise ConfigError(f"{word}: the model is {named['model']} and the machine {named['hardware']}; write KEY=VALUE")


def _is_override(word: str) -> bool:
    key = word.lstrip("+~").split("=")[0]
    return key.replace("/", ".").split(".")[0] in GROUPS or key in DERIVED


def jobs(words: Sequence[str]) -> list[list[str]]:
    """Every combination of the comma lists in words, the last list running quickest."""
    return [list(job) for job in itertools.product(*(list(_options(word)) for word in words))]


def _options(word: str) -> Iterator[str]:
    """A word for each part of its comma list; commas inside of brackets, braces and quotes divide nothing.

    What follows `selective:` is one value.
    """
    key, equals, text = word.partition("=")
    if not equals or text.startswith("selective:"):
        yield word
        return
    depth, part, quote = 0, "", ""
    for char in text:
        if quote or char in "'\"":
            quote = "" if char == quote else quote or char
        depth += (char in "[{(") - (char in "]})")
        if char == "," and not depth and not quote:
            yield f"{key}={part}"
            part = ""
        else:
            part += char
    yield f"{key}={part}"

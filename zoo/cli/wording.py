"""Descriptions and counts in words."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from zoo.spec.base import ConfigError, Spec
from zoo.spec.model import ModelSpec
from zoo.train.wording import short_count as short_count

SEQ_LEN = 4096
"""Tokens of a sequence where nobody says otherwise."""
UNITS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def said(spec: Spec, without: Collection[str] = ()) -> dict[str, Any]:
    """What a description says beyond its defaults, flat: `{"type": "gqa", "num_heads": 32, "rope.theta": 1e6}`."""
    found: dict[str, Any] = {}
    for name, field in type(spec).model_fields.items():
        value = getattr(spec, name)
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        if name in without or (name != "type" and value == default and not field.is_required()):
            continue
        if isinstance(value, Spec):
            below = said(value, without=("type",) if type(value) is type(default) else ())
            found |= {name if key == "type" else f"{name}.{key}": item for key, item in below.items()}
        else:
            found[name] = value
    return found


def as_yaml(value: Any) -> str:
    """A value as one would write it in a configuration."""
    words = {True: "true", False: "false", None: "null"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def in_words(settings: Mapping[str, Any]) -> str:
    """Settings on one line."""
    return ", ".join(f"{key} {as_yaml(value)}" for key, value in settings.items())


def flat(data: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested settings by dotted path."""
    found: dict[str, Any] = {}
    for key, value in data.items():
        found |= flat(value, f"{path}{key}.") if isinstance(value, Mapping) else {f"{path}{key}": value}
    return found


def seq_len_for(specs: Sequence[ModelSpec], asked: int | None) -> int:
    """The sequence length to count FLOPs at: `asked`, or SEQ_LEN where the contexts of all models reach that far."""
    if asked is not None and asked < 1:
        raise ConfigError(f"--seq-len: found {asked}; must be at least 1")
    return asked or min([SEQ_LEN, *(spec.card.context for spec in specs if spec.card)])


def claim_against(what: str, claim: str | None, counts: Sequence[int]) -> str:
    """A claimed number beside the nearest of the numbers that were counted: "30.53B parameters, counted 30.53B"."""
    if claim is None:
        return ""
    match = re.search(r"([\d.]+)\s*([KMBT])", claim)
    if not match:
        return f"{claim} {what}"
    claimed = float(match[1]) * UNITS[match[2]]
    counted = min(counts, key=lambda count: abs(count - claimed))
    return f"{claim} {what}, counted {short_count(counted)} ({counted / claimed - 1:+.1%})"

"""Keys of a verb that has no configuration: `key=value` words, decoded strictly."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, TypeVar

from zoo.spec.base import ConfigError, Spec, decode

S = TypeVar("S", bound=Spec)


def read_keys(spec: type[S], words: Sequence[str], texts: Collection[str] = ()) -> S:
    """What words such as `top_k=5` or `upcycle.num_experts=8` say.

    Args:
        spec: the description that they fill.
        texts: keys whose values are taken as they are typed, each time that they are given; others are read as in
            overrides.

    Raises:
        ConfigError: a word has no value, a key is unknown or given twice, or a value is not allowed.
    """
    data: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"{word}: has no value; write {word}=VALUE")
        if key in texts:
            data.setdefault(key, []).append(value)
        else:
            _put(data, key, _plain(word))
    return decode(spec, data)


def _put(data: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise ConfigError(f"{key}: {parent} is a value and has no keys")
    if last in data:
        raise ConfigError(f"{key}: is given twice; leave one of them out")
    data[last] = value


def _plain(word: str) -> Any:
    """The value of a word, as Hydra reads it; what Hydra cannot read is a text, such as a path with a blank."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(word)
    except HydraException:
        return word.partition("=")[2]
    if override.is_sweep_override():
        raise ConfigError(f"{override.key_or_group}: found several values; a list is written [a,b]")
    return override.value()

"""What Hydra's errors mean to a person: where, what was found, what is allowed, what to do."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hydra.errors import HydraException, MissingConfigException, OverrideParseException

from zoo.config import compose_once, options_of
from zoo.spec.base import ConfigError, near
from zoo.spec.composed import plain, take_model

if TYPE_CHECKING:
    from omegaconf import DictConfig


def explain(error: Exception, config_name: str | None, overrides: Sequence[str]) -> str:
    """The message for an error that came of composing `overrides`; one line for each unknown key among them."""
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override, error.message)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        return unknown_option(group, option, error.options or ())
    if _refused_key(error):
        return _unknown_keys(error, config_name, overrides)
    return _in_other_words(error, overrides)


def unknown_option(group: str, option: str, options: Iterable[str]) -> str:
    """The message for an option that a config group does not have."""
    options = sorted(options)
    if not options:
        return f"{group}={option}: there is no config group {group}"
    hint = near(option, options)
    if group in ("model", "hardware"):
        verb = "zoo list" if group == "model" else "zoo list hardware"
        advice = f"{hint or f'there is no such {group}'}; '{verb}' shows all {len(options)}"
    else:
        advice = "; ".join(part for part in (listed(options), hint) if part)
    return f"{group}: found {option!r}; {advice}"


def _unreadable(override: str, message: str) -> str:
    if "=" not in override and not override.startswith("~"):
        return f"{override}: has no value; write {override}=VALUE"
    lines = [line for line in message.split("\n") if line and not line.startswith(("Error parsing", "See http"))]
    reason = "" if lines[0].startswith("Lexer") else f" ({lines[0]})"
    column = len(lines[1]) - len("LexerNoViableAltException: ") if len(lines) > 1 and lines[1].endswith("^") else 0
    place = f" at column {column}" if column > 0 else ""
    key, _, value = override.partition("=")
    quoted = f"{key}='{value}'" if key and value and "'" not in value else "KEY='VALUE'"
    return f"{override}: cannot be read{place}{reason}; write KEY=VALUE, and special characters in quotes: {quoted}"


def _refused_key(error: Exception) -> str:
    """The key or group that Hydra could not override or delete; empty for other errors."""
    match = re.match(r"Could not (?:override|delete from config\.) '([^']+)'", str(error))
    return match[1] if match else ""


def _unknown_keys(error: Exception | None, config_name: str | None, overrides: Sequence[str]) -> str:
    """One line for each override that names nothing: leave them out, one by one, until the others compose."""
    rest, refused = list(overrides), []
    while error is not None:
        key = _refused_key(error)
        culprits = [override for override in rest if _key_of(override) == key]
        if not culprits:
            return _in_other_words(error, overrides)
        refused += culprits
        rest = [override for override in rest if override not in culprits]
        try:
            cfg, choices = compose_once(config_name, rest)
            error = None
        except HydraException as next_error:
            error = next_error
    known = known_keys(cfg)
    return "\n".join(
        _unknown_group(override, choices) if re.search("[/@]", _key_of(override)) else _unknown_key(override, known)
        for override in refused
        if override.startswith("~") or _key_of(override) not in known
    )


def _key_of(override: str) -> str:
    return override.split("=", 1)[0].lstrip("+~")


def _unknown_group(override: str, choices: Mapping[str, str]) -> str:
    group = _key_of(override)
    message = f"{group}: found no such group in this configuration; {near(group, choices) or listed(choices)}"
    exists = override.partition("=")[2] in options_of(group.partition("@")[0])
    return f"{message}; '+{override}' adds it" if exists else message


def _unknown_key(override: str, known: Collection[str]) -> str:
    key = _key_of(override)
    if key in known:
        return f"{key}: stands at its default, which no file mentions; there is nothing to remove"
    parent, leaf = _split(key)
    while parent and parent not in known:
        parent, leaf = _split(parent)
    siblings = [_split(name)[1] for name in known if _split(name)[0] == parent]
    namesakes = [name for name in known if _split(name)[1] == _split(key)[1]]
    if not siblings:
        hint = f"{parent} is a value and has no keys"
    elif namesakes and not near(leaf, siblings):
        hint = f"did you mean {' or '.join(sorted(namesakes)[:3])}?"
    else:
        hint = near(leaf, siblings) or listed(siblings)
    return f"{f'{parent}.' if parent else ''}{leaf}: unknown key; {hint}"


def _split(key: str) -> tuple[str, str]:
    """A dotted path as its parent and its last name."""
    parent, _, leaf = key.rpartition(".")
    return parent, leaf


def listed(names: Iterable[str]) -> str:
    """The names that are allowed."""
    return f"allowed: {', '.join(sorted(names)) or 'none'}"


def known_keys(cfg: DictConfig) -> list[str]:
    """Dotted paths of all that the configuration says, and of what it leaves at its default in the model."""
    from omegaconf import OmegaConf

    data = OmegaConf.to_container(cfg)
    known = dict.fromkeys(_paths(data))
    try:
        model, _ = take_model(plain(cfg), None)
        known |= dict.fromkeys(_paths({"model": model.to_dict()}))
    except ConfigError:
        pass  # it says too little, or what is wrong with it is not what was asked
    return list(known)


def _paths(data: Any, path: str = "") -> Iterator[str]:
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield f"{path}{key}"
            yield from _paths(value, f"{path}{key}.")


def _in_other_words(error: Exception, overrides: Sequence[str]) -> str:
    """Hydra's text on one line, with ours for the mistakes that are made often."""
    text = str(error)
    if match := re.match(r"Ambiguous value for argument '(.*)'", text):
        key, _, values = match[1].partition("=")
        return f"{key}: found several values; a sweep needs -m; a list is {key}=[{values}], a text {key}='{values}'"
    if match := re.match(r"Sweep parameters '(.*)' requires --multirun", text):
        return f"{_key_of(match[1])}: found several values; a sweep needs -m"
    if match := re.match(r"Could not append to config. An item is already at '(.*)'", text):
        return f"{match[1]}: is set already; to change it, leave out the '+'"
    if text.startswith("Config group override must be a string"):
        found = " ".join(override for override in overrides if override.endswith("=null"))
        return f"{found}: a group takes the name of an option; '~GROUP' takes it away"
    cause = f"; {str(error.__cause__).splitlines()[0]}" if error.__cause__ else ""
    return " ".join(line.strip() for line in text.splitlines() if line.strip()) + cause

"""What a target cannot express, collected so that a person reads all of it at once."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from zoo.spec.base import ConfigError, Spec


class Refusals:
    """Reasons why a description does not go over, and how a handed-over model differs in rounding alone."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.lines: list[str] = []
        self.notes: list[str] = []

    def no(self, path: str, found: Any, why: str) -> None:
        """A setting that the target has no counterpart for."""
        shown = type(found).__name__ if isinstance(found, Spec) else repr(found)
        self.lines.append(f"{path}: found {shown}; {self.target} {why}")

    def rest(self, spec: Spec, path: str, carried: Collection[str], rounding: Collection[str] = ()) -> None:
        """Refuse every setting that is not at its default and not named: also those that are thought of later.

        Args:
            spec: The description.
            path: Where it stands.
            carried: Its fields that are handed over, or that say nothing about what is computed.
            rounding: Its fields that change results in their last bits only; these are noted.
        """
        for name, field in type(spec).model_fields.items():
            value = getattr(spec, name)
            if name in carried or (not field.is_required() and value == field.get_default(call_default_factory=True)):
                continue
            if name in rounding:
                note = f"{path}.{name}={value} is not handed over: it changes results in their last bits only"
                self.notes.append(note)
            else:
                self.no(f"{path}.{name}", value, "has no such setting")

    def raise_all(self) -> None:
        """Stop where something was refused.

        Raises:
            ConfigError: one line for each reason.
        """
        if self.lines:
            raise ConfigError("\n".join(dict.fromkeys(self.lines)))

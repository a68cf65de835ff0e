"""Strict, frozen descriptions, and the one error that a user's mistake ends in."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, SerializeAsAny, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

S = TypeVar("S", bound="Spec")


class ConfigError(ValueError):
    """A mistake in what the user wrote. The message says where, what was found, what is allowed and what to do."""

    def __init__(self, message: str = "", *, misplaced: bool = False) -> None:
        """
        Args:
            misplaced: keys stand where there are none, or values where keys are due; no value alone is to blame.
        """
        super().__init__(message)
        self.misplaced = misplaced


class Spec(BaseModel):
    """Base of every description: immutable, strictly typed, and closed to keys that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            refuse_unknown_keys(value, cls.model_fields, cls.__name__)
        return value

    def to_dict(self) -> dict[str, Any]:
        """The description as plain data, ready for YAML; `decode` turns it back into an equal description."""
        return self.model_dump(mode="json")

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, validated again."""
        return type(self).model_validate({**{name: getattr(self, name) for name in type(self).model_fields}, **changes})


class TypedSpec(Spec):
    """A description that is chosen by name: the `type` key picks one of the subclasses registered for `family`."""

    type: str


_REGISTRY: dict[type[TypedSpec], dict[str, type[TypedSpec]]] = {}


def register_spec(spec: type[TypedSpec]) -> type[TypedSpec]:
    """Class decorator: make `spec` choosable by its `type` wherever one of its `TypedSpec` bases is expected."""
    name = spec.model_fields["type"].default
    for base in spec.__mro__[1:]:
        if isinstance(base, type) and issubclass(base, TypedSpec) and base is not TypedSpec:
            known = _REGISTRY.setdefault(base, {})
            if known.setdefault(name, spec) is not spec:
                raise ValueError(f"{base.__name__} type {name!r} is already registered by {known[name].__qualname__}")
    return spec


def registered(base: type[TypedSpec]) -> dict[str, type[TypedSpec]]:
    """The `type` names that may stand where `base` is expected, with their spec classes."""
    return dict(_REGISTRY.get(base, {}))


_MIRRORS: dict[tuple[str, type[TypedSpec]], Any] = {}


def register_mirror(floor: str, spec: type[TypedSpec], counterpart: Any) -> None:
    """Name the counterpart of a description on another floor, for descriptions from outside of this package.

    Args:
        floor: `blocks` or `plan`.
        spec: The description.
        counterpart: A class, or `"package.file:Class"`, which is imported when it is first needed.
    """
    _MIRRORS[floor, spec] = counterpart


def mirrored(spec: type[TypedSpec], floor: str, base: type[Any], describes: Callable[[Any], Any]) -> Any:
    """What stands for `spec` on another floor: the class `base` in `zoo.<floor>.<same module>` that describes it.

    The floors mirror each other file by file, so a new block is named nowhere but in its own three files.
    """
    if (floor, spec) not in _MIRRORS:
        module = importlib.import_module(spec.__module__.replace("zoo.spec.", f"zoo.{floor}.", 1))
        classes = [item for item in vars(module).values() if isinstance(item, type) and issubclass(item, base)]
        found = [item for item in classes if describes(item) is spec]
        if len(found) != 1:
            raise TypeError(f"{module.__name__} must hold one {base.__name__} for {spec.__name__}, found {found}")
        _MIRRORS[floor, spec] = found[0]
    elif isinstance(_MIRRORS[floor, spec], str):
        _MIRRORS[floor, spec] = pkgutil.resolve_name(_MIRRORS[floor, spec])
    return _MIRRORS[floor, spec]


def choice_of(base: type[TypedSpec]) -> Any:
    """Annotation for a field that holds any registered subclass of `base`, picked by its `type` key."""

    def pick(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        options = _REGISTRY.get(base, {})
        if value.get("type") not in options:
            raise problem(
                "type", value.get("type"), f"allowed: {', '.join(sorted(options))}", near(value.get("type"), options)
            )
        return options[value["type"]].model_validate(value)

    return Annotated[SerializeAsAny[base], BeforeValidator(pick)]  # type: ignore[misc, valid-type]


def _listed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


T = TypeVar("T")
Items = Annotated[tuple[T, ...], BeforeValidator(_listed)]
"""A tuple field that also takes a YAML list."""


def near(word: Any, known: Iterable[str]) -> str:
    """A "did you mean" hint with the nearest known names, or an empty string."""
    matches = difflib.get_close_matches(str(word), list(known), n=3, cutoff=0.6)
    return f"did you mean {' or '.join(matches)}?" if matches else ""


def problem(field: str | tuple[str | int, ...], found: Any, rule: str, advice: str = "") -> ValidationError:
    """An error to raise inside a validator: `field` is relative to the object that is being validated."""
    message = "; ".join(part for part in (rule, advice) if part)
    loc = (field,) if isinstance(field, str) else field
    error = InitErrorDetails(type=PydanticCustomError("rule", message), loc=loc, input=found)
    return ValidationError.from_exception_data("zoo", [error])


def refuse_unknown_keys(value: Mapping[str, Any], known: Iterable[str], owner: str) -> None:
    """Raise for the keys of `value` that `owner` has no field for, each with the nearest names."""
    known = list(known)
    errors = [
        InitErrorDetails(
            type=PydanticCustomError(
                "unknown_key",
                "unknown key of {owner}; {hint}",
                {"owner": owner, "hint": near(key, known) or f"allowed: {', '.join(sorted(known))}"},
            ),
            loc=(str(key),),
            input=value[key],
        )
        for key in value
        if key not in known
    ]
    if errors:
        raise ValidationError.from_exception_data("zoo", errors)


def decode(spec: type[S], data: Any, path: str = "") -> S:
    """Turn plain data into a `spec`.

    Raises:
        ConfigError: one line for each mistake, with its dotted path below `path`, what was found and what is allowed.
    """
    return explained(lambda: spec.model_validate(data), path)


def explained(make: Callable[[], T], path: str = "") -> T:
    """`make()`, whose validation errors become one ConfigError with paths below `path`."""
    try:
        return make()
    except ValidationError as error:
        details = error.errors()
        misplaced = any(detail["type"] == "unknown_key" or isinstance(detail["input"], Mapping) for detail in details)
        raise ConfigError("\n".join(_explain(detail, path) for detail in details), misplaced=misplaced) from None


def _explain(detail: Any, path: str) -> str:
    where = ".".join([path, *(str(part) for part in detail["loc"] if part != "slots")]).strip(".")
    if detail["type"] == "missing":
        return f"{where}: missing; give it a value"
    found = detail["input"]
    shown = type(found).__name__ if isinstance(found, (Mapping, BaseModel)) else repr(found)
    return f"{where}: found {shown}; {detail['msg'][0].lower()}{detail['msg'][1:]}"

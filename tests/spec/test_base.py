"""Strict decoding: what is refused, and in which words."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from zoo.spec import base
from zoo.spec.base import (
    ConfigError,
    Items,
    Spec,
    TypedSpec,
    choice_of,
    decode,
    mirrored,
    near,
    problem,
    register_mirror,
    register_spec,
    registered,
)


class Shape(TypedSpec):
    pass


@register_spec
class Circle(Shape):
    type: Literal["circle"] = "circle"
    radius: float


@register_spec
class Square(Shape):
    type: Literal["square"] = "square"
    side: int = 1


class Drawing(Spec):
    title: str = "untitled"
    main: choice_of(Shape)  # type: ignore[valid-type]
    others: dict[str, choice_of(Shape)] = {}  # type: ignore[valid-type]
    sizes: Items[int] = ()


def test_type_chooses_the_class_and_data_comes_back() -> None:
    data = {"main": {"type": "circle", "radius": 2.0}, "others": {"a": {"type": "square"}}, "sizes": [1, 2]}
    drawing = decode(Drawing, data)
    assert (drawing.main, drawing.others["a"], drawing.sizes) == (Circle(radius=2.0), Square(), (1, 2))
    assert decode(Drawing, drawing.to_dict()) == drawing
    assert registered(Shape) == {"circle": Circle, "square": Square}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "top.main: missing; give it a value"),
        ({"main": {"type": "circle"}}, "top.main.radius: missing; give it a value"),
        (
            {"main": {"type": "cirkle", "radius": 1.0}},
            "top.main.type: found 'cirkle'; allowed: circle, square; did you mean circle?",
        ),
        ({"main": {"radius": 1.0}}, "top.main.type: found None; allowed: circle, square"),
        (
            {"main": {"type": "square", "sid": 2}},
            "top.main.sid: found 2; unknown key of Square; did you mean side?",
        ),
        (
            {"main": {"type": "square", "colour": "red"}},
            "top.main.colour: found 'red'; unknown key of Square; allowed: side, type",
        ),
        (
            {"main": {"type": "square"}, "others": {"a": {"type": "square", "side": "2"}}},
            "top.others.a.side: found '2'; input should be a valid integer",
        ),
        ({"main": {"type": "square", "side": True}}, "top.main.side: found True; input should be a valid integer"),
        ({"main": {"type": "square", "side": 2.0}}, "top.main.side: found 2.0; input should be a valid integer"),
        ({"main": 3}, "top.main: found 3; input should be a valid dictionary or instance of Shape"),
    ],
)
def test_each_mistake_has_its_line(data: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        decode(Drawing, data, "top")
    assert str(error.value) == message


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        decode(Drawing, {"titl": "x", "titlee": "y", "main": {"type": "square"}})
    assert len(str(error.value).splitlines()) == 2


def test_descriptions_do_not_change_but_make_checked_copies() -> None:
    square = Square(side=2)
    with pytest.raises(ValueError, match="frozen"):
        square.side = 3  # type: ignore[misc]
    assert square.replace(side=3) == Square(side=3)
    with pytest.raises(ValueError, match="valid integer"):
        square.replace(side="3")


def test_a_rule_of_several_fields_speaks_of_one() -> None:
    class Range(Spec):
        low: int
        high: int

        @base.model_validator(mode="after")
        def _check(self) -> Range:
            if self.low > self.high:
                raise problem("low", self.low, f"must be at most high ({self.high})", "swap {them}")
            return self

    with pytest.raises(ConfigError) as error:
        decode(Range, {"low": 2, "high": 1}, "r")
    assert str(error.value) == "r.low: found 2; must be at most high (1); swap {them}"


def test_a_type_belongs_to_one_class() -> None:
    with pytest.raises(ValueError, match="Shape type 'square' is already registered"):

        @register_spec
        class Other(Shape):
            type: Literal["square"] = "square"


def test_near_names() -> None:
    assert near("num_expert", ["num_experts", "top_k"]) == "did you mean num_experts?"
    assert near("zzz", ["num_experts"]) == ""


class Work:
    describes = Square


def test_counterparts_are_found_beside_the_spec_or_by_name() -> None:
    found = mirrored(Square, "work", Work, lambda item: getattr(item, "describes", None))
    assert found is Work
    with pytest.raises(TypeError, match="must hold one Work for Circle"):
        mirrored(Circle, "work", Work, lambda item: getattr(item, "describes", None))
    register_mirror("work", Circle, "collections:OrderedDict")
    assert mirrored(Circle, "work", Work, lambda item: None).__name__ == "OrderedDict"

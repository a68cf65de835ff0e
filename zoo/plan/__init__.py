"""What a model costs: counts, bytes, seconds; and `zoo.plan(...)`, the best layout of it on a machine.

The package is itself the call, so that `zoo.plan("tiny_moe", "cpu")` and `zoo.plan.params` both mean what they say.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        """`zoo.plan.plan.plan`."""
        return importlib.import_module("zoo.plan.plan").plan(*args, **options)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        try:
            return importlib.import_module(f"{self.__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{self.__name__}.{name}":
                raise
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}") from None


sys.modules[__name__].__class__ = _Callable

"""A mixture-of-experts model zoo with hardware-aware configs.

Every public call is loaded when it is first used: importing zoo imports neither torch nor hydra.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.api import build as build
    from zoo.config import list_hardware as list_hardware
    from zoo.config import list_models as list_models
    from zoo.config import load as load
    from zoo.hf import from_pretrained as from_pretrained
    from zoo.hf import save_pretrained as save_pretrained
    from zoo.hf import spec_from_hf as spec_from_hf
    from zoo.hf import spec_to_hf as spec_to_hf
    from zoo.plan.estimate import estimate as estimate
    from zoo.plan.layout import Layout as Layout
    from zoo.plan.plan import plan as plan
    from zoo.registry import register as register
    from zoo.spec.base import ConfigError as ConfigError
    from zoo.spec.twin import shrink as shrink
    from zoo.upcycling import upcycle as upcycle

__version__ = "0.1.0"

_HOMES = {
    "list_models": "zoo.config",
    "list_hardware": "zoo.config",
    "load": "zoo.config",
    "build": "zoo.api",
    "shrink": "zoo.spec.twin",
    "upcycle": "zoo.upcycling",
    "spec_from_hf": "zoo.hf",
    "spec_to_hf": "zoo.hf",
    "from_pretrained": "zoo.hf",
    "save_pretrained": "zoo.hf",
    "plan": "zoo.plan.plan",
    "estimate": "zoo.plan.estimate",
    "Layout": "zoo.plan.layout",
    "register": "zoo.registry",
    "ConfigError": "zoo.spec.base",
}
"""The module that each public call comes from; type checkers read the imports above."""

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(_HOMES[name])
    # `zoo.plan` is a package that is called: importing its home has brought it in, and it stays.
    value = sys.modules.get(f"{__name__}.{name}") or getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})

"""Hugging Face, both ways: configurations and checkpoints. One table per family is read in both directions."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.hf.checkpoint import from_pretrained as from_pretrained
    from zoo.hf.checkpoint import save_pretrained as save_pretrained
    from zoo.hf.config import spec_from_hf as spec_from_hf
    from zoo.hf.config import spec_to_hf as spec_to_hf

# Configurations need no torch, so nothing is imported before it is asked for.
_HOMES = {
    "spec_from_hf": "zoo.hf.config",
    "spec_to_hf": "zoo.hf.config",
    "from_pretrained": "zoo.hf.checkpoint",
    "save_pretrained": "zoo.hf.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])

"""The blocks, for use in any model: `from zoo.blocks import Attention, MoE`. Each takes plain arguments.

A block is imported when it is first named.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.blocks.attention import Attention as Attention
    from zoo.blocks.base import Context as Context
    from zoo.blocks.delta import GatedDelta as GatedDelta
    from zoo.blocks.experts import Experts as Experts
    from zoo.blocks.mamba1 import Mamba1 as Mamba1
    from zoo.blocks.mamba2 import Mamba2 as Mamba2
    from zoo.blocks.mlp import MLP as MLP
    from zoo.blocks.moe import MoE as MoE
    from zoo.blocks.norm import Norm as Norm
    from zoo.blocks.router import Router as Router
    from zoo.blocks.short_conv import ShortConv as ShortConv

_HOMES = {
    "Attention": "zoo.blocks.attention",
    "Context": "zoo.blocks.base",
    "Experts": "zoo.blocks.experts",
    "GatedDelta": "zoo.blocks.delta",
    "MLP": "zoo.blocks.mlp",
    "Mamba1": "zoo.blocks.mamba1",
    "Mamba2": "zoo.blocks.mamba2",
    "MoE": "zoo.blocks.moe",
    "Norm": "zoo.blocks.norm",
    "Router": "zoo.blocks.router",
    "ShortConv": "zoo.blocks.short_conv",
}
"""The module of each block; type checkers read the imports above."""

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})

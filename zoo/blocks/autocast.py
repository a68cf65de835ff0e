"""Autocast where a block does its own arithmetic."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a matrix product with `x` is taken in: autocast's where it is on and casts x, else that of x."""
    kind = x.device.type
    if _is_on(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Switch autocast off on `device` where it exists and is on."""
    return torch.autocast(device.type, enabled=False) if _is_on(device.type) else nullcontext()


def _is_on(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)

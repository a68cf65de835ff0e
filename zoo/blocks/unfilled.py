"""Modules without numbers: made on the meta device, their starts left out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_FILLS = {getattr(nn.init, name) for name in ("normal_", "uniform_", "constant_", "kaiming_uniform_")}
_FILLS |= {getattr(torch.Tensor, name) for name in ("normal_", "uniform_", "fill_", "zero_")}


class _Unfilled(TorchFunctionMode):
    """What fills a tensor does nothing: on the meta device that costs milliseconds a tensor, and there is nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FILLS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def unfilled() -> Iterator[None]:
    """Around the making of modules: on the meta device, and no weight is given a start."""
    with torch.device("meta"), _Unfilled():
        yield

"""The nonlinearities of MLPs and experts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.blocks.compiled_mixers import fits
from zoo.blocks.compiled_trunk import SwiGLU
from zoo.spec.mlp import ActivationSpec


def activate(spec: ActivationSpec, up: Tensor, gate: Tensor | None = None) -> Tensor:
    """The hidden activations of an MLP: f(gate) * up, or f(up) when `spec` is ungated.

    Args:
        up: [..., f], any floating dtype.
        gate: [..., f] of the same dtype; given exactly when `spec.gated`.

    Returns:
        [..., f] of the same dtype.
    """
    if gate is None:
        return _PLAIN[spec.activation](up)
    if is_swiglu(spec, up, gate):
        y: Tensor = SwiGLU.apply(gate, up)
        return y
    if spec.activation in _PLAIN:
        return _PLAIN[spec.activation](gate) * up
    return _GATED[spec.activation](gate, up, spec.activation_limit or 0.0)


def is_swiglu(spec: ActivationSpec, up: Tensor, gate: Tensor) -> bool:
    """Whether a compiled kernel computes this."""
    return spec.activation == "silu" and fits(gate, up)


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _clamped_swish(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


def _clamped_silu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def _silu_clamped(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    return F.silu(gate).clamp(max=limit) * up.clamp(-limit, limit)


def _situ(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    del limit
    return 4 * torch.tanh(gate / 4) * torch.sigmoid(gate) * (25 * torch.tanh(up / 25))


_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": _relu2,
}
_GATED: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "clamped_swish": _clamped_swish,
    "clamped_silu": _clamped_silu,
    "silu_clamped": _silu_clamped,
    "situ": _situ,
}

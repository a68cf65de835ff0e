"""Activations against their formulas in numpy, the MLP against plain matrix products."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from zoo.blocks.activation import activate
from zoo.blocks.base import initialize
from zoo.blocks.mlp import MLP
from zoo.spec.base import ConfigError, decode
from zoo.spec.mlp import ActivationSpec

LIMIT = 1.5


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def silu(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(x)


def gelu(x: np.ndarray) -> np.ndarray:
    return x * np.vectorize(lambda value: 0.5 * (1 + math.erf(value / math.sqrt(2))))(x)


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


PLAIN = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
}
GATED = {
    **{name: lambda gate, up, f=f: f(gate) * up for name, f in PLAIN.items()},
    "clamped_swish": lambda gate, up: (
        (np.clip(up, -LIMIT, LIMIT) + 1) * np.minimum(gate, LIMIT) * sigmoid(1.702 * np.minimum(gate, LIMIT))
    ),
    "clamped_silu": lambda gate, up: silu(np.minimum(gate, LIMIT)) * np.clip(up, -LIMIT, LIMIT),
    "silu_clamped": lambda gate, up: np.minimum(silu(gate), LIMIT) * np.clip(up, -LIMIT, LIMIT),
    "situ": lambda gate, up: 4 * np.tanh(gate / 4) * sigmoid(gate) * 25 * np.tanh(up / 25),
}


def activation(name: str, gated: bool = True) -> ActivationSpec:
    limit = LIMIT if "clamped" in name else None
    return decode(ActivationSpec, {"activation": name, "activation_limit": limit, "gated": gated})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", GATED)
def test_gated(name: str, dtype: torch.dtype) -> None:
    gate, up = (4 * torch.randn(64, 33)).to(dtype), (30 * torch.randn(64, 33)).to(dtype)
    found = activate(activation(name), up, gate)
    expected = GATED[name](gate.double().numpy(), up.double().numpy())
    assert found.dtype == dtype
    rounding = 8 * torch.finfo(dtype).eps
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=rounding, atol=rounding * abs(expected).max())


@pytest.mark.parametrize("name", PLAIN)
def test_ungated(name: str) -> None:
    x = torch.linspace(-6, 6, 1001)
    found = activate(activation(name, gated=False), x)
    np.testing.assert_allclose(found.numpy(), PLAIN[name](x.double().numpy()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_the_mlp_is_matrices_around_an_activation(bias: bool) -> None:
    x = torch.randn(2, 3, 8)
    gated = MLP(8, d_ffn=12, bias=bias)
    plain = MLP(8, d_ffn=12, bias=bias, gated=False, activation="relu2")
    initialize(gated, 0.5, 0.5)
    hidden = torch.nn.functional.silu(gated.gate(x)) * gated.up(x)
    torch.testing.assert_close(gated(x), hidden @ gated.down.weight.T + (gated.down.bias if bias else 0))
    torch.testing.assert_close(plain(x), plain.down(plain.up(x).clamp_min(0) ** 2))
    assert {name.split(".")[0] for name, _ in plain.named_parameters()} == {"up", "down"}


def test_only_the_last_matrix_starts_smaller() -> None:
    mlp = MLP(64, d_ffn=256)
    initialize(mlp, 1.0, 0.01)
    stds = {name: float(parameter.detach().std()) for name, parameter in mlp.named_parameters()}
    assert stds == {
        "gate.weight": pytest.approx(1, rel=0.1),
        "up.weight": pytest.approx(1, rel=0.1),
        "down.weight": pytest.approx(0.01, rel=0.1),
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_ffn": 8, "activation": "silly"}, "MLPSpec.activation: found 'silly'"),
        ({"d_ffn": 8, "activation": "clamped_silu"}, "MLPSpec.activation_limit: found None"),
        ({"d_ffn": 8, "activation_limit": 7.0}, "MLPSpec.activation_limit: found 7.0"),
        ({"d_ffn": 8, "activation": "situ", "gated": False}, "MLPSpec.gated: found False"),
        ({"d_ffn": 0}, "MLPSpec.d_ffn: found 0"),
        ({"d_fnn": 8}, "did you mean d_ffn"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MLP(8, **options)

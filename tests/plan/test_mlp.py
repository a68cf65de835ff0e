"""The cost of the dense channel mixer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from zoo.spec import BlockSpec, MLPSpec

OPTIONS: list[dict[str, Any]] = [
    {},
    {"bias": True},
    {"gated": False, "activation": "relu2"},
    {"gated": False, "activation": "gelu_tanh", "bias": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_the_module(options: dict[str, Any], check_block: Callable[[BlockSpec], None]) -> None:
    check_block(MLPSpec.model_validate({"d_ffn": 40, **options}))

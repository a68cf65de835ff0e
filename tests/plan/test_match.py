"""Dense counterparts have as much of what they were matched by."""

from __future__ import annotations

import pytest

from tests.models import small_spec
from zoo.plan.match import dense_counterpart
from zoo.spec.base import ConfigError
from zoo.spec.mlp import MLPSpec


@pytest.mark.parametrize("match", ["active", "total", "flops"])
@pytest.mark.parametrize("extra", [{}, {"num_shared_experts": 1, "shared_gate": True}, {"gated": False, "bias": True}])
def test_what_was_matched_agrees(match: str, extra: dict[str, object]) -> None:
    moe = {"type": "moe", "num_experts": 16, "top_k": 3, "d_expert": 40, "activation": "relu2", **extra}
    spec = small_spec(moe=moe)
    dense = dense_counterpart(spec, match)
    assert isinstance(dense.slots["moe"], MLPSpec)
    assert dense.slots["moe"].activation == "relu2"
    measures = {
        "active": lambda model: model.params().active,
        "total": lambda model: model.params().total,
        "flops": lambda model: model.flops(1).total,
    }
    unit = 3 * 2 * spec.d_model  # parameters or FLOPs of one unit of width, at most
    assert abs(measures[match](dense) - measures[match](spec)) <= unit
    assert dense.params().total == dense.params().active


def test_a_dense_model_has_no_counterpart() -> None:
    with pytest.raises(ConfigError, match="match: found 'active'; unnamed has no mixture of experts"):
        dense_counterpart(dense_counterpart(small_spec(name="unnamed"), "active").replace(name="unnamed"), "active")

"""The dense model that corresponds to a mixture of experts, for fair comparisons."""

from __future__ import annotations

from typing import Literal

from zoo.plan.base import cost_of
from zoo.spec.base import ConfigError
from zoo.spec.block import FFNSpec
from zoo.spec.mlp import ActivationSpec, MLPSpec
from zoo.spec.model import ModelSpec
from zoo.spec.moe import MoESpec

Match = Literal["active", "total", "flops"]


def dense_counterpart(spec: ModelSpec, match: Match) -> ModelSpec:
    """The same model with an MLP in the place of every mixture of experts.

    Args:
        match: what the MLP has as much of as the block it replaces, to within half a unit of its width: parameters that
            one token touches (`active`), parameters (`total`), or forward FLOPs (`flops`).

    Raises:
        ConfigError: the model has no mixture of experts.
    """
    experts = {name: block for name, block in spec.slots.items() if isinstance(block, MoESpec)}
    if not experts:
        raise ConfigError(f"match: found {match!r}; {spec.name} has no mixture of experts to match; leave match away")
    replaced = {name: _mlp(block, spec, match) for name, block in experts.items()}
    return spec.replace(name=f"{spec.name}_dense_{match}", card=None, slots={**spec.slots, **replaced})


def _mlp(moe: MoESpec, spec: ModelSpec, match: Match) -> MLPSpec:
    activation = {name: getattr(moe, name) for name in ActivationSpec.model_fields}

    def mlp(d_ffn: int) -> MLPSpec:
        return MLPSpec(d_ffn=d_ffn, **activation)

    # Every measure is a straight line in the width.
    one, two = (_measure(mlp(d_ffn), spec, match) for d_ffn in (1, 2))
    return mlp(max(1, round(1 + (_measure(moe, spec, match) - one) / (two - one))))


def _measure(block: FFNSpec, spec: ModelSpec, match: Match) -> float:
    cost = cost_of(block, spec.d_model, spec.norm)
    if match == "flops":
        return sum(cost.flops(seq_len=1).values())
    return sum(weight.active if match == "active" else weight.size for weight in cost.weights())

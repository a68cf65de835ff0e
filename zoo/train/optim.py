"""From an optimizer description to optimizers over a model's parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from typing import Any

from torch import Tensor, nn, optim

from zoo.spec.train import AdamWSpec, MuonSpec, OptimizerSpec
from zoo.train.muon import Muon

FUSED_DEVICES = frozenset({"cpu", "cuda", "mps", "xpu"})
"""Where torch has a fused AdamW: one kernel for all parameters, 3 to 4 times faster than a loop on a CPU."""


class Role(StrEnum):
    """What a parameter is to an optimizer."""

    MATRIX = "matrix"
    EXPERTS = "experts"
    """A stack of matrices, one per expert."""
    ROUTER = "router"
    EMBEDDING = "embedding"
    HEAD = "head"
    VECTOR = "vector"
    """Norm weights, biases, and whatever else is no matrix."""


def role_of(name: str, parameter: Tensor) -> Role:
    """The role of a parameter of a decoder, from its name and shape."""
    parts = name.split(".")
    experts = "experts" in parts
    # Logarithms of decays are rates, though a state-space layer may hold one for each entry of its state.
    no_product = parts[-1].endswith(("bias", "_log")) or any("norm" in part for part in parts)
    if parameter.ndim != (3 if experts else 2) or no_product:
        return Role.VECTOR
    if experts:
        return Role.EXPERTS
    if "router" in parts:
        return Role.ROUTER
    return {"embed": Role.EMBEDDING, "head": Role.HEAD}.get(parts[0], Role.MATRIX)


Named = Sequence[tuple[str, Tensor]]


def build_optimizers(model: nn.Module, spec: OptimizerSpec) -> list[optim.Optimizer]:
    """The optimizers that together update every trained parameter of `model` once per step.

    Parameter groups carry `param_names` and `peak_lr`, the rate that `set_lr` scales.
    """
    parameters = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    optimizers = _BUILDERS[type(spec)](parameters, spec)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def set_lr(optimizers: Iterable[optim.Optimizer], ratio: float) -> None:
    """Set every learning rate to `ratio` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * ratio


def _adamw(parameters: Named, spec: AdamWSpec) -> list[optim.Optimizer]:
    def decays(name: str, parameter: Tensor) -> bool:
        return spec.decay == "all" or role_of(name, parameter) not in (Role.VECTOR, Role.EMBEDDING)

    groups = [
        _group([item for item in parameters if decays(*item)], weight_decay=spec.weight_decay),
        _group([item for item in parameters if not decays(*item)], weight_decay=0.0),
    ]
    groups = [group for group in groups if group["params"]]
    fused = all(parameter.device.type in FUSED_DEVICES for _, parameter in parameters)
    beta1, beta2 = spec.betas
    return [optim.AdamW(groups, lr=spec.lr, betas=(beta1, beta2), eps=spec.eps, fused=fused)] if groups else []


def _muon(parameters: Named, spec: MuonSpec) -> list[optim.Optimizer]:
    orthogonal = {Role.MATRIX, Role.EXPERTS}
    mine = [item for item in parameters if role_of(*item) in orthogonal]
    others = [item for item in parameters if role_of(*item) not in orthogonal]
    groups = [
        _group([item for item in mine if not is_pair(item[0])]),
        _group([item for item in mine if is_pair(item[0])], num_parts=2),
    ]
    groups = [group for group in groups if group["params"]]
    muon: list[optim.Optimizer] = (
        [Muon(groups, spec.lr, spec.momentum, spec.nesterov, spec.ns_steps, spec.weight_decay)] if groups else []
    )
    return muon + _adamw(others, spec.adamw)


def is_pair(name: str) -> bool:
    """Whether the parameter holds two matrices in one, gate above up."""
    return name.endswith("gate_up")


def _group(params: Named, **settings: Any) -> dict[str, Any]:
    return {"params": params, **settings}


_BUILDERS: dict[type[OptimizerSpec], Callable[[Named, Any], list[optim.Optimizer]]] = {
    AdamWSpec: _adamw,
    MuonSpec: _muon,
}

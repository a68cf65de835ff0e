"""From an optimizer description to optimizers over a model's parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, cast

from torch import Tensor, nn, optim

from zoo.blocks.roles import INNER, OUTPUTS, Role, role_of
from zoo.spec.base import ConfigError
from zoo.spec.train import AdamWSpec, MuonSpec, OptimizerSpec
from zoo.train.muon import Muon

FUSED_DEVICES = frozenset({"cpu", "cuda", "mps", "xpu"})
"""Where torch has a fused AdamW: one kernel for all parameters, 3 to 4 times faster than a loop on a CPU."""


Named = Sequence[tuple[str, Tensor]]


def build_optimizers(model: nn.Module, spec: OptimizerSpec, width_ratio: float = 1.0) -> list[optim.Optimizer]:
    """The optimizers that together update every trained parameter of `model` once per step.

    Parameter groups carry `param_names` and `peak_lr`, the rate that `set_lr` scales.

    Args:
        width_ratio: How many times as wide the model is as the one that the learning rate was found on
            (`ModelSpec.width_ratio`).

    Raises:
        ConfigError: a rule of the optimizer names no parameter.
    """
    parameters = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    plans = _planned(parameters, spec, width_ratio)
    optimizers = [make(plans) for make in (_muon, _adamw)]
    found = [optimizer for optimizer in optimizers if optimizer is not None]
    for optimizer in found:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return found


def set_lr(optimizers: Iterable[optim.Optimizer], ratio: float) -> None:
    """Set every learning rate to `ratio` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * ratio


@dataclass(frozen=True)
class Plan:
    """How one parameter is updated."""

    name: str
    parameter: Tensor
    rule: AdamWSpec | MuonSpec
    lr: float
    weight_decay: float

    @property
    def settings(self) -> dict[str, Any]:
        """What its parameter group says."""
        parts = {"num_parts": 2 if is_pair(self.name) else 1} if isinstance(self.rule, MuonSpec) else {}
        return {"lr": self.lr, "weight_decay": self.weight_decay, **parts}


def _planned(parameters: Named, spec: OptimizerSpec, width_ratio: float) -> list[Plan]:
    plans = [_plan(name, parameter, spec, width_ratio) for name, parameter in parameters]
    for index, rule in enumerate(spec.rules):
        matched = [at for at, plan in enumerate(plans) if fnmatchcase(plan.name, rule.match)]
        if not matched:
            raise ConfigError(
                f"optimizer.rules.{index}.match: found {rule.match!r}; no parameter has such a name; "
                f"names are like {', '.join(name for name, _ in parameters[:4])}"
            )
        for at in matched:
            decay = plans[at].weight_decay if rule.weight_decay is None else rule.weight_decay
            plans[at] = replace(plans[at], lr=plans[at].lr * rule.lr_scale, weight_decay=decay)
    return plans


def _plan(name: str, parameter: Tensor, spec: OptimizerSpec, width_ratio: float) -> Plan:
    role = role_of(name, parameter)
    if isinstance(spec, MuonSpec) and role not in INNER:
        spec = spec.adamw
    assert isinstance(spec, AdamWSpec | MuonSpec)
    spared = isinstance(spec, AdamWSpec) and spec.decay != "all" and role in (Role.VECTOR, Role.EMBEDDING)
    scale = lr_scale(role, isinstance(spec, MuonSpec), width_ratio)
    # Weights shrink by lr * weight_decay: that product stays what it was for the narrow model.
    return Plan(name, parameter, spec, spec.lr * scale, 0.0 if spared else spec.weight_decay / scale)


def lr_scale(role: Role, orthogonal: bool, width_ratio: float) -> float:
    """Factor on a learning rate for a model `width_ratio` times as wide as the one that it was found on.

    An update may change what a layer puts out by the same amount at every width (arXiv:2203.03466, table 3; as a
    condition on the update's spectral norm, arXiv:2310.17813). AdamW's updates of a matrix line up with its inputs, so
    their effect grows with the number of these: 1 / ratio. Muon's all have the RMS 0.2, hence singular values that grow
    as the square root of the width: 1 / sqrt(ratio). Embeddings and vectors have no sum over the width.
    """
    if role in INNER and orthogonal:
        return width_ratio**-0.5
    return 1 / width_ratio if role in INNER | OUTPUTS else 1.0


def _adamw(plans: Sequence[Plan]) -> optim.Optimizer | None:
    mine = [plan for plan in plans if isinstance(plan.rule, AdamWSpec)]
    if not mine:
        return None
    spec = cast(AdamWSpec, mine[0].rule)
    beta1, beta2 = spec.betas
    fused = all(plan.parameter.device.type in FUSED_DEVICES for plan in mine)
    return optim.AdamW(_groups(mine), lr=spec.lr, betas=(beta1, beta2), eps=spec.eps, fused=fused)


def _muon(plans: Sequence[Plan]) -> optim.Optimizer | None:
    mine = [plan for plan in plans if isinstance(plan.rule, MuonSpec)]
    if not mine:
        return None
    spec = cast(MuonSpec, mine[0].rule)
    return Muon(_groups(mine), spec.lr, spec.momentum, spec.nesterov, spec.ns_steps, spec.weight_decay)


def _groups(plans: Sequence[Plan]) -> list[dict[str, Any]]:
    """Parameters with the same settings together, in the order of the first of each group."""
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for plan in plans:
        settings = plan.settings
        group = groups.setdefault(tuple(settings.values()), {"params": [], **settings})
        group["params"].append((plan.name, plan.parameter))
    return list(groups.values())


def is_pair(name: str) -> bool:
    """Whether the parameter holds two matrices in one, gate above up."""
    return name.endswith("gate_up")

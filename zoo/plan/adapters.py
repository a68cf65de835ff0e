"""What adapters of low rank cost: how many numbers they are, and what they keep of a token for the backward pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from zoo.plan.base import Weight
from zoo.plan.trunk import named_weights
from zoo.spec.model import ModelSpec


@dataclass(frozen=True)
class AdapterSize:
    """The adapters of a model."""

    numel: int
    """Numbers in all A and B."""
    kept: float
    """Numbers that a token leaves for the backward pass: what comes out of each A, and what adapted experts keep."""


def adapter_size(spec: ModelSpec, targets: Iterable[str], rank: int) -> AdapterSize:
    """Count the adapters that `zoo.adapt.lora.adapt` makes beside the weights that the patterns `targets` match."""
    numel, kept = 0, 0.0
    for weight in named_weights(spec):
        if _can_have_one(weight) and any(fnmatchcase(weight.name, pattern) for pattern in targets):
            *experts, rows, columns = weight.shape
            number = experts[0] if experts else 1
            numel += number * rank * (rows + columns)
            if experts:
                kept += float(weight.share * number) * (rank + _kept_by_experts(weight.name, rows, columns))
            else:
                kept += rank
    return AdapterSize(numel, kept)


def _kept_by_experts(name: str, rows: int, columns: int) -> float:
    """Numbers of a choice that adapted experts keep and plain ones compute again: what goes into the product, and
    before the last one a factor of the gate, after it what is weighed."""
    return columns + (rows if name.endswith("down") else rows / 2)


def _can_have_one(weight: Weight) -> bool:
    """Matrices of `Linear` modules inside layers, and stacks of experts."""
    names = weight.name.split(".")
    if {"router", "indexer"} & set(names) or names[0] in ("embed", "head"):
        return False
    if "experts" in names:
        return len(weight.shape) == 3
    return len(weight.shape) == 2 and names[-1] == "weight"

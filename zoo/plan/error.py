"""How far an estimate may be off: what cross-validation on published runs found (benchmarks/fit_planner.py)."""

from __future__ import annotations

from dataclasses import dataclass

from zoo.plan.engine import errors
from zoo.plan.legal import mixtures
from zoo.plan.products import uses_of
from zoo.spec.hardware import ChipSpec
from zoo.spec.model import ModelSpec


@dataclass(frozen=True)
class Error:
    """Relative errors of tokens per second, over runs like the one at hand that no constant was fitted on."""

    median: float
    p90: float
    """Nine of ten are within it."""
    like: str
    """What runs these are."""

    def __str__(self) -> str:
        return f"\u00b1{self.median:.0%}, nine of ten within {self.p90:.0%} ({self.like})"


def kind_of_model(spec: ModelSpec) -> str:
    """`dense`, `sparse` with experts, or `hybrid` where not every sequence mixer is attention."""
    mixers = [use for use in uses_of(spec, False) if use.is_mixer]
    if any("scores" not in use.cost.mixing(2, True) for use in mixers):
        return "hybrid"
    return "sparse" if mixtures(spec) else "dense"


def expected_error(spec: ModelSpec, chip: ChipSpec) -> Error:
    """The error to expect of an estimate.

    That of runs whose chip was left out of the fit where no run on the chip was in it; else of runs whose family, or
    for a model that was in the fit whose model, was left out.
    """
    known, kind = errors(), kind_of_model(spec)
    out = "chip" if chip.name not in known["chips"] else "model" if spec.name in known["models"] else "family"
    median, p90 = known[out][kind]
    return Error(median, p90, f"{kind} models, each predicted without runs of its {out}")

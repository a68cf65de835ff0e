"""Fit the planner's constants on published runs, and write zoo/plan/engine.json.

`python -m benchmarks.fit_planner`. Everything is fitted at once, in logarithms, by damped least squares with a robust
loss and a prior on every number: what an engine shares with others, what is its own, a pace for each of its releases,
and what chips reach around what their kernels reach alone. Releases and chips that are not in the table get none of
their own.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.planner_priors import (
    AT_MOST_ONE,
    CHIP_SPREAD,
    NOISE,
    ORDER_WEIGHT,
    OWN,
    OWN_SPREAD,
    PACE_SPREAD,
    SPREAD,
    SPREADS,
    TAILS,
)
from benchmarks.planner_rows import Run, family, model_of, runs
from benchmarks.planner_table import ENGINES, REACH, RELEASES, Table, chip_name, newest_on, table_of
from zoo.plan.engine import Constants
from zoo.plan.error import kind_of_model
from zoo.plan.step import step_of

TARGET = Path(__file__).parents[1] / "zoo" / "plan" / "engine.json"


MOST_ROUNDS = 25


@dataclass(frozen=True)
class Vector:
    """What is fitted, in logarithms: names (scope, owner, constant), first guesses and spreads."""

    names: list[tuple[str, str, str]]
    spreads: np.ndarray


def vector_of(table: Table) -> Vector:
    names: list[tuple[str, str, str]] = []
    for f in fields(Constants):
        if f.name not in ("pace", "pace_moe"):
            names.append(("shared", "", f.name))
    engines = sorted({run.engine for run in table.runs})
    names += [("engine", engine, name) for engine in engines for name in OWN]
    epochs = sorted({f"{run.engine}@{run.epoch}" for run in table.runs})
    names += [("epoch", epoch, name) for epoch in epochs for name in PACE_SPREAD]
    names += [("chip", chip, kind) for chip in sorted(set(table.chips)) for kind in ("wide", "narrow")]
    spreads = [spread_of(*name) for name in names]
    return Vector(names, np.array(spreads))


def spread_of(scope: str, owner: str, name: str) -> float:
    del owner
    if scope == "shared":
        return SPREADS.get(name, SPREAD)
    return {"engine": OWN_SPREAD, "epoch": PACE_SPREAD.get(name, 0.0), "chip": CHIP_SPREAD}[scope]


class Model:
    """Predictions as a function of the vector."""

    def __init__(self, table: Table) -> None:
        self.table, self.vector = table, vector_of(table)
        usual = Constants()
        keys = {"shared": [""] * len(table.runs), "engine": [run.engine for run in table.runs]}
        keys["epoch"] = [f"{run.engine}@{run.epoch}" for run in table.runs]
        keys["chip"] = list(table.chips)
        owners = {scope: np.array(values) for scope, values in keys.items()}
        self.usual = {f.name: float(getattr(usual, f.name)) for f in fields(Constants)}
        self.masks = [owners[scope] == owner for scope, owner, _ in self.vector.names]

    def __call__(self, theta: np.ndarray) -> np.ndarray:
        """Logarithms of tokens per second [n]."""
        table, n = self.table, len(self.table.runs)
        logs = {name: np.full(n, np.log(value)) for name, value in self.usual.items()}
        reach = {"wide": np.zeros(n), "narrow": np.zeros(n)}
        for (scope, _, name), value, mask in zip(self.vector.names, theta, self.masks, strict=True):
            target = reach[name] if scope == "chip" else logs[name]
            target[mask] += value
        values = {name: np.exp(log) for name, log in logs.items()}
        for name in AT_MOST_ONE:
            values[name] = np.minimum(values[name], 1.0)
        narrow = table.facts.bits < 16
        facts = replace(
            table.facts,
            reach=table.facts.reach * np.exp(reach["wide"] + np.where(narrow, reach["narrow"], 0.0)),
            reach_wide=table.facts.reach_wide * np.exp(reach["wide"]),
        )
        step = step_of(table.work, table.points, facts, Constants(**values), table.habits)
        return np.log(table.work.tokens / step.total)


def jacobian(model: Model, theta: np.ndarray, at: np.ndarray) -> np.ndarray:
    columns = []
    for index in range(len(theta)):
        moved = theta.copy()
        moved[index] += 1e-3
        columns.append((model(moved) - at) / 1e-3)
    return np.stack(columns, axis=1)


def doubled(table: Table, values: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Values of the kept runs, then their differences from the means of their series."""
    values, series = values[kept], table.series[kept]
    _, where, counts = np.unique(series, return_inverse=True, return_counts=True)
    sums = np.zeros((len(counts), *values.shape[1:]))
    np.add.at(sums, where, values)
    means = (sums.T / counts).T
    return np.concatenate([values, values - means[where]])


def solve(
    table: Table,
    jac: np.ndarray,
    residual: np.ndarray,
    theta: np.ndarray,
    spreads: np.ndarray,
    kept: np.ndarray,
    tail: float = TAILS[-1],
) -> np.ndarray:
    """A step of Gauss and Newton towards the most likely vector; residuals beyond 2 noises count by their size only."""
    jac, residual = doubled(table, jac, kept), doubled(table, residual, kept)
    scaled = np.abs(residual) / NOISE
    robust = weights_of(table, kept) * (tail + 1) / (tail + scaled**2)
    left = jac.T @ (jac * (robust / NOISE**2)[:, None]) + np.diag(1 / spreads**2)
    right = jac.T @ (residual * robust / NOISE**2) - theta / spreads**2
    return np.linalg.solve(left, right)


def weights_of(table: Table, kept: np.ndarray) -> np.ndarray:
    return np.concatenate([table.weights[kept], ORDER_WEIGHT * table.weights[kept]])


def loss(table: Table, residual: np.ndarray, theta: np.ndarray, spreads: np.ndarray, tail: float) -> float:
    kept = np.ones(len(residual), dtype=bool)
    scaled = np.abs(doubled(table, residual, kept)) / NOISE
    robust = (tail + 1) / 2 * np.log1p(scaled**2 / tail)
    return float(np.sum(weights_of(table, kept) * robust) + np.sum((theta / spreads) ** 2) / 2)


def fit(model: Model, say: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """The most likely vector, and the derivatives of the predictions there."""
    theta = np.zeros(len(model.vector.names))
    for tail in TAILS:
        theta, jac = descend(model, theta, tail, say)
    return theta, jac


def descend(model: Model, theta: np.ndarray, tail: float, say: bool) -> tuple[np.ndarray, np.ndarray]:
    """The valley of the loss below `theta`, and the derivatives of the predictions there."""
    table, spreads, everything = model.table, model.vector.spreads, np.ones(len(model.table.runs), dtype=bool)
    truth, at = np.log(table.tokens_per_s), model(theta)
    best, jac = loss(table, truth - at, theta, spreads, tail), jacobian(model, theta, at)
    for number in range(MOST_ROUNDS):
        step = solve(table, jac, truth - at, theta, spreads, everything, tail)
        for scale in (1.0, 0.5, 0.2, 0.05, 0.01):
            tried = theta + np.clip(scale * step, -0.5, 0.5)
            moved = model(tried)
            value = loss(table, truth - moved, tried, spreads, tail)
            if value < best:
                break
        else:
            break
        done = best - value < 1e-4 * best
        theta, at, best = tried, moved, value
        jac = jacobian(model, theta, at)
        if say:
            print(f"tail {tail:g}, round {number + 1}: loss {best:.1f}, {summary(truth - at)}", flush=True)
        if done:
            break
    return theta, jac


def left_out(model: Model, theta: np.ndarray, jac: np.ndarray, groups: list[str]) -> np.ndarray:
    """Residuals of every run with its whole group left out of the fit: steps from the full fit, whose derivatives stay.

    What only the left-out runs speak of (their chip, their release) falls back to its prior.
    """
    table, spreads = model.table, model.vector.spreads
    truth, at, names = np.log(table.tokens_per_s), model(theta), np.array(groups)
    found = np.zeros(len(truth))
    for group in sorted(set(groups)):
        out = names == group
        own, at_own = theta.copy(), at
        for _ in range(3):
            own = own + np.clip(solve(table, jac, truth - at_own, own, spreads, ~out), -0.5, 0.5)
            at_own = model(own)
        found[out] = (truth - at_own)[out]
    return found


def summary(residual: np.ndarray) -> str:
    """Median and 90th percentile of the absolute relative error, and the mean error in logarithms."""
    error = np.abs(np.expm1(-residual))
    return f"median {np.median(error):.1%}, p90 {np.quantile(error, 0.9):.1%}, bias {-np.mean(residual):+.1%}"


def result_of(model: Model, theta: np.ndarray) -> dict[str, Any]:
    """The content of engine.json."""
    logs = dict(zip(model.vector.names, theta, strict=True))
    usual = Constants()

    def value(name: str, *keys: tuple[str, str]) -> float:
        log = np.log(getattr(usual, name)) + sum(logs.get((scope, owner, name), 0.0) for scope, owner in keys)
        number = float(np.exp(log))
        return float(f"{min(number, 1.0) if name in AT_MOST_ONE else number:.4g}")

    shared = {f.name: value(f.name, ("shared", "")) for f in fields(Constants)}
    engines = {}
    for engine, described in ENGINES.items():
        own = {name: value(name, ("shared", ""), ("engine", engine)) for name in OWN}
        found = {owner.split("@")[1] for scope, owner, _ in logs if scope == "epoch" and owner.startswith(engine + "@")}
        epochs = {}
        for epoch in [*sorted(found - {described["last"]}), described["last"]]:
            constants = {
                name: value(name, ("shared", ""), ("engine", engine), ("epoch", f"{engine}@{epoch}"))
                for name in PACE_SPREAD
            }
            settings = described["epochs"].get(epoch, {})
            epochs[epoch] = {"constants": constants, **({"settings": settings} if settings else {})}
        chips = newest_on(model.table)[engine]
        engines[engine] = {"settings": described["settings"], "constants": own, "chips": chips, "epochs": epochs}
    reach = {}
    for chip, known in REACH.items():
        whole = {**REACH["*"], **known}
        wide, narrow = logs.get(("chip", chip, "wide"), 0.0), logs.get(("chip", chip, "narrow"), 0.0)
        factors = {"fp8": wide + narrow, "fp4": wide + narrow, "int8": wide + narrow, "bf16": wide}
        reach[chip_name(chip)] = {name: float(f"{whole[name] * np.exp(factors.get(name, 0.0)):.3g}") for name in whole}
    return {"reach": reach, "shared": shared, "engines": engines}


def kind_of(run: Run) -> str:
    """What sort of model a run is of, as `zoo.plan.error` sorts them."""
    spec = model_of(run.model)
    assert spec is not None
    return kind_of_model(spec)


def errors_of(table: Table, found: dict[str, np.ndarray]) -> dict[str, Any]:
    """Median and 90th percentile of errors by what was left out of the fit and by the sort of model, over releases.

    Args:
        found: residuals [n] by what was left out.
    """
    tuned = [run.epoch in RELEASES[run.engine] for run in table.runs]
    kinds = np.array([kind_of(run) if fine else "" for run, fine in zip(table.runs, tuned, strict=True)])
    known = {spec.name for run in table.runs if (spec := model_of(run.model)) is not None}

    def pair(residual: np.ndarray) -> list[float]:
        error = np.abs(np.expm1(-residual))
        return [float(f"{np.quantile(error, part):.3g}") for part in (0.5, 0.9)]

    errors = {
        title: {kind: pair(some[kinds == kind]) for kind in sorted(set(kinds) - {""})} for title, some in found.items()
    }
    chips = sorted({chip_name(str(chip)) for chip in table.chips})
    return {"models": sorted(known), "chips": chips, **errors}


def main() -> None:
    table = table_of(runs())
    model = Model(table)
    print(f"{len(table.runs)} runs, {len(model.vector.names)} numbers")
    theta, jac = fit(model)
    models = [run.model.partition("@")[0] for run in table.runs]
    groups = {"model": models, "family": [family(name) for name in models], "chip": list(table.chips)}
    found = {title: left_out(model, theta, jac, names) for title, names in groups.items()}
    for title, residual in found.items():
        print(f"one {title} left out: {summary(residual)}")
    result = {**result_of(model, theta), "errors": errors_of(table, found)}
    TARGET.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {TARGET}")


if __name__ == "__main__":
    sys.exit(main())

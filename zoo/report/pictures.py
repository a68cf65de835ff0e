"""Pictures of many runs: their curves, what each setting does, and the law through them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from zoo.plan.pictures import GREY, PALETTE, figure_of
from zoo.report.law import Law
from zoo.report.runs import Run
from zoo.train.wording import short_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_NAMED = 11
"""Curves that a legend can tell apart."""
MOST_SETTINGS = 3


def comparison(runs: Sequence[Run], keys: Sequence[str], title: str) -> Figure:
    """Held-out bits per byte over the tokens of every run, and at the end over each of the settings `keys`."""
    shown = list(keys)[:MOST_SETTINGS]
    figure = figure_of(6.0 + 3.4 * len(shown), 4.6, title)
    ratios = [1.7, *(1.0 for _ in shown)]
    axes = figure.subplots(1, 1 + len(shown), sharey=True, squeeze=False, gridspec_kw={"width_ratios": ratios})[0]
    _curves(axes[0], runs, keys)
    for place, key in zip(axes[1:], shown, strict=True):
        _effect(place, runs, key, [other for other in keys if other != key])
    for place in axes:
        place.spines[["top", "right"]].set_visible(False)
        place.grid(axis="y", color="#E5E5E5", linewidth=0.6)
    return figure


def _curves(axes: Axes, runs: Sequence[Run], keys: Sequence[str]) -> None:
    evaluated = [run for run in runs if run.evaluations]
    named = len(evaluated) <= MOST_NAMED
    for index, run in enumerate(evaluated):
        steps, _, bits = zip(*run.evaluations, strict=True)
        tokens = [step * run.tokens_per_step for step in steps]
        label = ", ".join(f"{key.split('.')[-1]} {run.settings.get(key, '-')}" for key in keys) or run.name
        colour = PALETTE[index % len(PALETTE)] if named else GREY
        style = "o-" if run.done else "o:"
        axes.plot(tokens, bits, style, color=colour, linewidth=1, markersize=3, alpha=1 if named else 0.5, label=label)
    axes.xaxis.set_major_formatter(lambda tokens, _: short_count(tokens))
    axes.set_xlabel("tokens")
    axes.set_ylabel("held-out bits per byte")
    if named and evaluated:
        axes.legend(frameon=False, fontsize=8)


def _effect(axes: Axes, runs: Sequence[Run], key: str, others: Sequence[str]) -> None:
    """The end of each run over one setting; a line joins runs that are alike in all the others."""
    done = [run for run in runs if run.done and run.last]
    values = sorted({run.settings.get(key) for run in done}, key=lambda value: (isinstance(value, str), value or 0))
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    as_number = len(numbers) == len(values) and len(values) > 1
    place: dict[Any, float] = {
        value: float(value) if as_number and value is not None else index for index, value in enumerate(values)
    }
    alike: dict[tuple[str, ...], list[Run]] = {}
    for run in done:
        alike.setdefault(tuple(str(run.settings.get(other)) for other in others), []).append(run)
    for index, (same, group) in enumerate(alike.items()):
        points = sorted((place[run.settings.get(key)], run.last[1]) for run in group if run.last)
        label = ", ".join(f"{other.split('.')[-1]} {value}" for other, value in zip(others, same, strict=True))
        colour = PALETTE[index % len(PALETTE)]
        axes.plot(*zip(*points, strict=True), "o-", color=colour, linewidth=1, markersize=4, label=label)
    if as_number and min(numbers) > 0 and max(numbers) >= 4 * min(numbers):
        axes.set_xscale("log", base=2)
        axes.minorticks_off()
    if others and len(alike) <= MOST_NAMED // 2:
        axes.legend(frameon=False, fontsize=8)
    axes.set_xticks(list(place.values()), [_short(value) for value in values], rotation=30 if len(values) > 4 else 0)
    axes.set_xlabel(key)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def law_picture(law: Law, params: Sequence[float], tokens: Sequence[float], losses: Sequence[float]) -> Figure:
    """The losses and the law over tokens, a curve with its band for each size; beside it, predicted over measured."""
    figure = figure_of(11.0, 4.8, f"loss = E + A / N^a + B / D^b through {law.num_runs} runs, R² {law.r_squared:.4f}")
    left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": [1.6, 1.0]})
    sizes = sorted(set(params))
    along = np.geomspace(min(tokens) / 1.5, max(tokens) * 4, 80)
    for index, size in enumerate(sizes):
        colour = PALETTE[index % len(PALETTE)]
        points = [(d, loss) for n, d, loss in zip(params, tokens, losses, strict=True) if n == size]
        left.plot(*zip(*points, strict=True), "o", color=colour, markersize=4)
        left.plot(along, law(size, along), color=colour, linewidth=1.2, label=f"{short_count(size)} parameters")
        left.fill_between(along, *law.band(size, along), color=colour, alpha=0.15, linewidth=0)
    left.axhline(law.irreducible, color=GREY, linestyle="--", linewidth=1)
    left.text(along[0], law.irreducible, f"E {law.irreducible:.3f}", va="bottom", color=GREY, fontsize=9)
    left.set_xscale("log")
    ticks = sorted(set(tokens))[:: -(-len(set(tokens)) // 6)]
    left.set_xticks(ticks, [short_count(tick) for tick in ticks])
    left.minorticks_off()
    left.set_xlabel("tokens of training")
    left.set_ylabel("held-out loss, nats a token")
    left.legend(frameon=False, fontsize=8)
    predicted = law(np.array(params), np.array(tokens))
    right.plot(losses, predicted, "o", color=PALETTE[0], markersize=4)
    ends = [min(*losses, *predicted), max(*losses, *predicted)]
    right.plot(ends, ends, color=GREY, linewidth=1)
    right.set_xlabel("measured")
    right.set_ylabel("by the law")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure

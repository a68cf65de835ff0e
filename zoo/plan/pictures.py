"""Pictures of a plan: memory, time, the landscape of layouts, the tornado of resources, and a table of many plans."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from zoo.plan.explain import described, grouped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from zoo.plan.plan import Plan
    from zoo.plan.sensitivity import Sensitivity

PALETTE = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#7F7F7F",
    "#B8A100",
    "#332288",
    "#AA4466",
    "#44AA99",
)
"""Of Okabe and Ito, with further ones that stay apart from them."""
GREY, LESS, MORE = "#595959", "#D55E00", "#0072B2"
MOST_POINTS = 20_000
NAMED_SHARE = 0.06
"""Of a bar: from here on a part is wide enough to hold its number."""


def pictures(plan: Plan, found: Sensitivity | None = None) -> dict[str, Figure]:
    """All pictures of a plan by the name of their file."""
    drawn = {"memory": memory(plan), "time": time(plan), "landscape": landscape(plan)}
    return drawn if found is None else {**drawn, "sensitivity": tornado(found)}


def write_pictures(drawn: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Write each as a PNG; the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in drawn.items():
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=150)
        written.append(path)
    return written


def figure_of(width: float, height: float, title: str = "") -> Figure:
    """An empty figure with a title; no window is ever opened."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure


def _named(plan: Plan, what: str) -> str:
    return f"{plan.model} on {plan.best.num_devices:,} x {plan.hardware}: {what}"


def memory(plan: Plan) -> Figure:
    """What fills the memory of the fullest device, of the plan and of its runner-up, against what there is."""
    rows = {"plan": dict(plan.best.memory_gib)}
    if plan.runner_up is not None:
        rows["runner-up"] = dict(plan.runner_up.memory_gib)
    figure = figure_of(9.0, 2.2 + 0.55 * len(rows), _named(plan, "memory"))
    axes = figure.subplots()
    _stacked(axes, rows)
    limit = plan.best.memory_limit_gib
    if limit:
        axes.axvline(limit, color="black", linestyle="--", linewidth=1)
        axes.set_xlim(0, 1.12 * limit)
        at = axes.get_xaxis_transform()
        axes.text(limit, 1.02, f"{limit:g} GiB", transform=at, va="bottom", ha="center", fontsize=9)
    axes.set_xlabel("GiB on the fullest device")
    return figure


def time(plan: Plan) -> Figure:
    """Where the time of a step goes, of the plan and of its runner-up."""
    rows = {"plan": grouped(plan.best.time_s)}
    if plan.runner_up is not None:
        rows["runner-up"] = grouped(plan.runner_up.time_s)
    figure = figure_of(9.0, 2.2 + 0.55 * len(rows), _named(plan, "time of a step"))
    axes = figure.subplots()
    _stacked(axes, rows)
    axes.set_xlabel("seconds of a step, as far as nothing hides them")
    return figure


def _stacked(axes: Axes, rows: Mapping[str, Mapping[str, float]]) -> None:
    """Stacked bars from the top down; parts in the order of the first bar, small ones without a number."""
    names = sorted(
        dict.fromkeys(name for row in rows.values() for name in row),
        key=lambda name: -max(r.get(name, 0.0) for r in rows.values()),
    )
    widest = max(sum(row.values()) for row in rows.values())
    names = [name for name in names if max(row.get(name, 0.0) for row in rows.values()) > 2e-3 * widest]
    heights = list(range(len(rows)))[::-1]
    left = np.zeros(len(rows))
    for index, name in enumerate(names):
        values = np.array([row.get(name, 0.0) for row in rows.values()])
        axes.barh(heights, values, left=left, height=0.62, color=PALETTE[index % len(PALETTE)], label=name)
        for height, start, value in zip(heights, left, values, strict=True):
            if value > NAMED_SHARE * widest:
                axes.text(
                    start + value / 2, height, f"{value:.3g}", ha="center", va="center", color="white", fontsize=9
                )
        left += values
    axes.set_yticks(heights, list(rows))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.32), ncols=5, fontsize=9)


def landscape(plan: Plan) -> Figure:
    """Every layout that was priced: its memory against its step time, coloured by one of its degrees."""
    found, figure = plan.found, figure_of(9.0, 5.4, _named(plan, "all layouts"))
    axes = figure.subplots()
    degree = _telling_degree(plan)
    rows = np.arange(len(found))
    if len(rows) > MOST_POINTS:
        rows = np.unique(np.linspace(0, len(rows) - 1, MOST_POINTS).astype(int))
    values = found.table[degree][rows]
    _scatter(axes, found.memory_gib[rows], found.seconds[rows], values)
    limit = plan.best.memory_limit_gib
    if limit:
        axes.axvline(limit, color="black", linestyle="--", linewidth=1)
        at = axes.get_xaxis_transform()
        axes.text(limit, 1.01, f"{limit:g} GiB a device", transform=at, ha="center", va="bottom", fontsize=9)
    best = found.memory_gib[0], found.seconds[0]
    axes.plot(*best, "*", color="white", markeredgecolor="black", markersize=17, zorder=5)
    axes.annotate(
        f"{described(plan.best)}",
        best,
        (0, -16),
        textcoords="offset points",
        ha="center",
        va="top",
        fontsize=9,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(found.seconds[0] * 0.62, min(float(np.max(found.seconds)), 30 * found.seconds[0]) * 1.1)
    axes.set_xlabel("GiB on the fullest device")
    axes.set_ylabel("seconds of a step")
    _plain_ticks(axes)
    axes.grid(alpha=0.2, which="both")
    legend = axes.legend(
        title=degree, frameon=True, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9, markerscale=3
    )
    legend.get_frame().set_alpha(0.0)
    return figure


def _plain_ticks(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(FuncFormatter(lambda value, _: ""))


def _telling_degree(plan: Plan) -> str:
    """The degree that the landscape is coloured by: the one that orders times best by its medians."""
    found = plan.found
    spreads = {}
    for name in ("tp", "pp", "ep", "cp", "micro_batch"):
        values = found.table[name]
        medians = [math.log(float(np.median(found.seconds[values == value]))) for value in np.unique(values)]
        spreads[name] = max(medians) - min(medians) if len(medians) > 1 else 0.0
    return max(spreads, key=lambda name: spreads[name])


def _scatter(axes: Axes, x: Any, y: Any, values: Any) -> None:
    from matplotlib import colormaps

    different = np.unique(values)
    for index, value in enumerate(different):
        at = values == value
        color = colormaps["viridis"](0.92 * index / max(1, len(different) - 1))
        # Drawn as an image: twenty thousand vector points would make a page of megabytes.
        axes.plot(x[at], y[at], ".", color=color, markersize=3, alpha=0.5, label=str(value), rasterized=True)


def tornado(found: Sensitivity) -> Figure:
    """Change of the step time with less and with more of each resource; the strongest at the top."""
    known = [effect for effect in found.effects if effect.more is not None and effect.fewer is not None]
    figure = figure_of(9.0, 1.5 + 0.5 * max(len(known), 1), "what a better machine would bring")
    axes = figure.subplots()
    for height, effect in zip(range(len(known))[::-1], known, strict=True):
        for change, color in ((effect.fewer, LESS), (effect.more, MORE)):
            assert change is not None
            _tornado_bar(axes, height, change.factor, change.step_time_s / found.step_time_s - 1, color, change.moved)
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(range(len(known))[::-1], [f"{effect.resource}\n{effect.value}" for effect in known], fontsize=9)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:+.0%}")
    axes.set_xlabel("change of the step time, planned anew (*: another layout)")
    axes.margins(x=0.18)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    return figure


def _tornado_bar(axes: Axes, height: int, factor: float, change: float, color: str, moved: bool) -> None:
    if math.isinf(change):
        axes.annotate(
            f"x{factor:g}: nothing fits",
            (0, height),
            (6, 0),
            textcoords="offset points",
            va="center",
            color=color,
            fontsize=9,
        )
        return
    axes.barh(height, change, height=0.6, color=color)
    side = 1 if change > 0 or (change == 0 and factor < 1) else -1
    axes.annotate(
        f"x{factor:g}: {change:+.1%}{'*' if moved else ''}",
        (change, height),
        (4 * side, 0),
        textcoords="offset points",
        ha="left" if side > 0 else "right",
        va="center",
        color=color,
        fontsize=9,
    )


def comparison(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Tokens per second and device of many plans, a bar for each; what fits nowhere is named."""
    figure = figure_of(9.0, 1.5 + 0.38 * len(rows), "the best layouts")
    axes = figure.subplots()
    heights = range(len(rows))[::-1]
    for height, row in zip(heights, rows, strict=True):
        rate = row["tokens_per_s_per_device"]
        if rate is None:
            axes.text(0, height, " no plan", va="center", color=LESS, fontsize=9)
            continue
        axes.barh(height, rate, height=0.62, color=MORE)
        axes.text(rate, height, f" {rate:,.0f}  {row['layout']}", va="center", fontsize=9, color=GREY)
    axes.set_yticks(heights, [row["label"] for row in rows], fontsize=9)
    axes.set_xlabel("tokens per second and device")
    axes.margins(x=0.35)
    axes.set_xlim(left=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    return figure

"""Pictures of a run, made from its metrics file alone, so that they can be made again at any time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from zoo.train.metrics_file import METRICS, read_metrics
from zoo.train.wording import short_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#595959"
"""From the palette of Okabe and Ito, which stays distinct for colour-blind eyes."""
LOSS_CURVE, EXPERT_LOAD = "loss_curve.png", "expert_load.png"
MAX_LEGEND_LAYERS = 8
MAX_CROSSES = 2000
VIRIDIS_END = 0.85
"""The last, yellow part of the colour map is too pale for lines on white."""

Records = Sequence[dict[str, Any]]


def write_plots(run_dir: Path) -> list[Path]:
    """Draw what the metrics file of a run directory allows; the expert load needs a model that has experts.

    Returns:
        The files written.

    Raises:
        ConfigError: the metrics file is missing or damaged.
    """
    records = read_metrics(run_dir / METRICS)
    drawn = {LOSS_CURVE: loss_curve(records), EXPERT_LOAD: expert_load(records)}
    written = []
    for name, figure in drawn.items():
        if figure is not None:
            figure.savefig(run_dir / name, dpi=150)
            written.append(run_dir / name)
    return written


def loss_curve(records: Records) -> Figure | None:
    """Bits per byte over the steps: training, held-out text and the baselines. None before the first step."""
    steps = _having(records, "step", "bits_per_byte")
    if not steps:
        return None
    started = _of(records, "started")
    x = np.array([record["step"] for record in steps])
    y = np.array([record["bits_per_byte"] for record in steps])
    figure = _figure(8.0, 4.8)
    axes = figure.subplots()
    axes.plot(x, y, color=BLUE, alpha=0.22, linewidth=0.8)
    axes.plot(*smoothed(x, y), color=BLUE, linewidth=1.8, label="training (faint: every step)")
    evaluations = _having(records, "evaluated", "bits_per_byte")
    if evaluations:
        points = [(record["step"], record["bits_per_byte"]) for record in evaluations]
        axes.plot(*zip(*points, strict=True), "o-", color=ORANGE, linewidth=1, markersize=5, label="held-out")
        axes.annotate(
            f"{points[-1][1]:.3f}", points[-1], (0, -8), textcoords="offset points", ha="center", va="top", color=ORANGE
        )
    baselines = {name: bits for record in started for name, bits in record["baselines"].items() if bits is not None}
    for name, bits in baselines.items():
        axes.axhline(bits, color=GREY, linestyle="--", linewidth=1)
        # At the left the curves are far above.
        at = axes.get_yaxis_transform()
        axes.text(0.008, bits, f"{name} {bits:.3f}", transform=at, va="bottom", color=GREY, fontsize=9)
    _finish_loss_axes(axes, y, [*baselines.values(), *(record["bits_per_byte"] for record in evaluations[-1:])])
    if started:
        _add_token_axis(axes, started[-1]["tokens_per_step"])
        axes.set_title(f"{started[-1]['model_name']}: loss", loc="left", fontweight="bold")
    return figure


def _finish_loss_axes(axes: Axes, raw: NDArray[np.float64], others: Sequence[float]) -> None:
    # The fall of the first few steps would press everything of interest into the lowest part of the picture.
    low, high = min(float(raw.min()), *others), max(float(np.quantile(raw, 0.9)), *others)
    margin = 0.08 * max(high - low, 0.1)
    axes.set_ylim(low - 1.5 * margin, high + margin)
    axes.set_xlim(left=0)
    axes.set_xlabel("steps")
    axes.set_ylabel("bits per byte (lower is better)")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="upper right")


def _add_token_axis(axes: Axes, tokens_per_step: int) -> None:
    def to_tokens(steps: Any) -> Any:
        return steps * tokens_per_step

    def to_steps(tokens: Any) -> Any:
        return tokens / tokens_per_step

    top = axes.secondary_xaxis("top", functions=(to_tokens, to_steps))
    top.xaxis.set_major_formatter(lambda tokens, _: short_count(tokens))
    top.set_xlabel("training tokens", fontsize=9, color=GREY)
    top.tick_params(labelsize=9, colors=GREY)


def smoothed(
    x: NDArray[np.float64], y: NDArray[np.float64], num_points: int = 400
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Straight lines fitted around at most `num_points` places, over 8% of the way so far to either side.

    Narrow windows where a loss falls fast and wide ones where it is flat; a line, unlike a mean, does not lag behind.

    Args:
        x: `[n]`, rising.
        y: `[n]`

    Returns:
        The places and the fitted values there, each `[min(n, num_points)]`.
    """
    places = np.unique(np.linspace(0, len(x) - 1, min(len(x), num_points)).round().astype(int))
    values = []
    for place in places:
        half = max(2, round(0.08 * place))
        window = slice(max(0, place - half), place + half + 1)
        degree = min(1, len(x[window]) - 1)
        # Centred on the place, so that the constant term is the value there.
        values.append(np.polyfit(x[window] - x[place], y[window], degree)[-1])
    return x[places], np.array(values)


def expert_load(records: Records) -> Figure | None:
    """Load of every expert early and late in the run, and MaxVio and entropy of every layer over the steps.

    None when there is no routing to show.
    """
    reports = [record for record in _of(records, "step") if record["routing"]]
    if not reports:
        return None
    figure = _figure(11.0, 5.4 + min(3.0, 0.12 * len(reports[-1]["routing"])))
    axes = figure.subplot_mosaic([["first" if len(reports) > 1 else "last", "last"], ["violation", "entropy"]])
    maps = {"first": reports[0], "last": reports[-1]}
    for name in maps.keys() & axes.keys():
        image = _heat_map(axes[name], maps[name])
    figure.colorbar(
        image, ax=[axes[name] for name in maps.keys() & axes.keys()], label="load / mean load", extend="max", pad=0.015
    )
    _over_steps(axes["violation"], reports, "max_violation", "MaxVio (0: even)")
    axes["violation"].set_ylim(bottom=0)
    _over_steps(axes["entropy"], reports, "entropy", "entropy of the load (1: even)")
    axes["entropy"].set_ylim(top=1.01)
    _name_layers(figure, [axes["violation"], axes["entropy"]], reports[-1])
    started = _of(records, "started")
    name = f"{started[-1]['model_name']}: " if started else ""
    figure.suptitle(f"{name}load of the experts", x=0.01, ha="left", fontweight="bold")
    return figure


def _load_ratios(record: dict[str, Any]) -> NDArray[np.float64]:
    """`[layers, experts]`: load over the layer's mean load; NaN where a layer has fewer experts than another."""
    loads = [health["load"] for health in record["routing"]]
    ratios = np.full((len(loads), max(map(len, loads))), np.nan)
    for row, load in zip(ratios, loads, strict=True):
        row[: len(load)] = np.array(load) / max(float(np.mean(load)), 1e-9)
    return ratios


def _heat_map(axes: Axes, record: dict[str, Any]) -> AxesImage:
    """The same colours in every picture: white is the mean load, the darkest red twice the mean or more."""
    from matplotlib.ticker import MaxNLocator

    ratios = _load_ratios(record)
    image = axes.imshow(ratios, cmap="RdBu_r", vmin=0, vmax=2, aspect="auto", interpolation="nearest")
    axes.set_facecolor("0.85")
    dead = np.argwhere(ratios == 0)
    if 0 < len(dead) <= MAX_CROSSES:
        axes.plot(dead[:, 1], dead[:, 0], "X", color="white", markeredgecolor="black", markersize=7, linestyle="none")
    note = f", {len(dead)} dead (x)" if len(dead) else ""
    axes.set_title(f"load at step {record['step']:,}{note}", fontsize=10)
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    layers = [health["layer"] for health in record["routing"]]
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    axes.yaxis.set_major_formatter(lambda y, _: str(layers[int(y)]) if 0 <= y < len(layers) else "")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return image


def _layer_colours(count: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["viridis"](VIRIDIS_END * index / max(1, count - 1)) for index in range(count)]


def _over_steps(axes: Axes, reports: Records, field: str, label: str) -> None:
    """One line for each layer."""
    steps = [record["step"] for record in reports]
    colours = _layer_colours(len(reports[-1]["routing"]))
    for index, colour in enumerate(colours):
        values = [record["routing"][index][field] for record in reports]
        marker = "o" if len(steps) == 1 else None
        axes.plot(steps, values, color=colour, linewidth=1.2, marker=marker)
    axes.set_xlabel("steps")
    axes.set_ylabel(label)
    axes.grid(alpha=0.25)


def _name_layers(figure: Figure, panels: Sequence[Axes], record: dict[str, Any]) -> None:
    """A legend while the layers can be told apart, else a scale."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    layers = [health["layer"] for health in record["routing"]]
    if len(layers) <= MAX_LEGEND_LAYERS:
        panels[-1].legend(panels[-1].get_lines(), [f"layer {layer}" for layer in layers], fontsize=9, ncols=2)
        return
    # The scale goes on to where the colour map would end, and is cut at the last layer.
    scale = Normalize(layers[0], layers[0] + (layers[-1] - layers[0]) / VIRIDIS_END)
    bar = figure.colorbar(ScalarMappable(scale, "viridis"), ax=list(panels), label="layer", pad=0.015)
    bar.ax.set_ylim(layers[0], layers[-1])


def _figure(width: float, height: float) -> Figure:
    """A figure that draws into memory: no window, no global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _of(records: Records, event: str) -> list[dict[str, Any]]:
    return [record for record in records if record["event"] == event]


def _having(records: Records, event: str, field: str) -> list[dict[str, Any]]:
    """The records of an event whose `field` is a finite number."""
    return [record for record in _of(records, event) if record[field] is not None and math.isfinite(record[field])]

"""The cost of a mixture-of-experts layer grows with tokens and active experts, and not with the total of experts.

Forward and backward, d 512, experts of 256; the curves are in benchmarks/scaling.png. A ratio is how far a point's cost
is from that of the proportional line (or the level one) through the first point; below 1: dearer.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch

from benchmarks.harness import Row, interleaved
from benchmarks.moe_layer import call
from zoo.blocks.moe import MoE
from zoo.tuning import tune

PLOT = Path(__file__).with_name("scaling.png")
D_MODEL, D_EXPERT = 512, 256
SERIES = {
    "tokens": [(tokens, 64, 8) for tokens in (1024, 2048, 4096, 8192, 16384)],
    "active experts": [(4096, 64, top_k) for top_k in (1, 2, 4, 8, 16)],
    "total experts": [(8192, num_experts, 8) for num_experts in (16, 32, 64, 128, 256)],
}
"""(tokens, experts, active experts) of each point."""


PARTS = tuple(SERIES)


def rows(part: str | None = None) -> list[Row]:
    """All rows and the plot, or the rows of one of `PARTS`."""
    print(*tune(), sep="\n", flush=True)
    seconds = {name: measure(points) for name, points in SERIES.items() if part in (None, name)}
    if part is None:
        plot(seconds)
    return [row for name, found in seconds.items() for row in series_rows(name, found)]


def measure(points: list[tuple[int, int, int]]) -> list[float]:
    """Median seconds of each point, all points in turns."""
    calls = {str(point): call(_layer(*point[1:]), D_MODEL, point[0], True) for point in points}
    return list(interleaved(calls, rounds=2, warmup=1).values())


def _layer(num_experts: int, top_k: int) -> MoE:
    torch.manual_seed(0)
    return MoE(D_MODEL, num_experts=num_experts, top_k=top_k, d_expert=D_EXPERT)


def series_rows(name: str, seconds: list[float]) -> list[Row]:
    index = list(SERIES).index(name)
    axis = (0, 2, 1)[index]
    places = [point[axis] for point in SERIES[name]]
    level = name == "total experts"
    found = []
    for place, taken in zip(places[1:], seconds[1:], strict=True):
        expected = seconds[0] * (1 if level else place / places[0])
        line = "the same" if level else "in proportion"
        what = f"{name}: {places[0]} to {place}"
        found.append(Row(what, f"{taken:.3f} s", f"{line}: {expected:.3f} s", expected / taken))
    return found


def plot(seconds: dict[str, list[float]]) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(seconds), figsize=(12, 3.6), layout="constrained")
    for axis, place, (name, found) in zip(axes, (0, 2, 1), seconds.items(), strict=True):
        places = [point[place] for point in SERIES[name]]
        axis.plot(places, found, "o-", label="measured")
        lines = [found[0] * (1 if name == "total experts" else at / places[0]) for at in places]
        axis.plot(places, lines, "--", color="gray", label="level" if name == "total experts" else "proportional")
        axis.set(xscale="log", xlabel=name, ylabel="s, forward and backward")
        if name == "total experts":
            axis.set_ylim(0, None)
        else:
            axis.set_yscale("log")
        axis.set_xticks(places, [str(at) for at in places])
        axis.minorticks_off()
        axis.legend()
    figure.savefig(PLOT, dpi=120)
    plt.close(figure)

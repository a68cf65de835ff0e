"""The planner's time for a published run that it was not fitted on is close, and it ranks layouts rightly.

Constants come from the other runs: one model, one family of models, or one chip is left out at a time. Leaving out a
model keeps its siblings in, which makes it the easiest of the three.
"""

from __future__ import annotations

import time
from collections import defaultdict

import numpy as np

from benchmarks.fit_planner import Model, Table, fit, left_out, table_of
from benchmarks.harness import Row
from benchmarks.planner_rows import family, runs

RECENT = ("megatron@26.04", "megatron@26.06", "fsdp@automodel", "maxtext@tpu")


def rows() -> list[Row]:
    table = table_of(runs())
    model = Model(table)
    theta, jac = fit(model, say=False)
    found = []
    models = [run.model.partition("@")[0] for run in table.runs]
    for title, groups in (
        ("model", models),
        ("family", [family(name) for name in models]),
        ("chip", list(table.chips)),
    ):
        residual = left_out(model, theta, jac, groups)
        error = np.abs(np.expm1(-residual))
        recent = np.array([f"{run.engine}@{run.epoch}" in RECENT for run in table.runs])
        for what, some in (("all runs", error), ("newest releases", error[recent])):
            median, p90 = float(np.median(some)), float(np.quantile(some, 0.9))
            text = f"{what} ({len(some)}), one {title} left out: error of tokens/s per device"
            found.append(Row(text + ", median", f"{median:.1%}", "bar 10%", 0.10 / median))
            found.append(Row(text + ", 90th percentile", f"{p90:.1%}", "bar 25%", 0.25 / p90))
        if title != "chip":
            right, regret, pairs, groups_ranked = order(table, residual)
            peer = "best rival 82%, bar 85%"
            found.append(
                Row(
                    f"pairs of layouts in the right order, one {title} left out ({pairs} pairs)",
                    f"{right:.1%}",
                    peer,
                    right / 0.85,
                )
            )
            text = f"cost of the layout liked best over the best, one {title} left out ({groups_ranked} groups)"
            found.append(Row(text, f"{regret:.2%}", "best rival 1.3%, bar 1.3%", 0.013 / max(regret, 1e-4)))
    return [*found, speed()]


TIE = 0.01
"""Two runs of one recipe differ by as much."""


def order(table: Table, residual: np.ndarray) -> tuple[float, float, int, int]:
    """Share of pairs in the right order, mean regret, and how many pairs and groups there are.

    Runs of one layout in one group count as one, by their mean; pairs that differ by less than TIE are left out: what
    was measured does not say which is better.
    """
    groups: dict[tuple, dict[tuple, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for run, log_error in zip(table.runs, residual, strict=True):
        truth = np.log(run.tokens_per_s)
        group = (*run.series, run.recompute, run.graphs)
        groups[group][run.layout, run.micro_batch].append((truth, truth - log_error))
    right = pairs = 0
    regrets = []
    for members in groups.values():
        values = np.array([np.mean(values, axis=0) for values in members.values()])
        if len(values) < 2:
            continue
        for first in range(len(values)):
            for second in range(first):
                truth, ours = values[first] - values[second]
                if abs(truth) >= TIE:
                    pairs += 1
                    right += (truth > 0) == (ours > 0)
        regrets.append(1 - np.exp(values[np.argmax(values[:, 1]), 0] - values[:, 0].max()))
    return right / max(pairs, 1), float(np.mean(regrets)), pairs, len(regrets)


def speed() -> Row:
    """Microseconds of a layout when many are priced at once."""
    import zoo
    from zoo.plan.engine import engine_of
    from zoo.plan.estimate import load_hardware, run_of
    from zoo.plan.layout import Layout, Points
    from zoo.plan.price import price

    spec, machine, engine = zoo.load("qwen3_235b_a22b"), load_hardware("gb300_nvl72"), engine_of("megatron")
    grid = [Layout(tp=tp, ep=ep, dp=dp) for tp in (1, 2, 4) for ep in (1, 8, 64) for dp in (64, 128)] * 300
    points = Points.of(grid, seq_len=4096, global_batch=2048, micro_batch=1)
    run = run_of(spec, machine, engine, "mxfp8")
    price(spec, machine, points, run, engine)
    start = time.perf_counter()
    price(spec, machine, points, run, engine)
    each = (time.perf_counter() - start) / len(grid) * 1e6
    return Row(f"pricing a layout, {len(grid)} at once", f"{each:.1f} us", "limit 20 us", 20 / each)

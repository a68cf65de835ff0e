"""`zoo report`: many runs as a table and pictures, with the scaling law through them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from zoo.cli.console import Parser, table, title, write
from zoo.cli.keys import read_keys
from zoo.report.runs import Run, best_of, runs_below, varied
from zoo.spec.base import ConfigError, Spec
from zoo.train.wording import duration, short_count

WHAT = """\
Compare the runs below a directory: a table with the settings in which they differ, best first, a picture of their
curves and of what each setting does, and, where sizes and tokens vary, the law loss = E + A/N^a + B/D^b through them.

settings:
  params=active|total    what N counts in the law
  out=DIR                where table and pictures go; otherwise the directory itself"""
EXAMPLES = """\
  zoo report outputs/sweeps/router_rules-1a2b3c4d
  zoo report outputs params=total out=comparison"""
CSV, CURVES, LAW = "runs.csv", "runs.png", "law.png"


class ReportSettings(Spec):
    """As `zoo report --help` says."""

    params: Literal["active", "total"] = "active"
    out: str | None = None


def run(arguments: Sequence[str]) -> None:
    """Print the table, and write it with the pictures."""
    parser = Parser("report", "DIR [settings]", WHAT, EXAMPLES)
    parser.add_argument("folder", metavar="DIR", help="a sweep, or any directory with runs below it")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="see above")
    given = parser.read(arguments)
    settings = read_keys(ReportSettings, given.settings)
    folder = Path(given.folder)
    runs, notes = runs_below(folder)
    keys, out = varied(runs), Path(settings.out) if settings.out else folder
    out.mkdir(parents=True, exist_ok=True)
    ordered = sorted(runs, key=lambda run: (not run.done, run.last[1] if run.last else float("inf")))
    write(_shown(ordered, keys), "", *notes, *_summary(runs, keys))
    written = [_write_csv(runs, keys, out / CSV), _draw(runs, keys, folder, out / CURVES)]
    written += _law(runs, settings, out / LAW)
    write("", *(f"written: {path}" for path in written))


def _shown(runs: Sequence[Run], keys: Sequence[str]) -> Any:
    head = ("run", *keys, "parameters", "active", "tokens", "bits/byte", "loss", "tokens/s", "state")
    cells = []
    for run in runs:
        loss, bits = (f"{value:.4f}" for value in run.last) if run.last else ("", "")
        rate = f"{run.tokens_per_step / run.step_time_s:,.0f}" if run.step_time_s else ""
        state = run.state if run.state != "unfinished" else f"at step {run.step} of {run.num_steps}"
        counts = [short_count(count) for count in (run.params, run.active_params, run.tokens)]
        values = [str(run.settings.get(key, "-")) for key in keys]
        cells.append((run.name, *values, *counts, bits, loss, rate, state))
    return table(head, cells, right=head[1 + len(keys) : -1], fold=("run", *keys, "state"))


def _summary(runs: Sequence[Run], keys: Sequence[str]) -> list[str]:
    done, best = sum(run.done for run in runs), best_of(runs)
    lines = [f"{len(runs)} runs, {done} done, {duration(sum(run.seconds for run in runs))} of training"]
    if best is not None and best.last:
        what = ", ".join(f"{key}={best.settings.get(key, '-')}" for key in keys)
        lines.append(f"best: {best.name} with {best.last[1]:.4f} bits per byte{f' ({what})' if what else ''}")
    return lines


def _write_csv(runs: Sequence[Run], keys: Sequence[str], path: Path) -> Path:
    facts = ("name", "params", "active_params", "step", "num_steps", "tokens", "seconds", "step_time_s")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*facts, "loss", "bits_per_byte", "state", *keys])
        for run in runs:
            ends = run.last or (None, None)
            values = [run.settings.get(key) for key in keys]
            writer.writerow([*(getattr(run, fact) for fact in facts), *ends, run.state, *values])
    return path


def _draw(runs: Sequence[Run], keys: Sequence[str], folder: Path, path: Path) -> Path:
    from zoo.report.pictures import comparison

    comparison(runs, keys, f"{folder.name}: {len(runs)} runs").savefig(path, dpi=150)
    return path


def _law(runs: Sequence[Run], settings: ReportSettings, path: Path) -> list[Path]:
    """Fit, print and draw the law; where it cannot be fitted, say why."""
    from zoo.report.law import fit_law
    from zoo.report.pictures import law_picture

    points = [
        (run.active_params if settings.params == "active" else run.params, run.tokens, run.last[0])
        for run in runs
        if run.done and run.last
    ]
    params, tokens, losses = [[point[at] for point in points] for at in range(3)]
    try:
        law = fit_law(params, tokens, losses)
    except ConfigError as error:
        write("", f"no scaling law: {error}")
        return []
    rows = [(name, f"{value:.4g}", f"{low:.4g}", f"{high:.4g}") for name, (value, low, high) in law.named.items()]
    write(
        title(f"loss = E + A/N^a + B/D^b, N: {settings.params} parameters, D: tokens"),
        table(("", "value", "from", "to"), rows, right=("value", "from", "to")),
        f"R² {law.r_squared:.4f} over {law.num_runs} runs; the bands hold 90% of {len(law.resampled)} refits to "
        "resampled runs",
        f"best for its compute: N grows as FLOPs^{law.params_exponent:.2f}, D as FLOPs^{1 - law.params_exponent:.2f}",
    )
    law_picture(law, params, tokens, losses).savefig(path, dpi=150)
    return [path]

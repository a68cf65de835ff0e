"""`zoo plan -m`: many plans as one table."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from zoo.cli.console import table, write
from zoo.cli.plan import planned
from zoo.cli.settings import OutputKeys, Settings, ZooPlan
from zoo.spec.base import ConfigError

COLUMNS = (
    "model",
    "hardware",
    "settings",
    "num_devices",
    "precision",
    "layout",
    "micro_batch",
    "recompute",
    "global_batch",
    "seq_len",
    "step_time_s",
    "tokens_per_s_per_device",
    "mfu",
    "memory_gib",
    "memory_limit_gib",
    "problem",
)
CSV, PNG = "plans.csv", "plans.png"


def run_table(asked: Sequence[Settings], words: Sequence[str]) -> None:
    """Plan everything, print the table, and write it with a picture."""
    swept = [word.partition("=")[0] for word in words if "," in word]
    for settings in asked:
        settings.refuse(OutputKeys, "it goes with a single plan; leave -m out", but=("out",))
    rows = [_row(settings, swept) for settings in asked]
    folder = Path(asked[0].keys.out or f"outputs/plan-{datetime.now():%Y-%m-%d-%H-%M-%S}")
    written = [_write_csv(rows, folder / CSV), _draw(rows, folder / PNG)]
    write(_shown(rows), "", *(f"written: {path}" for path in written))


def _row(settings: Settings, swept: Sequence[str]) -> dict[str, Any]:
    """The facts of one plan; of one that cannot be made, the reason."""
    given = {word.partition("=")[0]: word for word in settings.overrides}
    given |= {key: f"{key}={value}" for key, value in settings.given(ZooPlan).items()}
    changes = " ".join(given[key] for key in swept if key in given)
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row |= {"model": settings.model, "hardware": settings.hardware, "settings": changes}
    try:
        best = planned(settings).best
    except ConfigError as error:
        return row | {"problem": " ".join(str(error).split())}
    facts = {name: getattr(best, name) for name in COLUMNS if hasattr(best, name) and row[name] is None}
    return row | facts | {"layout": str(best.layout), "memory_gib": best.total_memory_gib}


def _write_csv(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return path


def _draw(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    from zoo.plan.pictures import comparison

    named = [{**row, "label": _label(row)} for row in rows]
    comparison(named).savefig(path, dpi=150)
    return path


def _label(row: dict[str, Any]) -> str:
    return " ".join(str(row[name]) for name in ("model", "hardware", "settings") if row[name])


def _shown(rows: Sequence[dict[str, Any]]) -> Any:
    head = (
        "model",
        "hardware",
        "settings",
        "devices",
        "layout",
        "micro-batch",
        "step s",
        "tokens/s/device",
        "MFU",
        "GiB",
    )
    cells = []
    for row in rows:
        start = (row["model"], row["hardware"], row["settings"])
        if row["problem"]:
            cells.append((*start, "", _short(row["problem"]), "", "", "", "", ""))
            continue
        numbers = (f"{row['step_time_s']:.4g}", f"{row['tokens_per_s_per_device']:,.0f}", f"{row['mfu']:.1%}")
        again = f" +{row['recompute']}" if row["recompute"] != "none" else ""
        layout, gib = f"{row['layout']}{again}", f"{row['memory_gib']:.4g}"
        cells.append((*start, f"{row['num_devices']:,}", layout, str(row["micro_batch"]), *numbers, gib))
    shown = [name for name in head if name != "settings" or any(row["settings"] for row in rows)]
    kept = [[cell for name, cell in zip(head, line, strict=True) if name in shown] for line in cells]
    return table(
        shown, kept, right=("devices", "micro-batch", "step s", "tokens/s/device", "MFU", "GiB"), fold=("layout",)
    )


def _short(problem: str) -> str:
    """The beginning of a reason; the whole of it is in the file."""
    return problem if len(problem) < 60 else f"{problem[:57]}..."

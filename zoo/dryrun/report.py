"""A rehearsal for a reader at a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from zoo.dryrun.run import GIB, DryRun
from zoo.plan.explain import described
from zoo.plan.price import CONTEXT_GIB
from zoo.plan.wording import count

Column = tuple[str, Literal["left", "right"]]
PLANNED = {"other": "", "context": "workspace"}
"""What the planner calls a kind where it has another name for it; empty: it has none."""
TERA = 1e12
COLLECTIVES = 12
"""Rows that are shown at most."""


def report(made: DryRun) -> list[RenderableType]:
    """The whole report."""
    return [
        *_head(made),
        _title("Memory at the peak, GiB"),
        _memory(made),
        Text(f"  the peak is in the {made.peak_at}", style="dim"),
        Text(f"  peaks: {', '.join(f'{phase} {gib:.4g}' for phase, gib in made.phase_gib.items())}", style="dim"),
        _title("FLOPs of matrix products"),
        _flops(made),
        _title("Sent by the device in a step, GiB"),
        _traffic(made),
        _title("Collectives"),
        _collectives(made),
        *_notes(made),
    ]


def _head(made: DryRun) -> list[RenderableType]:
    planned = made.planned
    limit = planned.memory_limit_gib
    of = "" if limit is None else f" of {limit:g} ({made.total_gib / limit:.0%})"
    verdict = "fits" if made.fits else "does not fit"
    tokens = planned.global_batch * planned.seq_len
    return [
        Text.assemble((planned.model, "bold"), f" on {planned.hardware}: {_place(made)} of {planned.num_devices:,}"),
        Text(f"  {described(planned)}", style="bold"),
        Text(
            f"  {planned.global_batch:,} sequences of {planned.seq_len:,} a step, {count(tokens)} tokens; "
            f"{planned.precision}, adamw; {made.layers_run} of {made.num_layers} layers were run, each for those like "
            f"it; {made.seconds:.0f} s",
            style="dim",
        ),
        Text(f"  {verdict}: {made.total_gib:.4g} GiB{of}", style="bold green" if made.fits else "bold red"),
    ]


def _place(made: DryRun) -> str:
    layout = made.planned.layout
    first = made.stage * (made.planned.num_devices // layout.pp)
    return f"rank {first}" + (f", stage {made.stage} of {layout.pp}," if layout.pp > 1 else "")


def _memory(made: DryRun) -> Table:
    ours = {**made.memory_gib, "context": CONTEXT_GIB}
    theirs = made.planned.memory_gib
    rows = []
    for kind, gib in sorted(ours.items(), key=lambda item: -item[1]):
        rows.append((f"  {kind}", gib, theirs.get(PLANNED.get(kind, kind))))
    rows.append(("  all", made.total_gib, made.planned.total_memory_gib))
    return _compared([(name, _gib(mine), _gib(plan), _off(mine, plan)) for name, mine, plan in rows])


def _flops(made: DryRun) -> Table:
    trained = made.flops.get("forward", 0) + made.flops.get("backward", 0)
    rows = [(f"  {name}", f"{flops / TERA:,.3f} T", "", "") for name, flops in made.flops.items()]
    planned = made.planned_flops
    off = _off(trained, planned)
    rows.append(("  forward and backward", f"{trained / TERA:,.3f} T", f"{planned / TERA:,.3f} T", off))
    return _compared(rows)


def _traffic(made: DryRun) -> Table:
    ours: Mapping[str, float] = {kind: nbytes / GIB for kind, nbytes in made.traffic.items()}
    theirs = {kind: nbytes / GIB for kind, nbytes in made.planned.traffic.items() if nbytes}
    rows = []
    for kind in sorted({*ours, *theirs}, key=lambda kind: -ours.get(kind, 0.0)):
        mine, plan = ours.get(kind, 0.0), theirs.get(kind)
        rows.append((f"  {kind}", f"{mine:.4g}", _gib(plan), _off(mine, plan)))
    mine, plan = sum(ours.values()), sum(theirs.values())
    rows.append(("  all", f"{mine:.4g}", _gib(plan), _off(mine, plan)))
    return _compared(rows)


def _collectives(made: DryRun) -> Table:
    rows = [
        (f"  {row.op}", row.axis, f"{row.size:,}", row.dtype, f"{row.calls:,}", f"{row.sent / GIB:.4g}")
        for row in made.collectives[:COLLECTIVES]
    ]
    head: tuple[Column, ...] = (
        ("  collective", "left"),
        ("axis", "left"),
        ("processes", "right"),
        ("dtype", "left"),
        ("calls", "right"),
        ("GiB sent", "right"),
    )
    return _grid(head, rows)


def _notes(made: DryRun) -> list[RenderableType]:
    notes = [
        "  planner: its formulas for the engine "
        f"{made.planned.engine}; context: drivers and communicators as it assumes them",
    ]
    if made.fused:
        what = "attention, scans and chains of elementwise operations are one kernel each (fused=false: they are not)"
    else:
        what = "every operation of torch by itself, attention and grouped products aside (fused=true: as engines do)"
    notes.append(f"  kernels: {what}")
    return [Text(""), *(Text(note, style="dim") for note in notes)]


def _compared(rows: Iterable[Sequence[str]]) -> Table:
    return _grid((("", "left"), ("rehearsed", "right"), ("planner", "right"), ("", "right")), rows)


def _gib(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _off(mine: float, plan: float | None) -> str:
    return f"{mine / plan - 1:+.1%}" if plan else ""


def _title(text: str) -> Text:
    return Text(f"\n{text}", style="bold")


def _grid(columns: Sequence[Column], rows: Iterable[Sequence[str]]) -> Table:
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name, side in columns:
        made.add_column(name, justify=side, no_wrap=True)
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made

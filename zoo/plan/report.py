"""Plans, sensitivities, budgets and inference for a reader at a terminal."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from zoo.plan.explain import described, different, grouped, in_words
from zoo.plan.wording import amount, count, seconds

if TYPE_CHECKING:
    from zoo.plan.budget import Budget
    from zoo.plan.checkpoints import Checkpoints
    from zoo.plan.estimate import Estimate
    from zoo.plan.inference import Inference
    from zoo.plan.plan import Plan
    from zoo.plan.sensitivity import Effect, Sensitivity

Column = tuple[str, Literal["left", "right"]]
"""The name of a column and its side."""
BAR = 24
"""Characters of the longest bar."""
TEXT_WIDTH = 110
TIGHT = 0.95
"""Of the memory: from here on an error of a few percent in the estimate decides whether it fits."""
MOST_LAYOUTS = 6


def report(plan: Plan) -> list[RenderableType]:
    """The whole report of a plan."""
    return [
        *_head(plan),
        _title("Memory of the fullest device"),
        _memory(plan.best),
        _title("Time of a step"),
        _time(plan),
        _title("Why this one"),
        *_lines(plan.reasons),
        _title("What runs out first"),
        *_lines(in_words(plan.limits)),
        _title("The best layouts"),
        _layouts(plan),
        Text(_searched(plan), style="dim"),
    ]


def text_of(plan: Plan) -> str:
    """The report as plain text."""
    return as_text(report(plan))


def as_text(parts: Iterable[RenderableType]) -> str:
    """Renderables as plain text."""
    buffer = io.StringIO()
    Console(file=buffer, width=TEXT_WIDTH, color_system=None, highlight=False).print(*parts, sep="\n")
    return "\n".join(line.rstrip() for line in buffer.getvalue().rstrip().splitlines())


def _title(text: str) -> Text:
    return Text(f"\n{text}", style="bold")


def _lines(sentences: Iterable[str]) -> list[RenderableType]:
    return [Text(f"  {sentence}") for sentence in sentences]


def _grid(columns: Sequence[Column], rows: Iterable[Sequence[str | Text]]) -> Table:
    named = any(name for name, _ in columns)
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", show_header=named)
    for name, side in columns:
        made.add_column(name, justify=side, no_wrap=True)
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in row))
    return made


def _head(plan: Plan) -> list[RenderableType]:
    best, q = plan.best, plan.question
    params, chip = q.spec.params(), q.machine.chip
    active = f", {count(params.active)} active" if params.active != params.total else ""
    announced = " (announced, not measured)" if chip.announced else ""
    tokens = count(best.global_batch * best.seq_len)
    chosen = " (batch chosen by the size of the model)" if "global_batch" in q.chosen else ""
    share = best.total_memory_gib / best.memory_limit_gib if best.memory_limit_gib else None
    used = f"{best.total_memory_gib:.4g} GiB" + (f" of {best.memory_limit_gib:g} ({share:.0%})" if share else "")
    tight = "; tight: an error of a few percent decides" if share and share > TIGHT else ""
    return [
        Text.assemble((best.model, "bold"), " on ", (f"{best.num_devices:,} x {chip.name}", "bold"), announced),
        Text(
            f"{count(params.total)} parameters{active}; {best.global_batch:,} sequences of {best.seq_len:,} a step, "
            f"{tokens} tokens{chosen}; {best.precision}, {q.optimizer}; constants of {best.engine}",
            style="dim",
        ),
        _title("The plan"),
        Text.assemble("  ", (described(best), "bold green")),
        Text(
            f"  {seconds(best.step_time_s)} a step, {best.tokens_per_s_per_device:,.0f} tokens/s a device, "
            f"{count(best.tokens_per_s)} tokens/s in all, MFU {best.mfu:.1%}"
        ),
        *([Text(f"  of these speeds: {best.error}")] if best.error else []),
        Text(f"  {used}{tight}"),
    ]


def _bar(share: float, style: str) -> Text:
    return Text("█" * max(0, round(share * BAR)) or "▏", style=style)


def _memory(best: Estimate) -> Table:
    total = best.total_memory_gib
    parts = sorted(best.memory_gib.items(), key=lambda part: -part[1])
    rows: list[Sequence[str | Text]] = [
        (f"  {name}", f"{gib:.2f}", f"{gib / total:.0%}", _bar(gib / total, "cyan")) for name, gib in parts if gib
    ]
    if best.memory_limit_gib:
        free = best.memory_limit_gib - total
        rows.append(("  free", f"{free:.2f}", "", Text("")))
    return _grid((("", "left"), ("GiB", "right"), ("share", "right"), ("", "left")), rows)


def _time(plan: Plan) -> Table:
    mine = grouped(plan.best.time_s)
    theirs: Mapping[str, float] = grouped(plan.runner_up.time_s) if plan.runner_up else {}
    total = plan.step_time_s
    rows: list[Sequence[str | Text]] = []
    for name, value in sorted(mine.items(), key=lambda part: -part[1]):
        other = theirs.get(name, 0.0)
        if max(value, other) < 1e-3 * total:
            continue
        row = [f"  {name}", seconds(value), f"{value / total:.1%}", seconds(other) if theirs else ""]
        rows.append((*row, _bar(value / total, "green")))
    last = seconds(plan.runner_up.step_time_s) if plan.runner_up else ""
    rows.append(("  all", seconds(total), "", last, Text("")))
    head = "runner-up" if plan.runner_up else ""
    return _grid((("", "left"), ("time", "right"), ("share", "right"), (head, "right"), ("", "left")), rows)


def _layouts(plan: Plan) -> Table:
    found, rows = plan.found, []
    for row in different(found, MOST_LAYOUTS):
        again = found.recompute(row)
        later = found.seconds[row] / found.seconds[0] - 1
        rows.append(
            (
                f"  {found.layout(row)}",
                f"{found.micro_batch(row)}",
                "" if again == "none" else again,
                seconds(float(found.seconds[row])),
                f"{later:+.1%}" if row else "",
                f"{found.memory_gib[row]:.4g}",
            )
        )
    names: tuple[Column, ...] = (
        ("  layout", "left"),
        ("micro-batch", "right"),
        ("recompute", "left"),
        ("step", "right"),
        ("", "right"),
        ("GiB", "right"),
    )
    return _grid(names, rows)


def _searched(plan: Plan) -> str:
    legal, priced = (sum(getter(found) for found in plan.tried) for getter in (lambda f: f.num_legal, len))
    fit = sum(found.num_fitting for found in plan.tried)
    return f"  {legal:,} legal layouts; {priced:,} priced, the others cannot win; {fit:,} of those fit"


def sensitivity_report(found: Sensitivity) -> list[RenderableType]:
    """The table of elasticities."""
    rows = [_effect_row(effect, found.step_time_s) for effect in found.effects]
    head: tuple[Column, ...] = (
        ("  resource", "left"),
        ("now", "left"),
        ("elasticity", "right"),
        ("layout kept", "right"),
        ("less of it", "right"),
        ("more of it", "right"),
    )
    notes = [
        "  elasticity: percent of step time for a percent more of it, planned anew; then with the layout kept",
        "  *: another layout is the best then",
        *(f"  {effect.resource}: {effect.note}" for effect in found.effects if effect.note),
    ]
    return [
        _title("What a better machine would bring"),
        _grid(head, rows),
        *(Text(note, style="dim") for note in notes),
    ]


def _effect_row(effect: Effect, now: float) -> tuple[str, ...]:
    def change(index: int) -> str:
        made = (effect.fewer, effect.more)[index]
        if made is None:
            return "-"
        if math.isinf(made.step_time_s):
            return f"x{made.factor:g}: nothing fits"
        return f"x{made.factor:g}: {made.step_time_s / now - 1:+.1%}{'*' if made.moved else ' '}"

    numbers = [
        f"{value:+.3f}" if math.isfinite(value) else "-" for value in (effect.elasticity, effect.fixed_elasticity)
    ]
    return (f"  {effect.resource}", effect.value or "-", *numbers, change(0), change(1))


def budget_report(found: Budget) -> list[RenderableType]:
    """What a run takes, and what the scaling law says of it."""
    from zoo.plan.budget import LAW_SOURCE

    energy = "" if found.energy_mwh is None else f", {amount(found.energy_mwh)} MWh (rated power of the chips)"
    money = "" if found.cost is None else f", cost {found.cost:,.0f}"
    return [
        _title("The run"),
        Text(
            f"  {count(found.tokens)} tokens: {amount(found.days)} days without interruption, "
            f"{found.device_hours:,.0f} device-hours{energy}{money}"
        ),
        Text(f"  {_checkpoints(found.checkpoints)}"),
        Text(
            f"  {found.flops:.3g} FLOPs, {amount(found.tokens_per_parameter)} tokens for each active parameter; "
            f"expected loss {found.loss:.3f} nats a token, were the active parameters a dense model"
        ),
        Text(
            f"  as many FLOPs are best spent on a dense model of {count(found.best_parameters)} with "
            f"{count(found.best_tokens)} tokens: {found.best_loss:.3f}"
        ),
        Text(f"  scaling law: {LAW_SOURCE}", style="dim"),
    ]


def _checkpoints(found: Checkpoints) -> str:
    speed = f"{found.write_gb_s:,.4g} GB/s{' (assumed; hardware.storage.write_gb_s=)' if found.assumed else ''}"
    how = "while training waits (checkpoint_async=true: behind it)" if found.waits else "behind training"
    return (
        f"of that {found.share / (1 + found.share):.2%} for checkpoints of {found.gib:,.4g} GiB every "
        f"{found.every:,} steps, each written in {seconds(found.write_s)} at {speed} {how}"
    )


def inference_report(found: Inference) -> list[RenderableType]:
    """What running a model takes."""
    rows = [("  weights", f"{found.weights_gib:.2f}")]
    rows += [(f"  cache: {name}", _gib(gib)) for name, gib in found.cache_gib.items()]
    rows += [("  buffers, drivers", f"{found.workspace_gib:.2f}"), ("  all", f"{found.total_gib:.2f}")]
    room = "" if found.memory_limit_gib is None else f" of {found.memory_limit_gib:,.4g} GiB"
    verdict = "fits" if found.fits else "does not fit"
    what = f"{found.batch:,} sequences of {found.context:,} tokens in {found.precision}"
    speeds = [
        f"prefill: {seconds(found.prefill_s)} for all prompts, {count(found.prefill_tokens_per_s)} tokens/s",
        f"decode: {seconds(found.decode_s)} a token, {count(found.decode_tokens_per_s)} tokens/s; limited by "
        f"{found.bound}",
    ]
    devices = f"{found.num_devices:,} device{'' if found.num_devices == 1 else 's'}"
    speed_title = "Speed at best" if found.fits else "Speed at best, had it the room"
    style = "bold green" if found.fits else "bold red"
    return [
        Text.assemble((found.model, "bold"), f" on {found.hardware} ({devices}): {what}"),
        Text(f"{verdict}: {found.total_gib:,.4g}{room}", style=style),
        _title("Memory of all devices, GiB"),
        _grid((("", "left"), ("", "right")), rows),
        _title(speed_title),
        *_lines(speeds),
        _title("The smallest machines that hold it"),
        *_lines(found.smallest or ("none that zoo knows",)),
    ]


def _gib(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.3g}"

"""The pieces of the live terminal display, as rich renderables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.constrain import Constrain
from rich.padding import Padding
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from zoo.train.events import Evaluated, LayerHealth, RunFinished, RunStarted, StepDone
from zoo.train.routing import summary
from zoo.train.wording import as_predicted, closing, duration, facts, judgement, numbers, printable, rivals, shown_path

LABEL = "dim"
GOOD, WARNING, BAD, ACCENT = "green", "yellow", "red", "cyan"
BARS = "▁▂▃▄▅▆▇█"
DEAD = "x"
SAMPLE_LINES = 24


def header(event: RunStarted, width: int) -> RenderableType:
    """What runs, on what, with which choices."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style=LABEL, no_wrap=True)
    grid.add_column(overflow="fold")
    for label, text in facts(event):
        grid.add_row(label, Text(printable(text), style="bold" if label == "model" else ""))
    return Panel(grid, title="[bold]zoo[/]", title_align="left", box=box.ROUNDED, border_style=ACCENT, width=width)


def notice(label: str, message: str, width: int) -> RenderableType:
    """Something that a person should not miss; it stays above the part that is redrawn."""
    text = Text.assemble((f"{label}  ", f"bold {BAD}"), printable(message))
    return Padding(Constrain(text, width - 4), (0, 2))


def progress(step: int, num_steps: int, spent_s: float, left_s: float | None) -> RenderableType:
    """A bar over the whole run, with the time that this session took and the time that is left."""
    grid = Table.grid(expand=True, padding=(0, 2, 0, 0))
    grid.add_column(ratio=1)
    grid.add_column(no_wrap=True, overflow="crop")
    grid.add_column(no_wrap=True, overflow="crop", style=LABEL, justify="right")
    time = duration(spent_s) if left_s is None else f"{duration(spent_s)}, {duration(left_s)} left"
    bar = ProgressBar(total=num_steps, completed=step, complete_style=ACCENT, finished_style=GOOD)
    grid.add_row(bar, f"{step:,} / {num_steps:,} steps", time)
    return grid


def flow(pieces: Iterable[Text], width: int) -> Text:
    """Pieces side by side, going on in the next line where the next piece does not fit."""
    lines: list[Text] = []
    for piece in pieces:
        if lines and lines[-1].cell_len + 3 + piece.cell_len <= width:
            lines[-1] = Text("   ").join([lines[-1], piece])
        else:
            lines.append(piece)
    return Text("\n").join(lines)


def step_numbers(event: StepDone, width: int) -> Text:
    """Loss, speed and the rest of one step."""

    def piece(label: str, text: str) -> Text:
        healthy = math.isfinite(event.loss) and math.isfinite(event.grad_norm)
        return Text.assemble((label, LABEL), " ", (text.strip(), "bold" if healthy else f"bold {BAD}"))

    return flow([_padded(piece(label, text), len(label) + 1 + len(text)) for label, text in numbers(event)], width)


def _padded(text: Text, width: int) -> Text:
    """A piece that keeps its place in the line while its digits come and go."""
    text.pad_right(width - text.cell_len)
    return text


def load_bars(load: Sequence[int], width: int) -> Text:
    """One character for each expert: half height is the mean load, full height twice the mean or more, x is dead.

    Experts stand in their order; when there are more than `width`, the bars are an even sample from the busiest
    expert to the idlest.
    """
    mean = sum(load) / len(load)
    if len(load) > width:
        ranked = sorted(load, reverse=True)
        load = [ranked[round(index * (len(ranked) - 1) / max(1, width - 1))] for index in range(width)]
    text = Text()
    for count in load:
        if count == 0:
            text.append(DEAD, BAD)
        else:
            level = min(len(BARS), math.ceil(count / mean * len(BARS) / 2))
            text.append(BARS[level - 1], WARNING if count >= 2 * mean else ACCENT)
    return text


def routing_table(layers: Sequence[LayerHealth], width: int, max_rows: int) -> RenderableType:
    """A row for each layer; the worst ones and a line for the rest when there are more than `max_rows`."""
    shown, rest = list(layers), []
    if len(layers) > max_rows:
        ranked = sorted(layers, key=lambda health: (health.num_dead, health.max_violation), reverse=True)
        shown, rest = ranked[: max(1, max_rows - 1)], ranked[max(1, max_rows - 1) :]
    bar_width = width - 34
    table = Table(box=None, padding=(0, 3, 0, 0), header_style=LABEL, pad_edge=False)
    for name in ("layer", "entropy", "MaxVio", "dead"):
        table.add_column(name, justify="right", no_wrap=True, overflow="crop")
    if bar_width >= 8:
        in_order = all(len(health.load) <= bar_width for health in shown)
        what = "load of each expert" if in_order else "load, busiest expert first"
        title = f"{what} (half height: mean, {DEAD}: none)"
        table.add_column(title if len(title) <= bar_width else "load", no_wrap=True, overflow="crop")
    for health in shown:
        dead = Text(str(health.num_dead), style=BAD if health.num_dead else "")
        bars = [load_bars(health.load, bar_width)] if bar_width >= 8 else []
        table.add_row(str(health.layer), f"{health.entropy:.3f}", f"{health.max_violation:.2f}", dead, *bars)
    return Group(table, _rest(rest)) if rest else table


def _rest(layers: Sequence[LayerHealth]) -> Text:
    """One line for the layers that found no place."""
    lowest = min(health.entropy for health in layers)
    total = summary(layers)
    return Text(
        f"and {len(layers)} more: entropy >= {lowest:.3f}, MaxVio <= {total.worst_max_violation:.2f}, "
        f"dead {total.num_dead}",
        style=LABEL,
        no_wrap=True,
        overflow="crop",
    )


def held_out(event: Evaluated | None, baselines: dict[str, float], width: int) -> Text:
    """The last evaluation beside the baselines."""
    if event is None:
        first = Text("held-out not measured yet", LABEL)
    else:
        value = f"{event.bits_per_byte:.3f}"
        first = Text.assemble(("held-out ", LABEL), (value, "bold"), f" bits/byte at step {event.step:,}")
    pieces = [first]
    for rival in rivals(event.bits_per_byte if event else None, baselines):
        colour = GOOD if rival.verdict.startswith("beaten") else WARNING
        verdict = (rival.verdict, LABEL if event is None else colour)
        pieces.append(Text.assemble((f"{rival.name} ", LABEL), f"{rival.bits_per_byte:.3f} ", verdict))
    return flow(pieces, width)


def final(started: RunStarted, event: RunFinished, width: int) -> RenderableType:
    """How the run ended: time, held-out text beside the baselines, the sample and the files."""
    parts: list[RenderableType] = []
    if event.last_eval is not None:
        ranking = _ranking(started, event, with_bars=width >= 70)
        parts += [Text("held-out bits per byte, lower is better", LABEL), ranking, ""]
    if event.sample:
        parts += [Text("what it writes", LABEL), Padding(_sample(event), (0, 0, 0, 2)), ""]
    if event.files:
        files = Text("\n".join(printable(shown_path(path)) for path in event.files), overflow="fold")
        parts += [Text("files", LABEL), Padding(files, (0, 0, 0, 2)), ""]
    colour = GOOD if event.reason == "done" else WARNING
    title = Text(closing(started, event), style=f"bold {colour}")
    if beside := as_predicted(event):
        title = Text("\n").join([title, Text(beside, style="not bold")])
    body = Group(title, "", *parts[:-1]) if parts else title
    return Panel(body, title="[bold]zoo[/]", title_align="left", box=box.ROUNDED, border_style=colour, width=width)


def _ranking(started: RunStarted, event: RunFinished, with_bars: bool) -> RenderableType:
    """The model and the baselines, best first."""
    assert event.last_eval is not None
    ours = event.last_eval.bits_per_byte
    rows = [(rival.bits_per_byte, rival.name, rival.verdict, False) for rival in rivals(ours, event.baselines)]
    rows = sorted([*rows, (ours, started.model_name, f"step {event.last_eval.step:,}", True)])
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(overflow="fold")
    grid.add_column(justify="right", no_wrap=True, overflow="crop")
    grid.add_column(style=LABEL, overflow="fold")
    for bits, name, note, is_ours in rows:
        colour = ACCENT if is_ours else LABEL
        bar = ProgressBar(total=rows[-1][0], completed=bits, width=24, complete_style=colour, finished_style=colour)
        style = "bold" if is_ours else ""
        grid.add_row(Text(f"  {name}", style), Text(f"{bits:.3f}", style), note, bar if with_bars else "")
    sentence = judgement(started, event)
    return Group(grid, "", Text(sentence, style="bold")) if sentence else grid


def _sample(event: RunFinished) -> Text:
    text = Text.assemble((printable(event.sample_prompt), f"bold {ACCENT}"), printable(event.sample), overflow="fold")
    text.rstrip()
    lines = text.split("\n", allow_blank=True)
    if len(lines) > SAMPLE_LINES:
        more = Text(f"and {len(lines) - SAMPLE_LINES} more lines", LABEL)
        return Text("\n").join([*lines[:SAMPLE_LINES], more])
    return text

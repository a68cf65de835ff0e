"""What a person sees of a run: a live display on a terminal, plain lines everywhere else."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.constrain import Constrain
from rich.live import Live
from rich.padding import Padding

from zoo.train import panels
from zoo.train.events import Alerted, Evaluated, LayerHealth, RolledBack, RunFinished, RunStarted, StepDone
from zoo.train.routing import summary
from zoo.train.wording import as_predicted, closing, facts, judgement, numbers, printable, rivals, shown_path

MAX_WIDTH = 100
INDENT = 2
"""Columns left of the redrawn part, so that it stands below the text of the header."""
REFRESH_S = 0.25
MAX_SHARE = 0.02
"""Most of the time that may go into drawing."""


class LiveDisplay:
    """A display that is redrawn in place, for UTF-8 terminals.

    It draws when events arrive, without a thread that would take time from the training.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self._live: Live | None = None
        self._started: RunStarted | None = None
        self._step: StepDone | None = None
        self._routing: tuple[LayerHealth, ...] = ()
        self._evaluated: Evaluated | None = None
        self._spent_s = 0.0
        self._first_spent_s = 0.0
        self._draw_next_at = 0.0

    def started(self, event: RunStarted) -> None:
        self._started = event
        self.console.print(panels.header(event, self._width), "")
        self._live = Live(get_renderable=self.view, console=self.console, auto_refresh=False)
        self._live.start(refresh=True)

    def step_done(self, event: StepDone) -> None:
        if self._step is None:
            self._first_spent_s = event.step_time_s
        self._step = event
        self._routing = event.routing or self._routing
        self._spent_s += event.step_time_s
        self._draw()

    def evaluated(self, event: Evaluated) -> None:
        self._evaluated = event
        self._spent_s += event.time_s
        self._draw()

    def alerted(self, event: Alerted) -> None:
        self.console.print(panels.notice(f"alert {event.name}", f"step {event.step:,}: {event.message}", self._width))

    def rolled_back(self, event: RolledBack) -> None:
        self.console.print(panels.notice("rolled back", event.message, self._width))

    def finished(self, event: RunFinished) -> None:
        self.close()
        if self._started is not None:
            self.console.print("", panels.final(self._started, event, self._width), sep="\n")

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def view(self) -> RenderableType:
        """The part that is redrawn: progress, numbers, routing, held-out text."""
        if self._started is None or self._step is None:
            return Padding("the first step takes longer than the others", (0, INDENT), style="dim")
        width = self._width - 2 * INDENT
        step, num_steps = self._step.step, self._started.num_steps
        bar = panels.progress(step, num_steps, self._spent_s, self._left_s(step, num_steps))
        line = panels.step_numbers(self._step, width)
        held_out = panels.held_out(self._evaluated, self._started.baselines, width)
        parts: list[RenderableType] = [bar, "", line, "", held_out]
        if self._routing:
            taken = len(line.split()) + len(held_out.split()) + 6
            rows = max(1, self.console.height - taken)
            table = panels.routing_table(self._routing, width, rows)
            parts[4:4] = [table, ""]
        return Padding(Constrain(Group(*parts), width), (0, INDENT))

    @property
    def _width(self) -> int:
        return min(self.console.width, MAX_WIDTH)

    def _left_s(self, step: int, num_steps: int) -> float | None:
        """Seconds to the end at the speed so far, evaluations included; the slow first step does not count."""
        assert self._started is not None
        later_steps = step - self._started.first_step - 1
        if later_steps < 1 or step == num_steps:
            return None
        return (self._spent_s - self._first_spent_s) / later_steps * (num_steps - step)

    def _draw(self) -> None:
        start = time.monotonic()
        if self._live is not None and start >= self._draw_next_at:
            self._live.refresh()
            end = time.monotonic()
            self._draw_next_at = end + max(REFRESH_S, (end - start) / MAX_SHARE)


class PlainDisplay:
    """One aligned line every `log_every` steps, without control characters."""

    def __init__(self, log_every: int, stream: TextIO | None = None) -> None:
        self.log_every = log_every
        self.stream = stream or sys.stdout
        self._started: RunStarted | None = None

    def started(self, event: RunStarted) -> None:
        self._started = event
        for label, text in facts(event):
            self._write(f"{label:<10}{text}")
        for rival in rivals(None, event.baselines):
            self._write(f"{'to beat':<10}{rival.name}, {rival.bits_per_byte:.3f} held-out bits per byte")
        self._write("")

    def step_done(self, event: StepDone) -> None:
        assert self._started is not None
        first, last = self._started.first_step + 1, self._started.num_steps
        if event.step % self.log_every and event.step not in (first, last):
            return
        parts = [self._place(event.step), *(f"{label} {text}" for label, text in numbers(event))]
        if event.routing:
            health = summary(event.routing)
            parts.append(
                f"routing entropy {health.mean_entropy:.3f}  MaxVio {health.worst_max_violation:5.2f} "
                f"(layer {health.worst_layer})  dead {health.num_dead}"
            )
        self._write("  ".join(parts))

    def evaluated(self, event: Evaluated) -> None:
        assert self._started is not None
        beside = [
            f"{rival.name} {rival.bits_per_byte:.3f} {rival.verdict}"
            for rival in rivals(event.bits_per_byte, self._started.baselines)
        ]
        held_out = f"held-out {event.bits_per_byte:.3f} bits/byte"
        if event.average_bits_per_byte is not None:
            held_out += f" ({event.average_bits_per_byte:.3f} by the average of the weights)"
        self._write("  ".join([self._place(event.step), "; ".join([held_out, *beside])]))

    def alerted(self, event: Alerted) -> None:
        self._write(f"{self._place(event.step)}  ALERT {event.name}: {event.message}")

    def rolled_back(self, event: RolledBack) -> None:
        self._write(f"{self._place(event.step)}  ROLLED BACK: {event.message}")

    def finished(self, event: RunFinished) -> None:
        assert self._started is not None
        self._write("")
        self._write(closing(self._started, event))
        if beside := as_predicted(event):
            self._write(beside)
        if event.last_eval is not None:
            self._write(f"{'held-out':<10}{event.last_eval.bits_per_byte:.3f} bits per byte, lower is better")
            for rival in rivals(event.last_eval.bits_per_byte, event.baselines):
                self._write(f"{'':<10}{rival.bits_per_byte:.3f} {rival.name}, {rival.verdict}")
            sentence = judgement(self._started, event)
            self._write(*([f"{'':<10}{sentence}"] if sentence else []))
        if event.sample:
            lines = printable(event.sample_prompt + event.sample).rstrip().split("\n")
            self._write("", "what it writes", *(f"    {line}" for line in lines))
        if event.files:
            self._write("", "files", *(f"    {shown_path(path)}" for path in event.files))

    def close(self) -> None:
        self.stream.flush()

    def _place(self, step: int) -> str:
        assert self._started is not None
        total = f"{self._started.num_steps:,}"
        return f"step {step:>{len(total)},}/{total}"

    def _write(self, *lines: str) -> None:
        """Lines that any encoding of the stream can hold, visible at once."""
        encoding = self.stream.encoding or "utf-8"
        for line in lines:
            safe = printable(line).encode(encoding, errors="replace").decode(encoding)
            self.stream.write(safe.rstrip() + "\n")
        self.stream.flush()

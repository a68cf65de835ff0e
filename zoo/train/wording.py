"""The words and numbers that a run is told in, the same on a live terminal and in plain lines."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from zoo.train.events import Predicted, RunFinished, RunStarted, StepDone


@dataclass(frozen=True)
class Rival:
    """A simple model that the run is held against."""

    name: str
    bits_per_byte: float
    verdict: str
    """Who is ahead, and by how much."""


def short_count(count: float) -> str:
    """A count in three digits: 950, 1.06M, 30.5B."""
    for unit in ("", "k", "M", "B"):
        if abs(count) < 999.5:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.4g}T"


def duration(seconds: float) -> str:
    """Seconds in the two largest units: 41 s, 3 min 12 s, 2 h 05 min."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def shown_path(path: Path) -> str:
    """Relative to the working directory when it lies below it, else absolute."""
    path, here = path.absolute(), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def printable(text: str) -> str:
    """`text` without characters that move the cursor, colour the terminal or hide: a model may write any of them."""
    lines = text.replace("\r\n", "\n").expandtabs(4)
    return "".join(char if char == "\n" or char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in lines)


def facts(event: RunStarted) -> list[tuple[str, str]]:
    """What a run is, as (label, text); the choices share one label, which only the first of them shows."""
    size = f"{short_count(event.num_params)} parameters"
    if event.num_active_params != event.num_params:
        size += f", {short_count(event.num_active_params)} active per token"
    plan = f"{event.num_steps:,} steps of {event.tokens_per_step:,} tokens"
    if event.first_step:
        plan += f", resumed after step {event.first_step:,}"
    rows = [
        ("model", f"{event.model_name}, {size}"),
        ("hardware", event.hardware),
        ("data", event.corpus),
        ("plan", plan),
        ("run", shown_path(event.run_dir)),
    ]
    if expected := predicted(event.predicted):
        rows.insert(-1, ("predicted", expected))
    return rows + [("" if index else "choices", choice) for index, choice in enumerate(event.choices)]


def numbers(event: StepDone) -> list[tuple[str, str]]:
    """The numbers of a step as (label, text), each text as wide as its usual largest value."""
    pairs = [
        ("loss", f"{event.loss:7.4f}"),
        ("bits/byte", f"{event.bits_per_byte:6.3f}"),
        ("tokens/s", f"{event.tokens_per_s:7,.0f}"),
        ("MFU", "" if event.mfu is None else f"{event.mfu:5.1%}"),
        ("lr", f"{event.learning_rate:.1e}"),
        ("grad norm", f"{event.grad_norm:6.3f}"),
    ]
    return [(label, text) for label, text in pairs if text]


def short_time(seconds: float) -> str:
    """Seconds in three digits: 85.3 ms, 1.24 s."""
    return f"{1000 * seconds:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"


def predicted(event: Predicted | None) -> str:
    """What the plan expects, in one line; empty where it expects nothing."""
    pairs = _measures(event) if event is not None else []
    return ", ".join(f"{name} {text}" for name, text in pairs if text)


def as_predicted(event: RunFinished) -> str:
    """What a step took beside what was predicted: step 812 ms (plan: 790 ms), peak 1.90 GiB (plan: 1.80 GiB)."""
    plan = dict(_measures(event.predicted)) if event.predicted is not None else {}
    pieces = []
    for name, text in _measures(event):
        if text:
            pieces.append(f"{name} {text}" + (f" (plan: {plan[name]})" if plan.get(name) else ""))
    return ", ".join(pieces)


def _measures(event: Predicted | RunFinished) -> list[tuple[str, str]]:
    time, peak, mfu = event.step_time_s, event.peak_memory_gib, event.mfu
    return [
        ("step", "" if time is None else short_time(time)),
        ("peak", "" if peak is None else f"{peak:.3g} GiB"),
        ("MFU", "" if mfu is None else f"{mfu:.1%}"),
    ]


def rivals(bits_per_byte: float | None, baselines: dict[str, float]) -> list[Rival]:
    """The baselines, best first, beside the held-out bits per byte of the run (None: not known yet)."""

    def verdict(baseline: float) -> str:
        if bits_per_byte is None:
            return "to beat"
        gap = baseline - bits_per_byte
        return f"beaten by {gap:.3f}" if gap > 0 else f"ahead by {-gap:.3f}"

    ranked = sorted(baselines.items(), key=lambda item: item[1])
    return [Rival(name, value, verdict(value)) for name, value in ranked]


def closing(started: RunStarted, event: RunFinished) -> str:
    """How the run ended, how much it did and how long that took."""
    steps = event.step - started.first_step
    tokens = steps * started.tokens_per_step
    what = "done" if event.reason == "done" else f"{event.reason} at step {event.step:,} of {event.num_steps:,}"
    speed = f" ({tokens / event.train_time_s:,.0f} tokens/s)" if event.train_time_s > 0 else ""
    return f"{what}: {steps:,} steps, {short_count(tokens)} tokens in {duration(event.train_time_s)}{speed}"


def judgement(started: RunStarted, event: RunFinished) -> str:
    """Who won on held-out text, in one sentence; empty when nothing can be compared."""
    if event.last_eval is None or not event.baselines:
        return ""
    ours = event.last_eval.bits_per_byte
    name, best = min(event.baselines.items(), key=lambda item: item[1])
    if ours < best:
        return f"{started.model_name} beats {name} by {best - ours:.3f} bits per byte ({(best - ours) / best:.1%})"
    return f"{name} is still ahead of {started.model_name} by {ours - best:.3f} bits per byte"

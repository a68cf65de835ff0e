"""What to say when no layout will do: what is missing, and the nearest things that would."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from zoo.plan import engine
from zoo.plan.explain import room_in_words
from zoo.plan.layout import Layout
from zoo.plan.machines import machines
from zoo.plan.question import DEGREES, Question, divisors
from zoo.plan.search import Found, bounds_of, families

MOST_DEVICES = 1 << 17
MOST_MACHINES = 3


def nowhere(q: Question, tried: Sequence[Found]) -> str:
    """The message for a question that no layout answers."""
    if not any(len(found) for found in tried):
        return _no_layout(q)
    found = min((one for one in tried if len(one)), key=lambda one: float(np.min(one.memory_gib)))
    precision = found.precision
    least, layout = smallest(q, precision)
    room = q.room_gib
    text = (
        f"hardware: {q.spec.name} fits in no layout of {_machine(q)}: the smallest of {found.num_legal:,} "
        f"({layout}) needs {least:,.4g} GiB a device, {_gib(least - room)} more than {room_in_words(q)}"
    )
    advice = list(_enough(q, precision))
    return f"{text}; {'; '.join(advice)}" if advice else f"{text}; no larger machine that zoo knows would do"


def _machine(q: Question) -> str:
    n = q.machine.num_devices
    return f"{q.machine.name} ({n} {'device' if n == 1 else 'devices'} of {q.machine.chip.name})"


def _gib(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _no_layout(q: Question) -> str:
    """Something that was given contradicts the number of devices or the batch."""
    n = q.machine.num_devices
    fixed = ", ".join(f"{name} {value}" for name, value in q.fixed.items())
    text = f"layout: no layout of {n:,} devices is legal with global_batch {q.global_batch:,}"
    text += f" and {fixed}" if fixed else ""
    advice = []
    for batch in _multiples(q.global_batch, n):
        if len(families(replace(q, global_batch=batch))["tp"]):
            advice.append(f"global_batch={batch} would do")
            break
    for name in q.fixed:
        rest = {key: value for key, value in q.fixed.items() if key != name}
        if len(families(replace(q, fixed=rest))["tp"]):
            advice.append(f"so would leaving {name} open" if advice else f"leave {name} open")
    fewer = [d for d in divisors(q.global_batch) if d < n]
    if fewer and not advice:
        advice.append(f"hardware.num_devices={fewer[-1]} divides the batch")
    return f"{text}; {', '.join(advice)}" if advice else text


def _multiples(batch: int, n: int) -> Iterator[int]:
    """Batches near the one that was asked for that the devices divide, the nearest first."""
    below = batch // n * n
    yield from (size for size in (below, below + n, n) if size > 0)


def smallest(q: Question, precision: str) -> tuple[float, Layout | None]:
    """The least memory of a device in any layout, and that layout; endless where none is legal."""
    plain = families(q)
    if not len(plain["tp"]):
        return np.inf, None
    least = bounds_of(q, precision, plain).least_memory_gib
    row = int(np.argmin(least))
    return float(least[row]), Layout(**{name: int(plain[name][row]) for name in DEGREES})


def least_gib(q: Question, precision: str) -> float:
    """The least memory of a device in any layout."""
    return smallest(q, precision)[0]


def _enough(q: Question, precision: str) -> Iterator[str]:
    """The nearest changes after which a layout fits, one of each kind."""
    if q.reserve and least_gib(q, precision) <= (q.machine.chip.memory_gib or np.inf):
        yield "reserve=0 would do, with nothing left for the allocator"
    cheaper = {"seq_len": lambda: _shorter(q, precision), "optimizer": lambda: _leaner(q, precision)}
    if (devices := _more_devices(q, precision)) is not None:
        yield f"hardware.num_devices={devices} would do"
    larger = _larger_machines(q, precision)
    if larger:
        yield (
            f"so would {q.machine.num_devices} x {', '.join(larger)}" if devices else f"it fits on {', '.join(larger)}"
        )
    for find in cheaper.values():
        if (advice := find()) is not None:
            yield advice


def _more_devices(q: Question, precision: str) -> int | None:
    """The fewest devices that are enough, doubling."""
    n = q.machine.num_devices * 2
    while n <= MOST_DEVICES:
        machine = q.machine.replace(num_devices=n)
        batch = max(q.global_batch, n) // n * n
        if least_gib(replace(q, machine=machine, global_batch=batch), precision) <= q.room_gib:
            return n
        n *= 2
    return None


def _larger_machines(q: Question, precision: str) -> list[str]:
    """Machines whose devices have more memory, as many of them, on which it fits; the smallest first."""
    found: list[str] = []
    for machine in machines():
        mine = machine.chip
        if (mine.memory_gib or 0.0) <= (q.machine.chip.memory_gib or 0.0) or mine.announced:
            continue
        known = replace(q, machine=machine.replace(num_devices=q.machine.num_devices), engine=None)
        named = f"{machine.name} ({mine.memory_gib:g} GiB)"
        if mine.tflops.bf16 and least_gib(known, _able(machine, precision)) <= known.room_gib:
            found.append(named)
        if len(found) == MOST_MACHINES:
            break
    return found


def _able(machine: object, precision: str) -> str:
    """The precision, or bf16 where the chip of a machine lacks it: memory hardly differs."""
    dtype = engine.PRECISIONS[precision][0]
    return precision if getattr(machine.chip.tflops, dtype) else "bf16"  # type: ignore[attr-defined]


def _shorter(q: Question, precision: str) -> str | None:
    length = q.seq_len // 2
    while length >= 128:
        if least_gib(replace(q, seq_len=length), precision) <= q.room_gib:
            return f"seq_len={length} would fit"
        length //= 2
    return None


def _leaner(q: Question, precision: str) -> str | None:
    for optimizer in ("muon", "sgd"):
        if optimizer != q.optimizer and least_gib(replace(q, optimizer=optimizer), precision) <= q.room_gib:
            return f"optimizer={optimizer} would fit"
    return None

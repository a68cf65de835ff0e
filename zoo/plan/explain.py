"""Why a layout was chosen, in numbers and in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from zoo.plan.estimate import Estimate, estimate
from zoo.plan.layout import Layout
from zoo.plan.question import Question
from zoo.plan.search import Found, Table, priced

GROUPS: dict[str, tuple[str, ...]] = {
    "expert products": ("experts",),
    "other products": ("matmuls", "head"),
    "attention and scans": ("mixing",),
    "memory traffic": ("memory", "accumulate", "optimizer"),
    "waiting for the host": ("host", "fixed"),
    "tensor parallelism": ("tp",),
    "expert parallelism": ("ep",),
    "context parallelism": ("cp",),
    "pipeline": ("pp", "bubble"),
    "data parallelism": ("dp", "shard"),
    "unevenness": ("jitter",),
}
"""The parts of a step's time (`Estimate.time_s`) as a reader thinks of them."""
MOST_GROWTH = 1024
ROOMY = 0.1
"""Of the memory: a plan that leaves less free is told beside the quickest that leaves as much."""
CLEAR_GAIN = 0.02
"""Of the step time: from here on it is worth knowing what stood in the way."""


def grouped(time_s: Mapping[str, float]) -> dict[str, float]:
    """Seconds by `GROUPS`; parts that no group knows come last under their own names."""
    known = {part for parts in GROUPS.values() for part in parts}
    found = {name: sum(time_s.get(part, 0.0) for part in parts) for name, parts in GROUPS.items()}
    return found | {name: value for name, value in time_s.items() if name not in known}


def losses(winner: Estimate, other: Estimate) -> list[tuple[str, float]]:
    """Seconds by which the other takes longer, by group, the largest first; negative where it is ahead."""
    mine, theirs = grouped(winner.time_s), grouped(other.time_s)
    gaps = [(name, theirs.get(name, 0.0) - mine.get(name, 0.0)) for name in {**mine, **theirs}]
    return sorted(gaps, key=lambda gap: -abs(gap[1]))


def described(estimate: Estimate) -> str:
    """A layout with its micro-batch and what it computes again."""
    return _in_words(estimate.layout, estimate.micro_batch, estimate.recompute)


def _in_words(layout: Layout, micro_batch: int, recompute: str) -> str:
    again = "" if recompute == "none" else f", recompute {recompute}"
    return f"{layout}, micro-batch {micro_batch}{again}"


def reasons(winner: Estimate, runner_up: Estimate | None, found: Found) -> list[str]:
    """Sentences: what the step is spent on, what the runner-up loses, and what stood in the way of a quicker one."""
    parts = sorted(grouped(winner.time_s).items(), key=lambda part: -part[1])
    total = winner.step_time_s
    named = [f"{name} {value / total:.0%}" for name, value in parts[:3]]
    lines = [f"the step is spent on {', '.join(named)}"]
    if runner_up is not None:
        gaps = losses(winner, runner_up)
        worse = [f"{name} {gap:+.3g} s" for name, gap in gaps[:3] if abs(gap) > 1e-4 * total]
        later = runner_up.step_time_s / total - 1
        lines.append(f"the runner-up ({described(runner_up)}) takes {later:.1%} longer: {', '.join(worse) or 'evenly'}")
    row = nearest_blocked(found)
    if row is not None:
        gain, short = 1 - found.seconds[row] / total, found.memory_gib[row] - found.question.room_gib
        lines.append(
            f"memory stands in the way of {row_in_words(found, row)}, which would take {gain:.1%} less: it needs "
            f"{found.memory_gib[row]:.4g} GiB, {short:.3g} more than {room_in_words(found.question)}"
        )
    row = roomier(found)
    if row is not None:
        later = found.seconds[row] / total - 1
        lines.append(
            f"{found.memory_gib[0] / (winner.memory_limit_gib or 1):.0%} of the memory is taken; with at least "
            f"{ROOMY:.0%} free, {row_in_words(found, row)} takes {later:.1%} longer"
        )
    return lines


def room_in_words(q: Question) -> str:
    """What a layout may take, and why it is not all there is."""
    if not q.reserve:
        return f"the {q.room_gib:.4g} there are"
    return f"the {q.room_gib:.4g} that a plan may take (all but reserve={q.reserve:g})"


def different(found: Found, number: int) -> list[int]:
    """The best rows that fit, one of each way to divide the model, what is recomputed included.

    Devices that share long sequences instead of working on several short ones are no other way: they cost the same.
    """
    names = ("tp", "pp", "ep", "etp", "shard", "recompute")
    rows: dict[tuple[int, ...], int] = {}
    for row in range(found.num_fitting):
        rows.setdefault(tuple(int(found.table[name][row]) for name in names), row)
        if len(rows) == number:
            break
    return list(rows.values())


def roomier(found: Found) -> int | None:
    """The quickest row that leaves ROOMY of the memory free; None where the first does, or none of them."""
    limit = found.question.machine.chip.memory_gib
    if not limit or found.memory_gib[0] <= (1 - ROOMY) * limit:
        return None
    rows = np.flatnonzero(found.fits & (found.memory_gib <= (1 - ROOMY) * limit))
    return int(rows[0]) if len(rows) else None


def nearest_blocked(found: Found) -> int | None:
    """The row that would clearly win and lacks the least memory; None where memory is in nobody's way."""
    blocked = np.flatnonzero(~found.fits & (found.seconds < (1 - CLEAR_GAIN) * found.seconds[0]))
    return int(blocked[np.argmin(found.memory_gib[blocked])]) if len(blocked) else None


def row_in_words(found: Found, row: int) -> str:
    """As `described`, of a row that was found."""
    return _in_words(found.layout(row), found.micro_batch(row), found.recompute(row))


@dataclass(frozen=True)
class Limit:
    """How far something can grow in the chosen layout until something else runs out."""

    what: str
    factor: float
    """How many times as much there can be; MOST_GROWTH: at least that."""
    ends: str
    """What runs out then."""


def limits(found: Found, row: int, chosen: Estimate) -> list[Limit]:
    """What runs out first, when something grows: the nearest limit comes first."""
    q, table = found.question, {name: column[row : row + 1] for name, column in found.table.items()}
    grown: list[Limit] = []
    if chosen.memory_limit_gib:
        for what in ("seq_len", "micro_batch"):
            factor = _room_for(found, table, what)
            largest = _largest(found, row, what, int(2 * factor))
            ends = f"memory runs out, of which {largest} {_take(largest)} most"
            grown.append(Limit(_words(what, chosen), factor, ends))
    replicas = q.global_batch / (chosen.micro_batch * chosen.layout.dp)
    ends = "every replica has a single micro-batch of the global batch"
    grown.append(Limit(f"{chosen.layout.dp:,} replicas", float(replicas), ends))
    return sorted(grown, key=lambda limit: limit.factor)


def _take(name: str) -> str:
    return "take" if name.endswith("s") else "takes"


def _words(what: str, chosen: Estimate) -> str:
    unit = "tokens" if what == "seq_len" else "sequences"
    return f"{'sequences' if what == 'seq_len' else 'micro-batches'} of {getattr(chosen, what):,} {unit}"


def _grown(q: Question, what: str, factor: int) -> Question:
    """The question with longer sequences, or with as many more sequences as larger micro-batches take."""
    name = "seq_len" if what == "seq_len" else "global_batch"
    return replace(q, **{name: getattr(q, name) * factor})


def _room_for(found: Found, table: Table, what: str) -> float:
    """The largest power of two by which a number can grow before memory runs out."""
    for power in range(1, MOST_GROWTH.bit_length()):
        row = dict(table)
        if what == "micro_batch":
            row["micro_batch"] = row["micro_batch"] * 2**power
        if not priced(_grown(found.question, what, 2**power), found.precision, row)[2][0]:
            return 2.0 ** (power - 1)
    return float(MOST_GROWTH)


def _largest(found: Found, row: int, what: str, factor: int) -> str:
    """The component that takes most of the memory once a number has grown."""
    q = _grown(found.question, what, factor)
    again, micro = found.recompute(row), found.micro_batch(row) * (factor if what == "micro_batch" else 1)
    grown = estimate(
        q.spec,
        q.machine,
        layout=found.layout(row),
        micro_batch=micro,
        recompute=again,
        precision=found.precision,
        **q.estimate_options(),
    )
    return max(grown.memory_gib, key=lambda name: grown.memory_gib[name])


def in_words(limits: Iterable[Limit]) -> list[str]:
    """One sentence for each."""
    lines = []
    for limit in limits:
        most = "at least " if limit.factor >= MOST_GROWTH else ""
        growth = "no room to double" if limit.factor < 2 else f"room for {most}{limit.factor:.4g} times as much"
        lines.append(f"{limit.what}: {growth}; then {limit.ends}")
    return lines


def why_not(found: Found, other: Estimate, winner: Estimate, broken: str = "") -> str:
    """The reason why a layout was not chosen, in one sentence."""
    name = described(other)
    if broken:
        return f"{name}: not legal: {broken}"
    if other.total_memory_gib > found.question.room_gib:
        most = max(other.memory_gib, key=lambda part: other.memory_gib[part])
        return (
            f"{name}: does not fit: it needs {other.total_memory_gib:.4g} GiB, more than "
            f"{room_in_words(found.question)}; {most} {_take(most)} {other.memory_gib[most]:.4g}"
        )
    later = other.step_time_s / winner.step_time_s - 1
    if (other.layout, other.micro_batch, other.recompute) == (winner.layout, winner.micro_batch, winner.recompute):
        return f"{name}: it was chosen"
    gaps = [f"{part} {gap:+.3g} s" for part, gap in losses(winner, other)[:3] if gap]
    return f"{name}: fits, but takes {later:.1%} longer: {', '.join(gaps)}"

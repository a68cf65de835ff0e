"""Where a run goes: its layout, its micro-batch and what it recomputes, chosen by the plan before anything is built.

No torch here. A run that cannot fit is refused with the nearest thing that would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from zoo.plan.layout import Layout
from zoo.plan.question import divisors
from zoo.spec.base import ConfigError
from zoo.spec.run import RunSpec
from zoo.train.refusal import memory_gib, refusal

CLEARLY_FASTER = 1.05
"""Parting a batch changes what its micro-batches see of each other: it has to be this many times as fast unasked."""
RESERVE = 0.05
"""The part of the free memory that is left to everything beside tensors."""


@dataclass(frozen=True)
class Placement:
    """How the work of a step is laid out."""

    layout: Layout
    micro_batch: int
    """Sequences that are worked on at once."""
    num_micro_batches: int
    recompute: str
    """`none` or `layer`."""
    memory_gib: float
    """The predicted peak."""
    step_time_s: float | None
    """Predicted; None where nothing is known of the machine."""
    reasons: tuple[str, ...] = ()
    """One line for each choice that the settings left open."""

    def decided(self) -> dict[str, Any]:
        """What a resumed run takes over, as JSON."""
        number = self.num_micro_batches
        return {"micro_batch": self.micro_batch, "num_micro_batches": number, "recompute": self.recompute}


Seconds = Callable[[int, str], float | None]
"""The predicted time of a step from a micro-batch and what is recomputed."""
Memory = Callable[[int, str], float]
"""The predicted peak in GiB, from the same."""


def place(
    run: RunSpec,
    *,
    compute: str,
    room_gib: float | None,
    seconds: Seconds,
    decided: Mapping[str, Any] | None = None,
) -> Placement:
    """Choose what the settings leave open.

    Args:
        compute: the dtype of matrix products.
        room_gib: memory that is free on the device; None: not known.
        decided: what was chosen when the run was started, if it was before.

    Raises:
        ConfigError: no choice fits into the memory, unless `train.check_memory` is off.
    """
    layout = layout_of(run)

    @cache
    def memory(micro_batch: int, recompute: str) -> float:
        return memory_gib(run, run.model, run.optimizer, micro_batch, recompute, compute)

    room = None if room_gib is None else room_gib * (1 - RESERVE)
    options = _options(run, decided)
    limit = room if run.train.check_memory else None
    found = choose(options, memory, seconds, limit)
    if found is None:
        assert room is not None
        recompute, sizes = list(options.items())[-1]
        raise ConfigError(refusal(run, sizes[-1], recompute, room, compute))
    micro_batch, recompute, reasons = found
    if decided is not None:
        reasons = tuple(_as_started(run, decided))
    number = run.train.batch_size // micro_batch
    peak, time = memory(micro_batch, recompute), seconds(micro_batch, recompute)
    return Placement(layout, micro_batch, number, recompute, peak, time, reasons)


def layout_of(run: RunSpec) -> Layout:
    """The degrees of parallelism of a run. The description has refused all but one device."""
    del run
    return Layout()


def choose(
    options: Mapping[str, list[int]], memory: Memory, seconds: Seconds, room_gib: float | None
) -> tuple[int, str, tuple[str, ...]] | None:
    """A micro-batch, what to recompute, and a reason for each of the two that was open; None where nothing fits.

    The first thing to recompute with which any micro-batch fits is taken, and of those micro-batches the largest,
    unless halving it, once or more, makes the step clearly faster.

    Args:
        options: micro-batches, the largest first, by what is recomputed, in the order of preference.
        room_gib: None: everything fits.
    """
    for recompute, sizes in options.items():
        fitting = [size for size in sizes if room_gib is None or memory(size, recompute) <= room_gib]
        if not fitting:
            continue
        best = fitting[0]
        best_s = seconds(best, recompute) if len(fitting) > 1 else None
        for size in fitting[1:]:
            size_s = seconds(size, recompute)
            if best_s is None or size_s is None or size_s * CLEARLY_FASTER > best_s:
                break
            best, best_s = size, size_s
        return best, recompute, tuple(_reasons(options, recompute, best, fitting, memory, room_gib))
    return None


def _options(run: RunSpec, decided: Mapping[str, Any] | None) -> dict[str, list[int]]:
    train = run.train
    if decided is not None:
        # Several processes may have started it: what stays is how many micro-batches a batch has.
        number = decided.get("num_micro_batches", train.batch_size // decided["micro_batch"])
        return {decided["recompute"]: [train.batch_size // number]}
    sizes = divisors(train.batch_size)[::-1] if train.micro_batch == "auto" else [train.micro_batch]
    return dict.fromkeys(("none", "layer") if train.recompute == "auto" else (train.recompute,), sizes)


def _reasons(
    options: Mapping[str, list[int]],
    recompute: str,
    size: int,
    fitting: list[int],
    memory: Memory,
    room_gib: float | None,
) -> Iterator[str]:
    sizes = options[recompute]
    fits = f"{memory(size, recompute):.3g} GiB" + ("" if room_gib is None else f" of {room_gib:.3g}")
    if len(sizes) > 1:
        if size == sizes[0]:
            why = f"the whole batch takes {fits}, and no part of it is clearly faster"
        elif size == fitting[0]:
            larger = sizes[sizes.index(size) - 1]
            why = f"it takes {fits}; {larger} would take {memory(larger, recompute):.3g}"
        else:
            why = f"it takes {fits}, and larger ones are predicted to be slower"
        yield f"micro-batch {size} of {sizes[0]} sequences: {why}"
    if len(options) > 1:
        if recompute == "none":
            yield "recompute none: all activations fit"
        else:
            needed = memory(sizes[-1], "none")
            yield f"recompute {recompute}: without it a micro-batch of {sizes[-1]} would take {needed:.3g} GiB"


def _as_started(run: RunSpec, decided: Mapping[str, Any]) -> Iterator[str]:
    if run.train.micro_batch == "auto":
        yield f"micro-batch {decided['micro_batch']} of {run.train.batch_size} sequences: as the run was started"
    if run.train.recompute == "auto":
        yield f"recompute {decided['recompute']}: as the run was started"

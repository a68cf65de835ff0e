"""A whole step from the layers that were measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from zoo.dryrun.ledger import Ledger, Segment
from zoo.dryrun.stage import order
from zoo.dryrun.step import Measured

MEASURED = 3
"""Micro-batches that are measured at most: the first, one between, and the last."""


def compose(measured: Measured, places: Sequence[int], num_micro_batches: int, flight: int = 1) -> Ledger:
    """Add up a step.

    Args:
        places: for every layer of the whole model, which of the measured ones stands for it.
        flight: micro-batches that are passed forward before the first is passed back.
    """
    made = Ledger()
    made.hold(measured.base)
    for place in places:
        made.hold(measured.layers[place])
    for number, name in _names(places, num_micro_batches, flight):
        phase = name.split(".")[0]
        segment = measured.steps[name]
        if name == "counts":
            segment = _for_layers(segment, sum(measured.mixtures[place] for place in places), sum(measured.mixtures))
        made.add(segment, number, "backward" if phase == "tail" else phase)
    return made


def _names(places: Sequence[int], num_micro_batches: int, flight: int) -> Iterator[tuple[str, str]]:
    """Every segment of the whole step by its name there, and the name of the measured one."""
    for way, index in order(num_micro_batches, flight):
        micro = min(index, 1) if index < num_micro_batches - 1 else min(num_micro_batches, MEASURED) - 1
        if way == "forward":
            yield f"start of micro-batch {index}", f"start.{micro}"
            for layer, place in enumerate(places):
                yield f"forward pass of layer {layer}, micro-batch {index}", f"forward.{micro}.{place}"
            continue
        yield f"loss of micro-batch {index}", f"loss.{micro}"
        for layer, place in reversed(list(enumerate(places))):
            yield f"backward pass of layer {layer}, micro-batch {index}", f"backward.{micro}.{place}"
        yield f"end of micro-batch {index}", f"tail.{micro}"
    yield from (("clipping", "clip"), ("optimizer", "optimizer"), ("sharing of counts", "counts"))


def _for_layers(segment: Segment, whole: int, measured: int) -> Segment:
    """A segment in which every mixture of experts has an equal part, for another number of them."""
    if not measured:
        return segment
    scaled = Segment(calls=segment.calls)
    for travel, nbytes in segment.sent.items():
        scaled.sent[travel] = nbytes * whole // measured
    return scaled

"""Memory without tensors: what is allocated, kept for the backward pass and freed while a model trains.

A value stands for a tensor and has a size alone. Operations on a tape do what torch's autograd does with memory: a
result is taken, what its backward pass needs is kept, and going back hands gradients from the last operation to the
first while what was kept is let go. A value lives as long as somebody holds it, here as there, so the functions that
describe a block (`Cost.forward`) look like the module's own forward pass and give the same lifetimes.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count

WEIGHTS, GRADIENTS, OPTIMIZER = "weights", "gradients", "optimizer"
ACTIVATIONS, LOGITS, WORKSPACE = "activations", "logits", "workspace"
COMPILED = 4
"""Bytes of the numbers that the compiled kernels work with: fp32."""
KINDS = (WEIGHTS, GRADIENTS, OPTIMIZER, ACTIVATIONS, LOGITS, WORKSPACE)
"""What memory is held for: `activations` are kept for the backward pass, `logits` are what the loss works with, and
`workspace` is all that comes and goes: intermediate results, gradients of activations, temporaries of the optimizer."""


class Storage:
    """Memory that is held as long as the object lives."""

    __slots__ = ("_tape", "kind", "nbytes", "remade")

    def __init__(self, tape: Tape, nbytes: int, kind: str) -> None:
        self._tape, self.nbytes, self.kind = tape, nbytes, kind
        self.remade = False
        tape.change(kind, nbytes)

    def __del__(self) -> None:
        self._tape.change(self.kind, -self.nbytes)

    def hold_for(self, kind: str) -> None:
        """Count it as `kind` from now on. What is kept already stays what it is."""
        if self.kind == WORKSPACE:
            self.become(kind)

    def become(self, kind: str) -> None:
        """Count it as `kind` from now on."""
        self._tape.change(self.kind, -self.nbytes)
        self.kind = kind
        self._tape.change(kind, self.nbytes)


@dataclass(slots=True, eq=False)
class Value:
    """A tensor, or a view of one."""

    storage: Storage
    numel: int
    itemsize: int
    node: Node | None = None
    """What made it; None: no gradient goes through it."""
    place: int = 0
    """Which of the results of `node` it is."""


@dataclass(slots=True, eq=False)
class Node:
    """An operation in the graph of a backward pass."""

    number: int
    inputs: Sequence[tuple[Node, int] | None]
    saved: list[Storage]
    pull: Callable[[list[Value | None]], Sequence[Value | None]]
    """From the gradients of the results to those of the inputs."""
    grads: list[Value | None] = field(default_factory=list)
    """Of the results, as far as they have arrived."""

    def take(self, place: int, grad: Value) -> None:
        """A gradient arrives; a second one is added to the first in place."""
        self.grads.extend([None] * (place + 1 - len(self.grads)))
        if self.grads[place] is None:
            self.grads[place] = grad


class Tape:
    """Counts bytes while a step is told to it.

    Args:
        batch_size: sequences of a micro-batch.
        seq_len: tokens of a sequence.
        itemsize: bytes of a number in the model's dtype.
        frozen: the weights get no gradients; gradients go through all the same.
    """

    def __init__(self, batch_size: int, seq_len: int, itemsize: int = 4, frozen: bool = False) -> None:
        self.batch_size, self.seq_len, self.itemsize, self.frozen = batch_size, seq_len, itemsize, frozen
        self.num_tokens = batch_size * seq_len
        self.phase = ""
        """What the step is doing."""
        self.gradients: list[Storage] = []
        """Of the weights, as far as they are there."""
        self.again = False
        """The weights in use have gradients, or will have by the time that what is recorded now is gone through."""
        self.sparing = True
        """Whether blocks have things made again instead of keeping them (`zoo.blocks.sparing`)."""
        self._recording = True
        self._numbers = count()
        self._memo: dict[object, Value] = {}
        self._live = dict.fromkeys(KINDS, 0)
        self._total = self.peak = 0
        self.at_peak, self.peak_phase = dict(self._live), ""
        self.phase_peaks: dict[str, int] = {}

    def enter(self, phase: str) -> None:
        """Go on to another part of the step."""
        self.phase = phase
        self.phase_peaks[phase] = max(self._total, self.phase_peaks.get(phase, 0))

    def change(self, kind: str, nbytes: int) -> None:
        """Take or give back memory."""
        self._live[kind] += nbytes
        self._total += nbytes
        if self._total > self.phase_peaks.get(self.phase, 0):
            self.phase_peaks[self.phase] = self._total
        if self._total > self.peak:
            self.peak, self.at_peak, self.peak_phase = self._total, dict(self._live), self.phase

    def new(self, numel: float, itemsize: int | None = None, kind: str = WORKSPACE) -> Value:
        """Fresh memory for `numel` numbers; itemsize None: that of the model's dtype."""
        size = self.itemsize if itemsize is None else itemsize
        return Value(Storage(self, int(numel) * size, kind), int(numel), size)

    def like(self, value: Value) -> Value:
        """Fresh memory of the same size."""
        return self.new(value.numel, value.itemsize)

    def once(self, key: object, make: Callable[[], Value]) -> Value:
        """`make()`, once for each `key` until `forget`."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    def forget(self) -> None:
        """The end of a forward pass: what its blocks shared is let go."""
        self._memo.clear()

    def apply(
        self,
        inputs: Sequence[Value],
        numel: float,
        *,
        saves: Iterable[Value] = (),
        saves_result: bool = False,
        keeps: float = 0,
        work: float = 0,
        grad_work: float = 0,
        trains: int = 0,
        itemsize: int | None = None,
    ) -> Value:
        """The result of an operation that gives each of its inputs a gradient of its own.

        Args:
            inputs: what it reads of the values that have gradients.
            numel: size of the result.
            saves: values that it keeps for the backward pass.
            keeps: numbers beyond those that it makes for the backward pass and keeps.
            work: numbers that it holds while it makes the result.
            grad_work: numbers that its backward pass holds beside the gradients.
            trains: how many weights get their gradient from it.
        """
        scratch = self.new(work)
        result = self.new(numel, itemsize)
        del scratch
        saves = list(saves)
        grad_work += sum(value.numel for value in saves if value.storage.remade)
        saved = [*saves, *([result] if saves_result else []), *([self.new(keeps)] if keeps else [])]
        sizes = [(value.numel, value.itemsize) for value in inputs]
        again = self.again

        def pull(grads: list[Value | None]) -> list[Value | None]:
            found: list[Value | None] = [self.new(*size) for size in sizes]
            if trains:
                self.train(trains, again)
            self.new(grad_work)
            return found

        return self.record(result, inputs, saved, pull, trains > 0)

    def record(
        self,
        result: Value,
        inputs: Sequence[Value],
        saved: Iterable[Value],
        pull: Callable[[list[Value | None]], Sequence[Value | None]],
        trains: bool = False,
    ) -> Value:
        """Make `result` the outcome of an operation."""
        if not self._recording or not (trains or any(value.node for value in inputs)):
            return result
        edges = [(value.node, value.place) if value.node else None for value in inputs]
        storages = list({id(value.storage): value.storage for value in saved if not value.storage.remade}.values())
        for storage in storages:
            storage.hold_for(ACTIVATIONS)
        result.node = Node(next(self._numbers), edges, storages, pull)
        return result

    def spare(self, value: Value) -> Value:
        """The same value; operations that keep it have it made again."""
        value.storage.remade = self.sparing and self.itemsize == COMPILED
        return value

    def train(self, numel: int, again: bool) -> None:
        """The gradient of `numel` weights; it is added to the one that they have if it comes `again`."""
        if self.frozen:
            return
        grad = self.new(numel)
        if not again:
            grad.storage.hold_for(GRADIENTS)
            self.gradients.append(grad.storage)

    def add(self, left: Value, right: Value) -> Value:
        """The sum of values of one size: both get the same gradient."""
        result = self.new(left.numel, max(left.itemsize, right.itemsize))
        return self.record(result, [left, right], [], lambda grads: [grads[0], grads[0]])

    def adjoin(self, value: Value, losses: Sequence[Value]) -> Value:
        """The same value, with terms of the objective that the backward pass starts from beside it."""
        if not losses:
            return value
        sizes = [(loss.numel, loss.itemsize) for loss in losses]
        same = Value(value.storage, value.numel, value.itemsize)
        return self.record(same, [value, *losses], [], lambda grads: [grads[0], *(self.new(*size) for size in sizes)])

    def split(self, value: Value, sizes: Sequence[int]) -> list[Value]:
        """Views of parts of a value; their gradients are put together."""

        def pull(grads: list[Value | None]) -> list[Value | None]:
            return [self.new(value_numel, value_itemsize)]

        value_numel, value_itemsize = value.numel, value.itemsize
        whole = self.record(Value(value.storage, value.numel, value.itemsize), [value], [], pull)
        return [Value(value.storage, size, value.itemsize, whole.node, place) for place, size in enumerate(sizes)]

    def spread(self, value: Value, times: int) -> Value:
        """A view that repeats a value; its gradient is a sum."""
        numel, itemsize = value.numel, value.itemsize
        seen = Value(value.storage, numel * times, itemsize)
        return self.record(seen, [value], [], lambda grads: [self.new(numel, itemsize)])

    def join(self, values: Sequence[Value]) -> Value:
        """Values side by side; their gradients are parts of its gradient."""
        result = self.new(sum(value.numel for value in values), max(value.itemsize for value in values))
        sizes = [(value.numel, value.itemsize) for value in values]

        def pull(grads: list[Value | None]) -> list[Value | None]:
            whole = grads[0]
            return [whole and Value(whole.storage, *size) for size in sizes]

        return self.record(result, values, [], pull)

    def recomputed(self, function: Callable[[Value], Value], x: Value) -> Value:
        """function(x), of which only x is kept: the backward pass goes through it a second time first."""
        with self.unrecorded():
            result = function(x)
        again, kept = self.again, [Value(x.storage, x.numel, x.itemsize)]

        def pull(grads: list[Value | None]) -> list[Value | None]:
            start = kept.pop()
            start.node = Node(-1, [], [], lambda grads: [])  # takes the gradient, which goes no further from here
            with self.repeated(again):
                node = function(start).node  # the result itself is not computed again: nothing needs it
            if node is not None:
                self._go_back(node, grads)
            return list(start.node.grads) if start.node else []

        return self.record(result, [x], [x], pull)

    @contextmanager
    def repeated(self, again: bool = True) -> Iterator[None]:
        """Within, the weights in use have gradients by the time that the backward pass comes back here, if `again`."""
        before, self.again = self.again, self.again or again
        try:
            yield
        finally:
            self.again = before

    @contextmanager
    def unrecorded(self) -> Iterator[None]:
        """Within, nothing is kept and nothing has a gradient."""
        before, self._recording = self._recording, False
        try:
            yield
        finally:
            self._recording = before

    def backward(self, loss: Value) -> None:
        """Go back from a scalar."""
        node, loss.node = loss.node, None
        if node is not None:
            self._go_back(node, [self.like(loss)])

    def _go_back(self, end: Node, grads: list[Value | None]) -> None:
        end.grads.extend(grads)
        grads.clear()
        heap = [(-end.number, id(end), end)]
        waiting = {end.number}
        while heap:
            node = heapq.heappop(heap)[2]
            arrived, node.grads = node.grads, []
            found = list(node.pull(arrived))
            arrived.clear()
            node.saved.clear()
            for source in self._hand_on(node, found):
                if source.number not in waiting:
                    waiting.add(source.number)
                    heapq.heappush(heap, (-source.number, id(source), source))

    def _hand_on(self, node: Node, grads: list[Value | None]) -> Iterator[Node]:
        """Give the inputs of `node` their gradients; the operations that they came from."""
        for edge in reversed(node.inputs):
            grad = grads.pop()
            if edge is not None and grad is not None:
                source, place = edge
                source.take(place, grad)
                if source.number >= 0:
                    yield source

"""What goes wrong in a run, each from numbers of its steps: the parts of `zoo.train.watch`. No torch here.

Every detector is a dataclass of plain values, so that a checkpoint can hold it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

SPAN, NEEDED = 5, 3
"""Steps that stand out among so many in a row make a finding."""
MEMORY, LEAST = 64, 20
"""Steps that a new one is held against: at most, and at least."""

Recheck = Callable[[Sequence[int]], list[float]]
"""The losses of the batches of earlier steps, by the present weights."""


@dataclass(frozen=True)
class Signs:
    """What is known of a step before its update."""

    step: int
    """Number of the step, from 1."""
    loss: float
    """Mean cross-entropy, nats per token."""
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    update: float = 0.0
    """Size of the update before this step, relative to the weights (`zoo.train.gauges`); 0: there was none."""
    residuals: Sequence[float] = ()
    """Root mean square of the residual stream after each layer."""
    loads: Mapping[int, Sequence[int]] = field(default_factory=dict)
    """Choices that each expert of each MoE layer received in this step."""


class Finding(NamedTuple):
    """What a detector has found."""

    name: str
    since: int
    """The first step that shows it."""
    message: str


@dataclass
class UpdateWatch:
    """Whether updates have become much larger. It has no alert of its own: it explains that of the loss."""

    sizes: list[float] = field(default_factory=list)

    def observe(self, size: float) -> None:
        if size > 0:
            self.sizes = [*self.sizes, size][-MEMORY:]

    def largest(self) -> float:
        """Of the newest updates."""
        return max(self.sizes[-SPAN:], default=0.0)

    def blown_up(self) -> bool:
        """Five times as large as before, or half as large as the weights themselves."""
        before = self.sizes[:-SPAN]
        return self.largest() > 0.5 or (len(before) >= SPAN and self.largest() > 5 * statistics.median(before))


@dataclass
class LossWatch:
    """The loss against its band, and against where it began.

    Of a step that stands out, the losses of two earlier batches are taken again: when those are as low as they were,
    it is the text that has changed and not the model.
    """

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    """Of these steps, none of which stood out."""
    start: list[float] = field(default_factory=list)
    """The first losses of the run."""
    out: list[int] = field(default_factory=list)
    """Steps that stood out, of the last few."""
    known: bool = False
    """Earlier text was predicted as well as before at the first of these."""

    def observe(self, signs: Signs, updates: UpdateWatch, recheck: Recheck) -> Finding | None:
        step, loss = signs.step, signs.loss
        self.out = [earlier for earlier in self.out if earlier > step - SPAN]
        excess = self._excess(loss)
        if excess and not self.out:
            self.known = self._knows(excess, recheck)
        if excess < 0 and not self.known:  # a model may learn something all at once: that is its new band
            self.steps, self.losses, excess = [], [], 0.0
        if not excess:
            self._keep(step, loss)
            return None
        self.out.append(step)
        return self._finding(signs, updates, excess) if len(self.out) >= NEEDED else None

    def _keep(self, step: int, loss: float) -> None:
        self.steps, self.losses = [*self.steps, step][-MEMORY:], [*self.losses, loss][-MEMORY:]
        if len(self.start) < 3:
            self.start.append(loss)

    def _excess(self, loss: float) -> float:
        """How far above or below its usual value a loss is that leaves its band; 0 inside.

        The band is 5 standard deviations wide, and at least a tenth of the loss; it must fall by half to leave it at
        the lower side. Deviations are those of neighbouring steps, which a trend does not widen. Besides, a loss that
        is well above those of the first steps is never usual.
        """
        if self.start:
            first, known = statistics.median(self.start), len(self.start) == 3
            if loss > (1.15 * first + 0.5 if known else 1.5 * first + 1):
                return loss - first
        if len(self.losses) < LEAST:
            return 0.0
        usual = statistics.median(self.losses[-16:])
        noise = 1.4826 * statistics.median(np.abs(np.diff(self.losses)).tolist()) / math.sqrt(2)
        if loss > usual + max(5 * noise, usual / 10, 0.2) or loss < usual - max(5 * noise, usual / 2, 0.2):
            return loss - usual
        return 0.0

    def _knows(self, excess: float, recheck: Recheck) -> bool:
        """Whether the model predicts the text of the last two usual steps as it did then."""
        if len(self.steps) < 2:
            return False
        rises = np.array(recheck(self.steps[-2:])) - np.array(self.losses[-2:])
        rise = float(rises.mean()) * math.copysign(1, excess)
        return math.isfinite(rise) and bool(rise < 0.3 * abs(excess))

    def _finding(self, signs: Signs, updates: UpdateWatch, excess: float) -> Finding:
        since, usual = self.out[0], signs.loss - excess
        self.steps, self.losses = [], []  # what comes now is held against itself
        what = f"the loss is {signs.loss:.3g} after {usual:.3g}"
        if self.known:
            which = f"the batches of steps {since:,} to {signs.step:,}"
            return Finding("bad_data", since, f"{what}, though earlier text is predicted as before: look at {which}")
        what += ", on text that was learned too"
        if updates.blown_up():
            size = f"an update moved the weights by {updates.largest():.2g} of their size"
            return Finding("lr_blowup", since, f"{what}; {size}; the learning rate is {signs.learning_rate:.2g}")
        return Finding("loss_spike", since, f"{what}; a smaller learning rate or a longer warmup makes that rarer")


@dataclass
class GradientWatch:
    """The length of the gradient against the usual one."""

    norms: list[float] = field(default_factory=list)
    first: float = 0.0
    """Median of the first steps."""
    out: list[int] = field(default_factory=list)

    def observe(self, signs: Signs, clip_norm: float | None) -> Finding | None:
        norm = signs.grad_norm
        self.out = [step for step in self.out if step > signs.step - SPAN]
        if len(self.norms) < LEAST:
            self.norms.append(norm)
            self.first = statistics.median(self.norms)
            return None
        usual = statistics.median(self.norms[-32:])
        if norm <= max(10 * usual, self.first, clip_norm or 0.0):
            self.norms = [*self.norms, norm][-MEMORY:]
            return None
        self.out.append(signs.step)
        if len(self.out) < NEEDED:
            return None
        since, self.norms, self.out = self.out[0], [], []
        message = f"the gradient is {norm:.3g} long, {norm / usual:.3g} times as long as usual"
        return Finding("gradient_explosion", since, message)


@dataclass
class ResidualWatch:
    """What each layer leaves in the residual stream, against what it left before.

    In a young model it grows fast, but as a power of the steps: from the 60th on, fivefold within 20 steps is not
    healthy (healthy runs stay below twofold), and at any time twentyfold within 5 is not.
    """

    history: list[list[float]] = field(default_factory=list)
    """For each step, root mean squares by layer."""
    out: int = 0
    """Steps in a row that stood out."""

    def observe(self, signs: Signs) -> Finding | None:
        now = list(signs.residuals)
        if not now or not all(map(math.isfinite, now)):
            return None
        if self.history and len(self.history[0]) != len(now):
            self.history = []
        found = self._grown(now, lag=5, factor=20, least=10)
        lag = 5 if found else 20
        found = found or self._grown(now, lag, factor=5, least=60)
        self.out = self.out + 1 if found else 0
        self.history = [*self.history, now][-60:]
        if found is None or self.out < 2:
            return None
        self.history, self.out = [], 0
        return Finding("residual_growth", signs.step - lag, found)

    def _grown(self, now: list[float], lag: int, factor: float, least: int) -> str | None:
        """The first layer of which that is true, in words."""
        if len(self.history) < least:
            return None
        before = np.array(self.history[: len(self.history) - lag + 1]).max(0)
        grown = np.flatnonzero(np.array(now) > factor * np.maximum(before, 1e-6))
        if not len(grown):
            return None
        layer = int(grown[0])
        times = now[layer] / max(before[layer], 1e-6)
        return (
            f"layer {layer} leaves {times:.3g} times as much in the residual stream as {lag} steps before "
            f"(root mean square {now[layer]:.3g})"
        )


@dataclass
class RoutingWatch:
    """How even the load of the experts is, over some 5 steps."""

    loads: dict[str, list[float]] = field(default_factory=dict)
    """By layer: the choices of each expert, those of a step before counting 0.8 times as much."""
    out: dict[str, int] = field(default_factory=dict)
    """Steps in a row in which a layer was found collapsed."""
    age: int = 0

    def observe(self, signs: Signs, top_k: Mapping[int, int]) -> Finding | None:
        self.age += 1
        finding = None
        for layer, counts in signs.loads.items():
            key, now = str(layer), np.array(counts, float)
            load = 0.8 * np.array(self.loads.get(key, [0.0] * len(now))) + now
            self.loads[key] = load.tolist()
            flaw = self._flaw(load, top_k[layer])
            self.out[key] = self.out.get(key, 0) + 1 if flaw else 0
            if flaw and self.out[key] >= SPAN and finding is None:
                finding = Finding("router_collapse", signs.step - SPAN + 1, f"layer {layer}: {flaw}")
        return finding

    def _flaw(self, load: np.ndarray[Any, np.dtype[np.float64]], top_k: int) -> str:
        """What is wrong with a load [e], empty when it is fair: judged by 20 choices an expert or more."""
        num_experts, mean = len(load), float(load.mean())
        if top_k >= num_experts or mean < 20:
            return ""
        share = load[load > 0] / load.sum()
        entropy = -float((share * np.log(share)).sum())
        even, collapsed = math.log(num_experts), math.log(top_k)
        degree = (even - entropy) / (even - collapsed)
        """0 when even, 1 when all tokens go to the same experts."""
        num_dead = int((load < 0.01 * mean).sum())
        allowed = 0.9 if self.age < 50 else 0.6  # a new router is uneven for a while
        if degree <= allowed and num_dead * 2 < num_experts:
            return ""
        return (
            f"entropy {entropy / even:.2f}, MaxVio {load.max() / mean - 1:.2f}, "
            f"{num_dead} of {num_experts} experts without tokens"
        )

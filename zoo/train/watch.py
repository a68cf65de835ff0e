"""A watch on a run: tells when it goes wrong, by name, early, and stays quiet while it goes well. No torch here.

Each step is held against the steps before it. One step that stands out is noise; an alert needs several close together,
and says what they have in common. The names:

- `nonfinite`: a loss, a gradient or a weight is no number;
- `bad_data`: the loss leaves its band, while the text just before is predicted as well as ever;
- `lr_blowup`: it rises on known text too, after updates that moved the weights much further than before;
- `loss_spike`: it rises on known text too, after updates of the usual size;
- `gradient_explosion`: gradients are an order of magnitude longer than usual, and longer than they are clipped to;
- `residual_growth`: a layer leaves much more in the residual stream than 20 steps before;
- `router_collapse`: a layer sends nearly all tokens to the same few experts, or half of its experts get none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from zoo.spec.watch import WatchSpec
from zoo.train.detectors import (
    Finding,
    GradientWatch,
    LossWatch,
    Recheck,
    ResidualWatch,
    RoutingWatch,
    Signs,
    UpdateWatch,
)
from zoo.train.errors import TrainingError
from zoo.train.events import Alerted

QUIET = 100
"""Steps after an alert before one of the same name is told again."""
AFTERMATH = 50
"""Steps after an alert in which a checkpoint is not held to be good."""
SKIPPED_AMONG = 100
"""Steps that `WatchSpec.max_skipped` speaks of."""


class Watch:
    """The detectors of one run, and what they have told.

    Args:
        clip_norm: Gradients are clipped to this length; None: not at all.
        top_k: Choices of a token, by the index of the MoE layer.
    """

    def __init__(self, spec: WatchSpec, clip_norm: float | None, top_k: Mapping[int, int]) -> None:
        self.spec = spec
        self._clip_norm = clip_norm
        self._top_k = top_k
        self._skipped: list[int] = []
        """Steps, of the last `SKIPPED_AMONG`."""
        self._told: dict[str, int] = {}
        """The last step of each name."""
        self._loss, self._gradient, self._updates = LossWatch(), GradientWatch(), UpdateWatch()
        self._residuals, self._routing = ResidualWatch(), RoutingWatch()

    def observe(self, signs: Signs, recheck: Recheck) -> list[Alerted]:
        """Look at a step whose numbers are finite, before its update; what there is to tell."""
        if not self.spec.alerts:
            return []
        self._updates.observe(signs.update)
        loss = self._loss.observe(signs, self._updates, recheck)
        gradient = self._gradient.observe(signs, self._clip_norm)
        if self._loss.out and self._loss.known:  # strange text has long gradients: it is called by one name
            gradient = None
        found = [loss, gradient, self._residuals.observe(signs), self._routing.observe(signs, self._top_k)]
        return [alert for finding in found if finding for alert in self._tell(signs.step, finding)]

    def skipped(self, step: int, why: str, update: float = 0.0) -> list[Alerted]:
        """Note that a step was skipped because `why`; what there is to tell. `update` is the one before it.

        Raises:
            TrainingError: so many were skipped that the run makes no sense.
        """
        self._skipped = [*(earlier for earlier in self._skipped if earlier > step - SKIPPED_AMONG), step]
        count = len(self._skipped)
        if count > self.spec.max_skipped:
            among = f"{count} of the last {SKIPPED_AMONG} steps were skipped" if count > 1 else "the step was not taken"
            raise TrainingError(
                f"step {step}: {why}; {among}, train.watch.max_skipped allows {self.spec.max_skipped}; "
                "try a smaller optimizer.lr, a longer schedule.warmup or precision=fp32"
            )
        self._updates.observe(update)
        told = self._tell(step, Finding("nonfinite", step, f"{why}; the step is skipped"))
        if self.spec.alerts and self._updates.blown_up():
            size = f"an update moved the weights by {self._updates.largest():.2g} of their size"
            told += self._tell(step, Finding("lr_blowup", step, f"{why} after {size}: the learning rate is too large"))
        return told

    def calm(self, step: int) -> bool:
        """Whether nothing was told of late, and nothing is about to be: the weights are worth going back to."""
        return not self._loss.out and all(step - told > AFTERMATH for told in self._told.values())

    def state(self) -> dict[str, Any]:
        """Everything that it remembers, as JSON."""
        parts = {name: asdict(part) for name, part in self._parts().items()}
        return {"skipped": self._skipped, "told": self._told, **parts}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Remember what a checkpoint says."""
        self._skipped, self._told = list(state["skipped"]), dict(state["told"])
        for name, part in self._parts().items():
            setattr(self, f"_{name}", type(part)(**state[name]))

    def _parts(self) -> dict[str, Any]:
        return {name: getattr(self, f"_{name}") for name in ("loss", "gradient", "updates", "residuals", "routing")}

    def _tell(self, step: int, finding: Finding) -> list[Alerted]:
        last = self._told.get(finding.name)
        if last is not None and step - last < QUIET:
            return []
        self._told[finding.name] = step
        return [Alerted(step, finding.name, finding.message, finding.since)]

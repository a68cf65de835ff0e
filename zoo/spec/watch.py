"""The watch on a run: what becomes of steps that go wrong."""

from __future__ import annotations

from pydantic import NonNegativeInt

from zoo.spec.base import Spec


class WatchSpec(Spec):
    """A step whose loss or gradient is no number is never taken: it is skipped, counted and told.

    Alerts have names: `nonfinite`, `loss_spike`, `lr_blowup`, `gradient_explosion`, `residual_growth`,
    `router_collapse`, `bad_data` (`zoo.train.watch`), `write_failed`, `no_rollback` (`zoo.train.loop`).
    """

    alerts: bool = True
    """Watch loss, gradient, updates, residual stream and routing. False: only steps that are skipped are told."""
    max_skipped: NonNegativeInt = 10
    """Steps that may be skipped among 100; one more ends the run."""
    rollbacks: NonNegativeInt = 0
    """How often the run may go back to its last good checkpoint after an alert, and on with the text that follows."""

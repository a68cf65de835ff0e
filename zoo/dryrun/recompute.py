"""What of a model is computed again in a rehearsal."""

from __future__ import annotations

from zoo.plan.layout import recompute_parts
from zoo.spec.base import ConfigError

POSSIBLE = ("none", "full", "selective:act")


def recomputed(recompute: str) -> set[str]:
    """The parts of the planner's setting, all of which can be rehearsed.

    Raises:
        ConfigError: one of them cannot.
    """
    parts = set(recompute_parts(recompute))
    if others := parts - {"full", "act"}:
        rule = f"a rehearsal cannot compute {', '.join(sorted(others))} again; allowed: {', '.join(POSSIBLE)}"
        raise ConfigError(f"recompute: found {recompute!r}; {rule}")
    return parts

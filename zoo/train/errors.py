"""The error of a run that cannot go on."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """Training stopped by itself. The message says at which step, why, and what to try."""

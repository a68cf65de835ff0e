"""`zoo train`: the same as `python train.py`."""

from __future__ import annotations

from collections.abc import Sequence

from zoo.train.run import main


def run(arguments: Sequence[str]) -> None:
    """Train, and end the process."""
    main(arguments, program="zoo train")

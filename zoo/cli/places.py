"""Where a verb that runs a model finds it, and where it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from zoo import list_models
from zoo.spec.base import ConfigError, near
from zoo.train.rundir import find_checkpoints

Device = Literal["auto", "cpu", "cuda", "mps"]


def checkpoint_place(word: str) -> Path:
    """The checkpoint that was asked for: a path, or the newest run of a model."""
    path = Path(word).expanduser()
    if path.exists():
        return path
    models = list_models()
    if word not in models:
        advice = near(word, models) or "download a model of the hub first (hf download), or train one (zoo train)"
        raise ConfigError(f"PATH: found {word!r}; there is no such file or directory, and no such model; {advice}")
    outputs = Path("outputs")
    for checkpoints in sorted(outputs.glob("*/*/checkpoints"), key=lambda found: found.stat().st_mtime, reverse=True):
        complete, _ = find_checkpoints(checkpoints.parent)
        if complete and complete[-1].state()["settings"]["model"].get("name") == word:
            return complete[-1].path
    raise ConfigError(f"PATH: found {word!r}; no run of this model below outputs/; train one: zoo train model={word}")


def device_for(torch: Any, wanted: Device) -> str:
    """The device that is meant; a mistake when torch does not see it."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    found = next(name for name, usable in there.items() if usable) if wanted == "auto" else wanted
    if not there[found]:
        raise ConfigError(
            f"device: found {wanted!r}; torch {torch.__version__} sees no such device here; use device=auto"
        )
    return found

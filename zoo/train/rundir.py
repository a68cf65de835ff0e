"""What lies in a run directory: settings, versions, checkpoints. No torch here.

A checkpoint is a directory `checkpoints/step_000200/` with tensors in safetensors files and everything else in
`state.json`, which lists the other files with their sizes: what does not match was not written to the end.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.spec.base import ConfigError

FORMAT = 1
STATE = "state.json"

FIXED = (
    "model",
    "optimizer",
    "precision",
    "tokenizer",
    "train.batch_size",
    "train.micro_batch",
    "train.seq_len",
    "train.seed",
)
"""Settings that a resumed run cannot change: without them the checkpoint or the order of the batches means nothing."""
FREE = (
    "checkpoint",
    "logger",
    "model.name",
    "model.card",
    "train.check_memory",
    "train.eval_every",
    "train.eval_tokens",
    "train.log_every",
    "train.sample_prompt",
    "train.sample_tokens",
    "train.sample_temperature",
)
"""Settings that do not touch what is learned."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    step: int
    """Optimizer steps done."""

    def state(self) -> dict[str, Any]:
        """Everything in it that is no tensor."""
        state: dict[str, Any] = json.loads((self.path / STATE).read_text(encoding="utf-8"))
        return state


def checkpoint_dir(run_dir: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lives."""
    return run_dir / "checkpoints" / f"step_{step:06d}"


def find_checkpoints(run_dir: Path) -> tuple[list[Checkpoint], list[str]]:
    """The complete checkpoints of a run, oldest first, and a note for each one that was passed over."""
    found, notes = [], []
    for path in (run_dir / "checkpoints").glob("step_*"):
        flaw = _flaw(path)
        if flaw:
            notes.append(f"passed over the checkpoint {path.name}: {flaw}")
        else:
            found.append(Checkpoint(path, int(path.name.removeprefix("step_"))))
    return sorted(found, key=lambda checkpoint: checkpoint.step), sorted(notes)


def newest_checkpoint(run_dir: Path) -> Checkpoint:
    """The checkpoint to resume from.

    Raises:
        ConfigError: there is none.
    """
    checkpoints, notes = find_checkpoints(run_dir)
    if not checkpoints:
        what = "; ".join(notes) or "name the directory of a run, the one that holds checkpoints/"
        raise ConfigError(f"checkpoint.resume: found '{run_dir}'; there is no checkpoint to go on from; {what}")
    return checkpoints[-1]


def _flaw(path: Path) -> str:
    """What is wrong with a checkpoint; empty when it is complete."""
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        sizes = {name: (path / name).stat().st_size for name in state["files"]}
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{STATE} cannot be read ({error})"
    if state.get("format") != FORMAT:
        return f"its format is {state.get('format')}, this version of zoo reads {FORMAT}"
    if path.name != checkpoint_dir(Path(), state.get("step", -1)).name:
        return f"{STATE} says step {state.get('step')}"
    wrong = [name for name, size in state["files"].items() if sizes[name] != size]
    return f"{wrong[0]} has {sizes[wrong[0]]} bytes instead of {state['files'][wrong[0]]}" if wrong else ""


def find_run(root: Path, settings: Mapping[str, Any]) -> Path | None:
    """The newest run below `root` that has a checkpoint, is not finished and has the same `settings`."""
    runs = [path.parent for path in root.glob("*/*/checkpoints")]
    for run_dir in sorted(runs, key=lambda path: path.stat().st_mtime, reverse=True):
        checkpoints, _ = find_checkpoints(run_dir)
        if not checkpoints or checkpoints[-1].step >= settings["train"]["steps"]:
            continue
        saved = checkpoints[-1].state()["settings"]
        if not any(differences(saved, settings)):
            return run_dir
    return None


def check_resumable(checkpoint: Checkpoint, settings: Mapping[str, Any], corpus_sha256: str | None = None) -> list[str]:
    """Notes on the settings that have changed since a checkpoint was saved.

    Args:
        settings: Those of the run that is to go on.
        corpus_sha256: Of its text, once that is loaded.

    Raises:
        ConfigError: a run with these settings cannot go on from it.
    """
    state = checkpoint.state()
    fixed, changed = differences(state["settings"], settings)
    if corpus_sha256 and state["corpus_sha256"] != corpus_sha256:
        fixed.append(f"data: the text has changed (sha256 was {state['corpus_sha256'][:12]}, now {corpus_sha256[:12]})")
    if fixed:
        listed = "".join(f"\n  {line}" for line in fixed)
        raise ConfigError(
            f"checkpoint.resume: found {checkpoint.path}; it was saved with other settings; "
            f"give those again, or start a new run with checkpoint.resume=never{listed}"
        )
    return [f"changed since the checkpoint: {line}" for line in changed]


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Compare the settings of a checkpoint with those of a run.

    Returns:
        Lines `key: was X, now Y` for the keys that a resumed run cannot change, then for those that it can.
    """
    before, after = dict(_flat(saved)), dict(_flat(now))
    fixed: list[str] = []
    changed: list[str] = []
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) == after.get(key) or _under(key, FREE):
            continue
        line = f"{key}: was {before.get(key, 'absent')}, now {after.get(key, 'absent')}"
        (fixed if _under(key, FIXED) else changed).append(line)
    return fixed, changed


def _under(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(prefix + ".") for prefix in prefixes)


def _flat(settings: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value

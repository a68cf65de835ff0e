"""What lies in a run directory: settings, versions, checkpoints. No torch here.

A checkpoint is a directory `checkpoints/step_000200/` with tensors in safetensors files and everything else in
`state.json`, which lists the other files with their sizes and CRC-32 sums, and sums up itself. What does not match the
sizes was not written to the end, and is never opened; what does not match the sums has changed since, and is set aside
when a run goes on.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.spec.base import ConfigError

FORMAT = 1
STATE = "state.json"
TENSORS = "tensors.json"
"""The index of a checkpoint that several processes have written (`zoo.parallel.storage`)."""
PROVEN = 30
"""Steps after which a checkpoint counts as good: what was wrong with it would have shown."""
_READ_AT_ONCE = 1 << 20

FIXED = (
    "model",
    "optimizer",
    "precision",
    "tokenizer",
    "finetune",
    "train.batch_size",
    "train.micro_batch",
    "train.seq_len",
    "train.packing",
    "train.batch_warmup",
    "train.batch_start",
    "train.ema",
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
    "train.watch",
    "train.noise_scale",
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


def partial_dir(run_dir: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps is written before it is whole; what was left there is removed."""
    folder = run_dir / "checkpoints"
    for leftover in folder.glob(".step_*"):
        shutil.rmtree(leftover)
    return folder / f".{checkpoint_dir(run_dir, step).name}.partial"


def seal(folder: Path, step: int, state: Mapping[str, Any], sums: Mapping[str, int] | None = None) -> None:
    """Add `state.json` to the files of a checkpoint, and wait until all of it is on disk.

    Args:
        state: JSON values.
        sums: CRC-32 of files, as far as they are known; others are read for theirs.
    """
    known = sums or {}
    paths = sorted(folder.iterdir())
    sizes = {path.name: path.stat().st_size for path in paths}
    crcs = {path.name: known[path.name] if path.name in known else _sum_of(path) for path in paths}
    content = {"format": FORMAT, "step": step, **state, "files": sizes, "crc32": crcs}
    text = json.dumps({**content, "seal": _seal_of(content)}, indent=1)
    (folder / STATE).write_text(text, encoding="utf-8")
    for path in (*folder.iterdir(), folder):
        flush(path)


def publish(run_dir: Path, step: int, keep: int) -> None:
    """Give a checkpoint that is whole its name, then remove old ones.

    The newest `keep` stay; when these are all younger, so does the newest good one that is `PROVEN` steps old, and the
    one that will be that next.
    """
    final = checkpoint_dir(run_dir, step)
    partial = final.with_name(f".{final.name}.partial")
    if final.exists():  # the same step was trained again, from an older checkpoint
        remove(final)
    partial.rename(final)
    flush(final.parent)
    checkpoints, _ = find_checkpoints(run_dir)
    good = [each for each in checkpoints if each.state().get("good", True)]
    proven = [each for each in good if each.step <= step - PROVEN]
    kept = [*checkpoints[-keep:], *proven[-1:]]
    if not any(each in proven for each in checkpoints[-keep:]):
        kept += good[len(proven) : len(proven) + 1]
    for old in checkpoints:
        if old not in kept:
            remove(old.path)


def remove(path: Path) -> None:
    """Remove a checkpoint: from the first moment on, nothing takes what is left of it for one."""
    doomed = path.with_name(f".{path.name}.removed")
    path.rename(doomed)
    shutil.rmtree(doomed)


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


def sound_checkpoint(run_dir: Path) -> tuple[Checkpoint, list[str]]:
    """The newest checkpoint whose files are as they were written, and a note for each one that was passed over.

    Newer ones that have changed are set aside, under a name that says so.

    Raises:
        ConfigError: there is none.
    """
    checkpoints, notes = find_checkpoints(run_dir)
    damaged: list[Path] = []
    for checkpoint in reversed(checkpoints):
        changed = [name for name, crc in checkpoint.state().get("crc32", {}).items() if _changed(checkpoint, name, crc)]
        if not changed:
            for path in damaged:
                aside = path.with_name(f"damaged_{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
            return checkpoint, notes
        damaged.append(checkpoint.path)
        notes.append(f"passed over the checkpoint {checkpoint.path.name}: {changed[0]} has changed")
    what = "; ".join(notes) or "name the directory of a run, the one that holds checkpoints/"
    raise ConfigError(f"checkpoint.resume: found '{run_dir}'; there is no sound checkpoint to go on from; {what}")


def good_checkpoint(run_dir: Path, before: int) -> Checkpoint | None:
    """The newest sound checkpoint of fewer than `before` steps that was good when it was written."""
    for checkpoint in reversed(find_checkpoints(run_dir)[0]):
        state = checkpoint.state()
        if checkpoint.step >= before or not state.get("good", True):
            continue
        if not any(_changed(checkpoint, name, crc) for name, crc in state.get("crc32", {}).items()):
            return checkpoint
    return None


def remove_after(run_dir: Path, step: int) -> None:
    """Remove the checkpoints of more than `step` steps."""
    for checkpoint in find_checkpoints(run_dir)[0]:
        if checkpoint.step > step:
            remove(checkpoint.path)


def _changed(checkpoint: Checkpoint, name: str, crc: int) -> bool:
    try:
        return _sum_of(checkpoint.path / name) != crc
    except OSError:  # gone, or on a part of the disk that cannot be read any more
        return True


def _sum_of(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while part := file.read(_READ_AT_ONCE):
            crc = zlib.crc32(part, crc)
    return crc


def _seal_of(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content).encode())


def flush(path: Path) -> None:
    """Wait until a file, or the entries of a directory, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    if "seal" in state and state.pop("seal") != _seal_of(state):
        return f"{STATE} has changed"
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
    before, after = dict(flat(saved)), dict(flat(now))
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


def flat(settings: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings by dotted path."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value

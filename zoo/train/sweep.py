"""A sweep: its jobs before any of them starts, and what each of them has come to.

The directory of a sweep follows from its jobs, so the same command finds what it did before: finished jobs are not run
again, others go on from their last checkpoint. Several processes may work on one sweep; each takes jobs that no other
is at.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.spec.base import ConfigError
from zoo.train.metrics_file import METRICS, read_metrics
from zoo.train.rundir import differences

SWEEPS = Path("outputs/sweeps")
LOCK, FAILURE = "lock", "failed.txt"
MULTIRUN_FLAGS = frozenset({"-m", "--multirun"})


def is_sweep(arguments: Sequence[str]) -> bool:
    """Whether a command line asks for several jobs: by flag, by mode, or by one of the ready sweeps."""
    named = any(word.startswith("sweep=") and word != "sweep=null" for word in arguments)
    return named or "hydra.mode=MULTIRUN" in arguments or bool(MULTIRUN_FLAGS & {*arguments})


@dataclass(frozen=True)
class Sweep:
    """What a command line asks for."""

    jobs: list[list[str]]
    """The overrides of each job."""
    overrides: list[str]
    """What makes Hydra's sweeper make the same jobs."""
    complete: bool
    """Whether the jobs are all. A sweeper that chooses its jobs as it goes leaves the one without what is swept."""


def sweep_of(overrides: Sequence[str]) -> Sweep:
    """The jobs that Hydra's basic sweeper makes of `overrides` and of the ready sweep that they name.

    A key that is given counts more than the same key in `hydra.sweeper.params`, where Hydra would take the product.

    Raises:
        ConfigError: the overrides cannot be read or name options that do not exist.
    """
    from hydra import compose, initialize_config_module
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from zoo.config import explained

    fixed: list[str] = []
    with initialize_config_module("zoo.conf", version_base="1.3"), explained("config", fixed):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        parsed = parser.parse_overrides(list(overrides))
        fixed += [override.input_line or "" for override in parsed if not override.is_sweep_override()]
        sweeper = compose("config", fixed, return_hydra_config=True).hydra.sweeper
        if not sweeper._target_.endswith(".BasicSweeper"):
            return Sweep([fixed], list(overrides), complete=False)
        given = {override.get_key_element() for override in parsed}
        params = [f"{key}={value}" for key, value in (sweeper.params or {}).items() if key not in given]
        words = [*params, *overrides]
        (jobs,) = BasicSweeper.split_arguments(parser.parse_overrides(words), None)
    kept = [[word for word in job if not word.startswith(("hydra.", "hydra/"))] for job in jobs]
    return Sweep(kept, [*words, "hydra.sweeper.params=null"], complete=True)


def sweep_dir(jobs: Sequence[Sequence[str]], overrides: Sequence[str]) -> Path:
    """Where the runs of these jobs live: the same jobs, the same place."""
    names = [word.removeprefix("sweep=") for word in overrides if word.startswith("sweep=")]
    digest = hashlib.sha256(json.dumps([list(job) for job in jobs]).encode()).hexdigest()
    return SWEEPS / f"{names[-1] if names else 'sweep'}-{digest[:8]}"


@contextmanager
def claimed(run_dir: Path) -> Iterator[bool]:
    """Whether this process alone works in `run_dir` now. The claim ends with the block, or with the process."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def result_of(run_dir: Path, settings: Mapping[str, Any]) -> float | None:
    """Held-out bits per byte of a job that is done; None: it is not.

    Raises:
        ConfigError: the directory holds a run of other settings.
    """
    if not (run_dir / METRICS).is_file():
        return None
    fixed, changed = differences(saved_settings(run_dir), settings)
    if fixed or changed:
        listed = "".join(f"\n  {line}" for line in [*fixed, *changed])
        raise ConfigError(
            f"hydra.sweep.dir: {run_dir} holds a run of other settings; name another directory for this sweep{listed}"
        )
    return finished_at(read_metrics(run_dir / METRICS), settings["train"]["steps"])


def finished_at(records: Sequence[Mapping[str, Any]], num_steps: int) -> float | None:
    """Held-out bits per byte at the end of a run, by its metrics; None: it has not ended."""
    last = records[-1] if records else {}
    done = last.get("event") == "finished" and last.get("reason") == "done" and last["step"] >= num_steps
    evaluation = last.get("last_eval")
    bits = evaluation.get("bits_per_byte") if done and isinstance(evaluation, dict) else None
    return bits if isinstance(bits, float) else None


def saved_settings(run_dir: Path) -> dict[str, Any]:
    """The settings that a run was started with."""
    from omegaconf import OmegaConf

    from zoo.train.provenance import CONFIG

    path = run_dir / CONFIG
    try:
        settings = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # yaml has many kinds
        raise ConfigError(f"{path}: cannot be read ({' '.join(str(error).split())}); remove that run") from None
    return {str(key): value for key, value in settings.items()} if isinstance(settings, dict) else {}


def missing(folder: Path) -> dict[str, str]:
    """The jobs of a sweep that are not done, by number, with what is known of each."""
    found = {}
    for run_dir in sorted(folder.glob("[0-9]*"), key=lambda path: (len(path.name), path.name)):
        records = read_metrics(run_dir / METRICS) if (run_dir / METRICS).is_file() else []
        steps = next((record.get("num_steps") for record in reversed(records) if record["event"] == "started"), 1)
        steps = steps if isinstance(steps, int) else 1
        if finished_at(records, steps) is None:
            failure = run_dir / FAILURE
            state = f"at step {records[-1]['step']} of {steps}" if records else "not begun"
            found[run_dir.name] = failure.read_text(encoding="utf-8").strip() if failure.is_file() else state
    return found

"""From a command line to a finished run. Torch is imported only when everything about the run is known to be sound.

Exit statuses: 0 done; 1 training failed; 2 a mistake in the settings; 130 and 143 stopped by SIGINT and SIGTERM, with a
checkpoint saved.
"""

from __future__ import annotations

import gc
import os
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from zoo.config import opened
from zoo.registry import take_config_dirs
from zoo.spec.base import ConfigError
from zoo.train.errors import TrainingError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from zoo.spec.run import RunSpec
    from zoo.train.events import RunFinished
    from zoo.train.signals import StopSignal

OUTPUTS = Path("outputs")
"""Where runs go unless hydra.run.dir says otherwise."""
FAILED, MISTAKE = 1, 2


def main(arguments: Sequence[str], program: str) -> NoReturn:
    """Check the whole command line, then hand it to Hydra. Ends the process.

    Args:
        arguments: Hydra's overrides and flags.
        program: What the person typed before them.
    """
    _wait_asleep()
    gc.disable()  # until the run starts: a tenth of the time that checking its settings takes
    try:
        sys.argv = [program, *checked(take_config_dirs(arguments))]
    except ConfigError as error:
        _leave(MISTAKE, str(error))
    import hydra

    try:
        hydra.main(config_path="pkg://zoo.conf", config_name="config", version_base="1.3")(run_job)()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of --help or --cfg has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)


def _wait_asleep() -> None:
    """Have idle threads of the processor sleep soon instead of spinning, unless the environment says how they wait.

    Set before torch is imported. Beside other work on the same cores it made a step of `tiny_moe` 3 to 6 times as fast
    (2 cores, load 3 to 5).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def checked(arguments: Sequence[str]) -> list[str]:
    """Compose and decode every job that `arguments` ask for, before the first one starts.

    Returns:
        The arguments, with `hydra.run.dir` set when another run is to be continued.

    Raises:
        ConfigError: a mistake in one of the jobs.
    """
    flags = {argument for argument in arguments if argument.startswith("-")}
    if flags - {"-m", "--multirun"}:  # help, completion, showing the configuration: nothing is going to run
        return list(arguments)
    overrides = [argument for argument in arguments if argument not in flags]
    if flags or "hydra.mode=MULTIRUN" in overrides:
        _check_jobs(overrides)
        return [*flags, *opened(overrides)]
    run_dir = _check_job(overrides)
    overrides = opened(overrides)
    return [*overrides, f"hydra.run.dir={_quoted(run_dir)}"] if run_dir else overrides


def run_job(cfg: DictConfig) -> float | None:
    """One job of Hydra: train, and end the process unless all went well.

    Returns:
        Held-out bits per byte at the end: what a sweeper minimises.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from zoo.spec.run import decode_run
    from zoo.train.signals import StopSignal

    gc.enable()
    hydra_config = HydraConfig.get()
    run_dir, stop = Path(hydra_config.runtime.output_dir), StopSignal()
    if hydra_config.mode == RunMode.MULTIRUN:
        print(f"\njob {hydra_config.job.num}: {' '.join(hydra_config.overrides.task)}")
    try:
        run = decode_run(cfg, hydra_config.runtime.choices.get("model"))
        finished = _train(run, run_dir, stop)
    except ConfigError as error:
        _leave(MISTAKE, str(error))
    except TrainingError as error:
        _leave(FAILED, str(error))
    except KeyboardInterrupt:
        _leave(128 + signal.SIGINT, "stopped at once; what came after the last checkpoint is lost")
    if finished.reason == "interrupted":
        given = [override.removeprefix("++") for override in hydra_config.overrides.task]
        kept = [override for override in given if not override.startswith("checkpoint.resume=")]
        command = shlex.join([*sys.argv[0].split(), *kept, f"checkpoint.resume={_quoted(run_dir)}"])
        _leave(128 + stop.number, f"go on with: {command}")
    if stop.requested and hydra_config.mode == RunMode.MULTIRUN:
        _leave(128 + stop.number, "stopped after this job, which is done")
    return finished.last_eval.bits_per_byte if finished.last_eval else None


def _train(run: RunSpec, run_dir: Path, stop: StopSignal) -> RunFinished:
    from zoo.train.reporters import make_reporters

    with ExitStack() as stack:
        reporters = make_reporters(run, run_dir)
        for reporter in reporters:
            stack.callback(reporter.close)
        from zoo.train.loop import train  # imports torch

        return train(run, run_dir, reporters, stop)


def _check_jobs(overrides: list[str]) -> None:
    from zoo.train.sweep import jobs_of

    for job in jobs_of(overrides):
        try:
            if _check_job(job, resume_auto=False):
                raise ConfigError(
                    "checkpoint.resume: found a directory; a multirun goes on with checkpoint.resume=auto"
                )
        except ConfigError as error:
            raise ConfigError(f"in the job {' '.join(job)}:\n{error}") from None


def _check_job(overrides: list[str], resume_auto: bool = True) -> Path | None:
    """Decode one job and look at the files that it names; the run directory to continue when that is not the job's own.

    Args:
        resume_auto: Let `checkpoint.resume=auto` look for other runs.
    """
    from zoo.config import compose
    from zoo.spec.run import decode_run
    from zoo.train.checks import check_inputs
    from zoo.train.rundir import check_resumable, find_run, newest_checkpoint

    run = decode_run(compose(overrides))
    check_inputs(run)
    resume = run.checkpoint.resume
    own_directory = any(override.startswith("hydra.run.dir=") for override in overrides)
    if resume == "never" or (resume == "auto" and (own_directory or not resume_auto)):
        return None
    if resume == "auto":
        return find_run(OUTPUTS, run.to_dict())
    if own_directory:
        raise ConfigError(f"checkpoint.resume: found {resume!r}; that run goes on where it is; drop hydra.run.dir")
    check_resumable(newest_checkpoint(Path(resume)), run.to_dict())
    return Path(resume)


def _quoted(path: Path) -> str:
    """A path as a value in Hydra's override grammar."""
    if re.fullmatch(r"[\w./+-]*/[\w./+-]*", str(path)):  # with a slash it cannot be read as a number or null
        return str(path)
    # The grammar reads a backslash as itself unless a quote follows.
    text = re.sub(r"(\\+)(?='|$)", r"\1\1", str(path)).replace("'", "\\'")
    return f"'{text}'"


def _leave(status: int, message: str) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(status)

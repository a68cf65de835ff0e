"""From a command line to a finished run. Torch is imported only when everything about the run is known to be sound.

Exit statuses, of each process where torchrun starts several: 0 done; 1 training failed; 2 a mistake in the settings;
130 and 143 stopped by SIGINT and SIGTERM, with a checkpoint saved.
"""

from __future__ import annotations

import gc
import math
import os
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from zoo.config import opened
from zoo.registry import take_config_dirs
from zoo.spec.base import ConfigError
from zoo.train.errors import TrainingError
from zoo.train.processes import FAILED, LOST, MISTAKE, follow, lead, lost_another, recalled
from zoo.train.sweep import FAILURE, MULTIRUN_FLAGS, claimed, is_sweep, missing, result_of, sweep_dir, sweep_of
from zoo.train.torchrun import check_processes, launched

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from zoo.spec.run import RunSpec
    from zoo.train.events import RunFinished
    from zoo.train.signals import StopSignal

OUTPUTS = Path("outputs")
"""Where runs go unless hydra.run.dir says otherwise."""


def main(arguments: Sequence[str], program: str) -> NoReturn:
    """Check the whole command line, then hand it to Hydra. Ends the process.

    Args:
        arguments: Hydra's overrides and flags.
        program: What the person typed before them.
    """
    _wait_asleep()
    launch = launched()
    if launch is not None and launch.rank > 0:
        follow(launch)
    gc.disable()  # until the run starts: a tenth of the time that checking its settings takes
    try:
        if launch is not None and (run_dir := recalled(launch)) is not None:
            arguments = _going_on(arguments, run_dir)
        arguments = checked(take_config_dirs(arguments))
    except ConfigError as error:
        _leave(MISTAKE, str(error))
    sys.argv = [program, *arguments]
    import hydra

    try:
        hydra.main(config_path="pkg://zoo.conf", config_name="config", version_base="1.3")(run_job)()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of --help or --cfg has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    _end_sweep(arguments)
    sys.exit(0)


def _going_on(arguments: Sequence[str], run_dir: Path) -> list[str]:
    """The command line of a process that takes the place of one in `run_dir`."""
    names = ("hydra.run.dir=", "checkpoint.resume=")
    kept = [argument for argument in arguments if not argument.lstrip("+").startswith(names)]
    return [*kept, f"hydra.run.dir={_quoted(run_dir)}", "checkpoint.resume=auto"]


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
    if flags - MULTIRUN_FLAGS:  # help, completion, showing the configuration: nothing is going to run
        return list(arguments)
    overrides = [argument for argument in arguments if argument not in flags]
    if is_sweep(arguments):
        if launched() is not None:
            raise ConfigError("-m: found several jobs under torchrun; it starts the processes of one: run them in turn")
        return [*flags, *opened(_checked_sweep(overrides))]
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

    gc.enable()
    hydra_config = HydraConfig.get()
    if hydra_config.mode == RunMode.MULTIRUN:
        return _run_job_of_sweep(cfg, hydra_config)
    return _run_alone(cfg, hydra_config)


def _run_alone(cfg: DictConfig, hydra_config: Any) -> float | None:
    from zoo.spec.run import decode_run
    from zoo.train.signals import StopSignal

    run_dir, stop = Path(hydra_config.runtime.output_dir), StopSignal(patient=launched() is not None)
    try:
        run = decode_run(cfg, hydra_config.runtime.choices.get("model"))
        finished = _train(run, run_dir, stop)
    except ConfigError as error:
        _leave(MISTAKE, str(error))
    except TrainingError as error:
        _leave(FAILED, str(error))
    except RuntimeError as error:
        if launched() is None or not lost_another(error):
            raise
        _leave(FAILED, LOST)
    except KeyboardInterrupt:
        _leave(128 + signal.SIGINT, "stopped at once; what came after the last checkpoint is lost")
    if finished.reason == "interrupted":
        given = [override.removeprefix("++") for override in hydra_config.overrides.task]
        kept = [override for override in given if not override.startswith("checkpoint.resume=")]
        command = shlex.join([*sys.argv[0].split(), *kept, f"checkpoint.resume={_quoted(run_dir)}"])
        _leave(128 + stop.number, f"go on with: {command}")
    return finished.last_eval.bits_per_byte if finished.last_eval else None


def _run_job_of_sweep(cfg: DictConfig, hydra_config: Any) -> float | None:
    """One job among others: what it comes to stays in its directory, and a failure is its own.

    Returns:
        As `run_job`; infinity when it failed, None when another process is at it.
    """
    from zoo.spec.run import decode_run
    from zoo.train.signals import StopSignal

    run_dir, stop = Path(hydra_config.runtime.output_dir), StopSignal()
    what = f"job {hydra_config.job.num}: {' '.join(hydra_config.overrides.task)}"
    with claimed(run_dir) as mine:
        if not mine:
            print(f"\n{what}\nanother process is at it")
            return None
        try:
            run = decode_run(cfg, hydra_config.runtime.choices.get("model"))
            result = None if run.checkpoint.resume == "never" else result_of(run_dir, run.to_dict())
            print(f"\n{what}" if result is None else f"\n{what}\ndone before: {result:.4f} bits per byte")
            if result is not None:
                return result
            (run_dir / FAILURE).unlink(missing_ok=True)
            finished = _train(run, run_dir, stop)
        except (ConfigError, TrainingError) as error:
            (run_dir / FAILURE).write_text(f"{error}\n", encoding="utf-8")
            print(f"this job failed; the others go on: {error}", file=sys.stderr)
            return math.inf
        except KeyboardInterrupt:
            _leave(128 + signal.SIGINT, "stopped at once; the same command goes on from the last checkpoint")
    if stop.requested:
        _leave(128 + stop.number, "stopped; the same command goes on with the sweep")
    return finished.last_eval.bits_per_byte if finished.last_eval else None


def _train(run: RunSpec, run_dir: Path, stop: StopSignal) -> RunFinished:
    from zoo.train.reporters import make_reporters

    with ExitStack() as stack:
        reporters = make_reporters(run, run_dir)
        for reporter in reporters:
            stack.callback(reporter.close)
        from zoo.train.loop import train  # imports torch

        launch = launched()
        crew = None if launch is None else lead(launch, run, run_dir)
        _tune(run)
        finished = train(run, run_dir, reporters, stop, crew)
        if crew is not None:
            from zoo.train.meeting import part

            part(crew)
        return finished


def _tune(run: RunSpec) -> None:
    """Set up the process for work on the processor, unless the run is elsewhere or does without."""
    from zoo.hardware.local import local_hardware
    from zoo.tuning import tune

    if run.kernels.tune and local_hardware(run.hardware).chip.device == "cpu":
        tune()


def _checked_sweep(overrides: list[str]) -> list[str]:
    """Check every job; the overrides with a directory that the same jobs find again."""
    sweep = sweep_of(overrides)
    for job in sweep.jobs:
        try:
            if _check_job(job, resume_auto=False):
                raise ConfigError(
                    "checkpoint.resume: found a directory; a multirun goes on with checkpoint.resume=auto"
                )
        except ConfigError as error:
            raise ConfigError(f"in the job {' '.join(job)}:\n{error}") from None
    keys = {override.partition("=")[0] for override in overrides}
    if "checkpoint.resume=never" in overrides:
        return sweep.overrides
    more = [] if "checkpoint.resume" in keys else ["checkpoint.resume=auto"]
    if sweep.complete and "hydra.sweep.dir" not in keys:
        more.append(f"hydra.sweep.dir={_quoted(sweep_dir(sweep.jobs, overrides))}")
    return [*sweep.overrides, *more]


def _end_sweep(arguments: Sequence[str]) -> None:
    """Say where a sweep lies and what is missing of it."""
    given = [word.partition("=")[2] for word in arguments if word.startswith("hydra.sweep.dir=")]
    if not given or not is_sweep(arguments):
        return
    folder = Path(given[-1].strip("'"))
    absent = missing(folder)
    print(f"\nthe runs are in {folder}; compare them: zoo report {shlex.quote(str(folder))}")
    if absent:
        lines = "".join(f"\n  job {number}: {state}" for number, state in absent.items())
        _leave(FAILED, f"not done; the same command goes on with them:{lines}")


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
    launch = launched()
    if launch is None or not launch.elastic:
        check_processes(run, 1 if launch is None else launch.size)
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

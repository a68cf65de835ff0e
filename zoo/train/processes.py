"""The processes that torchrun starts: one reads the command line and leads, the others follow it.

Torch is imported only where processes meet.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from zoo.spec.base import ConfigError
from zoo.train.errors import TrainingError
from zoo.train.torchrun import Launch

if TYPE_CHECKING:
    from zoo.spec.run import RunSpec
    from zoo.train.distributed import Together

FAILED, MISTAKE = 1, 2
SPEAKS_AFTER_S = 5.0
"""What all processes have to say the first one says; torchrun ends the others meanwhile."""


def recalled(launch: Launch) -> Path | None:
    """The run directory of the processes before these, when all were started again; None: they are the first."""
    if launch.store is None:
        return None
    from zoo.train import meeting

    return meeting.recalled(launch)


def lead(launch: Launch, run: RunSpec, run_dir: Path) -> Together | None:
    """Meet the other processes and tell them what to do; None: there are none."""
    from zoo.train import meeting

    meeting.remember(launch, run_dir)
    if launch.size == 1:
        return None
    crew = meeting.meet(launch)
    crew.share(lambda: (run, run_dir))
    crew.asynchronous = run.checkpoint.asynchronous
    return crew


def follow(launch: Launch) -> NoReturn:
    """Do what the first process says, and end with its status unless something fails here."""
    from zoo.train.loop import train
    from zoo.train.meeting import meet, part
    from zoo.train.signals import StopSignal

    stop = StopSignal(patient=True)
    try:
        crew = meet(launch)
        run, run_dir = crew.share(_nothing)
        crew.asynchronous = run.checkpoint.asynchronous
        finished = train(run, run_dir, (), stop, crew)
        part(crew)
    except ConfigError as error:
        leave_late(MISTAKE, launch, str(error))
    except TrainingError as error:
        leave_late(FAILED, launch, str(error))
    except RuntimeError as error:
        if not lost_another(error):
            raise
        leave_late(FAILED, launch, LOST)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    sys.exit(128 + stop.number if finished.reason == "interrupted" else 0)


LOST = "another process is gone; with torchrun --max-restarts=N all go on from the last checkpoint"


def lost_another(error: RuntimeError) -> bool:
    """Whether an error says that another process does not answer any more."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or "gloo" in str(error).lower() or "Connection" in str(error)


def leave_late(status: int, launch: Launch, message: str) -> NoReturn:
    """End a process that is not the first, and say why unless torchrun is quicker."""
    time.sleep(SPEAKS_AFTER_S)
    print(f"process {launch.rank}: {message}", file=sys.stderr)
    sys.exit(status)


def _nothing() -> tuple[RunSpec, Path]:
    raise AssertionError("the first process decides")

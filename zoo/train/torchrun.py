"""What torchrun tells a process about the others. No torch here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zoo.spec.base import ConfigError
from zoo.spec.train import ManualParallelSpec

if TYPE_CHECKING:
    from zoo.spec.run import RunSpec


@dataclass(frozen=True)
class Launch:
    """One of several processes that torchrun has started."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    """Processes on this machine."""
    restarts: int = 0
    """How often all of them have been started again."""
    max_restarts: int = 0
    run_id: str = "none"
    store: tuple[str, int] | None = None
    """Address of the agent's store, which outlives the processes; None: there is none."""

    @property
    def elastic(self) -> bool:
        """Whether a process that is lost has all of them started again."""
        return self.max_restarts > 0


def launched(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """This process's place among those that torchrun has started; None: it was not started by torchrun."""
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return None

    def number(name: str, default: int) -> int:
        return int(environment.get(name, default))

    address = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
    kept = environment.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    return Launch(
        rank=number("RANK", 0),
        size=number("WORLD_SIZE", 1),
        local_rank=number("LOCAL_RANK", 0),
        local_size=number("LOCAL_WORLD_SIZE", 1),
        restarts=number("TORCHELASTIC_RESTART_COUNT", 0),
        max_restarts=number("TORCHELASTIC_MAX_RESTARTS", 0),
        run_id=environment.get("TORCHELASTIC_RUN_ID", "none"),
        store=(address[0], int(address[1])) if kept and address[0] and address[1] else None,
    )


def check_processes(run: RunSpec, processes: int, shrunk: bool = False) -> None:
    """Hold the number of processes against the settings.

    Args:
        shrunk: Some may have been lost since the run was started: any number will do.

    Raises:
        ConfigError: they are for another number.
    """
    if shrunk:
        return
    if processes == 1 and run.checkpoint.asynchronous:
        raise ConfigError("checkpoint.asynchronous: found True; a process that is alone writes its checkpoints itself")
    there = "there is 1 process" if processes == 1 else f"there are {processes} processes"
    parallel, devices = run.parallel, run.hardware.num_devices
    if isinstance(parallel, ManualParallelSpec) and parallel.num_devices != processes:
        wanted = parallel.num_devices
        given = " ".join(f"{name}={value}" for name, value in parallel.degrees.items() if value > 1) or "all degrees 1"
        raise ConfigError(
            f"parallel: found {given}, so that tp * pp * cp * dp is {wanted}; {there}; start as many "
            f"(torchrun --nproc-per-node {wanted} train.py ...) or change the degrees"
        )
    if devices not in (1, processes):
        raise ConfigError(
            f"hardware.num_devices: found {devices}; {there}, each with one device; start as many "
            f"(torchrun --nproc-per-node {devices} train.py ...) or give hardware.num_devices={processes}"
        )

"""What the processes of the pool run for tests of whole training runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.parallel.cases import widen_norms
from tests.train.runs import Listener
from zoo.decoder import Decoder
from zoo.spec.run import RunSpec
from zoo.train import assembly, distributed
from zoo.train.crew import Alone
from zoo.train.distributed import Together
from zoo.train.loop import train
from zoo.train.placement import Placement
from zoo.train.torchrun import Launch


class WideAlone(Alone):
    """One process, its norms in fp64 as all else."""

    def spread(self, make: Callable[[bool], Decoder], run: RunSpec, placement: Placement) -> Decoder:
        return super().spread(partial(wide, make), run, placement)


class WideTogether(Together):
    """Several processes, their norms in fp64 as all else."""

    def spread(self, make: Callable[[bool], Decoder], run: RunSpec, placement: Placement) -> Decoder:
        return super().spread(partial(wide, make), run, placement)


def wide(make: Callable[[bool], Decoder], on_meta: bool) -> Decoder:
    model = make(on_meta)
    widen_norms(model)
    return model


@dataclass
class Heard:
    """What a run has told its reporters."""

    losses: list[dict[str, float]] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    loads: list[tuple[int, ...]] = field(default_factory=list)
    evaluations: list[float] = field(default_factory=list)
    choices: tuple[str, ...] = ()
    reason: str = ""
    sample: str = ""
    first_step: int = 0


def fp64_run(run: RunSpec, run_dir: Path, environment: dict[str, str] | None = None, large: bool = False) -> Heard:
    """Train in fp64, all processes of the case together.

    Args:
        environment: What torchrun would say beside ranks; None: the process was not started by torchrun.
        large: As if no process had room for the whole model.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    launch = Launch(rank, size, rank, size)
    if environment is not None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), **environment}
    dtypes, assembly.DTYPES = assembly.DTYPES, {"fp32": torch.float64}
    predictor: Any
    predictor, assembly.predictor = assembly.predictor, lambda *args: lambda size, recompute: None
    whole, distributed.WHOLE = distributed.WHOLE, 0.0 if large else distributed.WHOLE
    listener = Listener()
    crew = WideTogether(launch) if size > 1 else WideAlone()
    try:
        if isinstance(crew, Together):
            crew.asynchronous = run.checkpoint.asynchronous
        train(run, run_dir, [listener], crew=crew)
        if isinstance(crew, Together):
            crew.close()
    finally:
        assembly.DTYPES, assembly.predictor, distributed.WHOLE = dtypes, predictor, whole
        for name in ("RANK", "WORLD_SIZE", *(environment or ())):
            os.environ.pop(name, None)
    return Heard(
        listener.losses,
        [step.grad_norm for step in listener.steps],
        [health.load for step in listener.steps for health in step.routing],
        [evaluation.loss for evaluation in listener.evaluations],
        listener.start.choices,
        listener.end.reason,
        listener.end.sample,
        listener.start.first_step,
    )

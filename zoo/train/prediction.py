"""How long a step is going to take on this machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import zoo
from zoo.hardware.speed import Speed, cache_dir, write_cache
from zoo.plan.estimate import estimate
from zoo.plan.local import Op, StepOps, step_seconds
from zoo.spec.base import ConfigError
from zoo.spec.finetune import LoraFinetune
from zoo.spec.hardware import HardwareSpec
from zoo.spec.model import ModelSpec
from zoo.spec.run import RunSpec
from zoo.spec.train import OptimizerSpec

_PLAN_NAMES = {"none": "none", "layer": "full"}
"""What the planner calls recomputing."""


def predictor(run: RunSpec, machine: HardwareSpec, speed: Speed, compute: str) -> Callable[[int, str], float | None]:
    """The predicted seconds of a step of `run`, from its micro-batch and what is recomputed.

    On a processor by what was measured on it, operation by operation; elsewhere as `zoo.estimate` prices the chip.
    """
    train = run.train

    @cache
    def seconds(micro_batch: int, recompute: str) -> float | None:
        if speed.rates is None:
            if machine.chip.device == "cpu":
                return None
            return _estimated(run, machine, compute, micro_batch, recompute)
        if isinstance(run.finetune, LoraFinetune):
            return None  # its operations are others than those that were measured
        try:
            ops = known_step_ops(run.model, micro_batch, train.seq_len, run.optimizer, run.kernels.experts)
        except (RuntimeError, NotImplementedError):  # a block from outside that cannot run without numbers
            return None
        slower = speed.tflops["fp32"] / speed.tflops[compute] if compute in speed.tflops else 1.0
        number = train.batch_size // micro_batch
        parts = step_seconds(ops, speed.rates, number, again=recompute == "layer", products=slower)
        return sum(parts.values())

    return seconds


def _estimated(run: RunSpec, machine: HardwareSpec, compute: str, micro_batch: int, recompute: str) -> float | None:
    options: dict[str, Any] = {"seq_len": run.train.seq_len, "global_batch": run.train.batch_size}
    options |= {"micro_batch": micro_batch, "recompute": _PLAN_NAMES[recompute], "precision": compute}
    try:
        return estimate(run.model, machine, optimizer=run.optimizer.type, **options).step_time_s
    except ConfigError:  # the planner lacks a fact of the chip
        return None


def known_step_ops(spec: ModelSpec, batch: int, seq_len: int, optimizer: OptimizerSpec, backend: str) -> StepOps:
    """`step_ops`, kept on disk as long as neither the settings nor the code of the blocks change."""
    key = {
        "model": spec.to_dict(),
        "optimizer": optimizer.to_dict(),
        "sizes": [batch, seq_len],
        "backend": backend,
        "code": [zoo.__version__, *_stamps()],
    }
    path = cache_dir() / f"step-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}.json"
    try:
        return _from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    from zoo.train.trace import step_ops

    ops = step_ops(spec, batch, seq_len, optimizer, backend)
    write_cache(path, _to_json(ops))
    return ops


def _stamps() -> list[int]:
    """When the code that a step runs was last changed."""
    root = Path(zoo.__file__).parent
    files = [*root.joinpath("blocks").glob("*.*"), *root.joinpath("train").glob("*.py"), root / "decoder.py"]
    return [max(file.stat().st_mtime_ns for file in files)]


_LISTS = ("passes", "layers_again", "update")


def _to_json(ops: StepOps) -> dict[str, Any]:
    lists = {name: [[op.kind, op.size, times] for op, times in getattr(ops, name).items()] for name in _LISTS}
    return {**vars(ops), **lists}


def _from_json(data: dict[str, Any]) -> StepOps:
    lists = {name: {Op(kind, tuple(size)): times for kind, size, times in data[name]} for name in _LISTS}
    return StepOps(**{**data, **lists})

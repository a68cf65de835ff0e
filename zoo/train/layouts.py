"""Where a run of several processes goes: its layout, its micro-batch and what it recomputes. No torch here.

The layout is the one that is given or the planner's. A run that has lost processes goes on with what is left: data
parallelism shrinks, the rest of the layout stays as far as it can.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from itertools import product
from typing import Any

from zoo.plan.estimate import estimate
from zoo.plan.layout import Layout, Points
from zoo.plan.legal import legal
from zoo.plan.plan import plan
from zoo.plan.question import divisors
from zoo.spec.attention import AttentionSpec
from zoo.spec.base import ConfigError
from zoo.spec.finetune import LoraFinetune
from zoo.spec.hardware import HardwareSpec
from zoo.spec.mamba2 import Mamba2Spec
from zoo.spec.mla import MLASpec
from zoo.spec.mlp import MLPSpec
from zoo.spec.model import ModelSpec
from zoo.spec.moe import MoESpec
from zoo.spec.run import RunSpec
from zoo.spec.train import ManualParallelSpec
from zoo.train.placement import RESERVE, Placement, choose
from zoo.train.torchrun import check_processes, launched

_PLANNED = {"none": "none", "layer": "full"}
"""What the planner calls recomputing."""


def place_many(
    run: RunSpec,
    machine: HardwareSpec,
    processes: int,
    compute: str,
    room_gib: float | None,
    decided: Mapping[str, Any] | None,
) -> Placement:
    """Choose what the settings leave open.

    Args:
        machine: With what was found out about it.
        compute: The dtype of matrix products.
        room_gib: Memory that is free for a process; None: not known.
        decided: What was chosen when the run was started, if it was before (`Placement.decided`).

    Raises:
        ConfigError: no layout goes with the processes, or nothing fits into their memory.
    """
    launch = launched()
    shrunk = launch is not None and launch.elastic and (launch.restarts > 0 or decided is not None)
    check_processes(run, processes, shrunk)
    if isinstance(run.finetune, LoraFinetune):
        raise ConfigError("finetune.type: found 'lora'; trains on one device; use finetune=full on several")
    machine = machine.replace(num_devices=processes)
    layout, micro_batch, reasons = _layout(run, machine, processes, compute)
    rows, rest = divmod(run.train.batch_size, layout.dp)
    if rest:
        raise ConfigError(
            f"train.batch_size: found {run.train.batch_size}; the {layout.dp} processes along parallel.dp must have "
            "equally many sequences of it"
        )
    options = _options(run, rows, micro_batch, decided)
    prices = _Prices(run, machine, layout, compute)
    room = None if room_gib is None else room_gib * (1 - RESERVE)
    found = choose(options, prices.memory, prices.seconds, room if run.train.check_memory else None)
    if found is None and decided is not None:  # each process has more to do than before
        found = choose(_options(run, rows, micro_batch, None), prices.memory, prices.seconds, room)
        reasons.append("balance terms are means over fewer sequences than before: micro-batches had to shrink")
    if found is None:
        recompute, sizes = list(options.items())[-1]
        raise ConfigError(
            f"train: {run.model.name} needs {prices.memory(sizes[-1], recompute):.3g} GiB on each of {processes} "
            f"processes with {layout}, train.micro_batch={sizes[-1]} and train.recompute={recompute}; {room:.3g} GiB "
            "are free; more processes, a smaller model, or train.check_memory=false to try it"
        )
    size, recompute, chosen = found
    gib, seconds = prices.memory(size, recompute), prices.seconds(size, recompute)
    if decided is None:
        reasons += chosen
    return Placement(layout, size, rows // size, recompute, gib, seconds, tuple(reasons))


def _layout(run: RunSpec, machine: HardwareSpec, processes: int, compute: str) -> tuple[Layout, int | None, list[str]]:
    """The layout, the planner's micro-batch where it was asked, and a reason for each choice."""
    if not isinstance(run.parallel, ManualParallelSpec):
        return _planned(run, machine, compute, "the planner's")
    wanted = Layout(**run.parallel.degrees)
    if wanted.num_devices == processes:
        return wanted, None, [f"layout {wanted}: as given, on {processes} processes"]
    left = shrink(run, wanted, processes)
    if left is not None:
        return left, None, [f"layout {left}: {processes} of {wanted.num_devices} processes are left ({wanted})"]
    return _planned(run, machine, compute, f"planned again, {processes} processes cannot be laid out as {wanted}")


def shrink(run: RunSpec, wanted: Layout, processes: int) -> Layout | None:
    """`wanted` with another dp, and with as much of ep and shard as goes with it; None: there is none."""
    kept = wanted.tp * wanted.pp * wanted.cp
    dp, rest = divmod(processes, kept)
    if rest or dp < 1:
        return None
    for ep, shard in product(divisors(wanted.ep)[::-1], divisors(wanted.shard)[::-1]):
        layout = Layout(wanted.tp, wanted.pp, wanted.vp, wanted.cp, ep, wanted.etp, dp, shard)
        points = Points.of([layout], seq_len=run.train.seq_len, global_batch=dp)
        if legal(run.model, points, uneven_stages=True)[0] and _experts_divide(layout):
            return layout
    return None


def _experts_divide(layout: Layout) -> bool:
    """Whether the processes with the same experts can be divided into those that share their weights."""
    points = Points.of([layout], seq_len=2, global_batch=1)
    same, shared = float(points.expert_dp[0]), float(points.expert_shard[0])
    return layout.shard == 1 or (shared.is_integer() and math.fmod(same, shared) == 0)


def _planned(run: RunSpec, machine: HardwareSpec, compute: str, why: str) -> tuple[Layout, int | None, list[str]]:
    train = run.train
    options: dict[str, Any] = {"seq_len": train.seq_len, "global_batch": train.batch_size, "precision": compute}
    options |= {"optimizer": run.optimizer.type}
    if train.micro_batch != "auto":
        options["micro_batch"] = train.micro_batch
    if train.recompute != "auto":
        options["recompute"] = _PLANNED[train.recompute]
    else:
        options["recompute"] = "none"
    try:
        best = plan(run.model, machine, **options, **_fixed(run.model)).best
    except ConfigError as error:
        if train.recompute != "auto":
            raise ConfigError(f"parallel: the planner finds no layout: {error}") from None
        best = plan(run.model, machine, **{**options, "recompute": "full"}, **_fixed(run.model)).best
    return best.layout, best.micro_batch, [f"layout {best.layout}: {why}, on {machine.num_devices} processes"]


def _fixed(model: ModelSpec) -> dict[str, Any]:
    """Degrees that `parallel=auto` does not choose: what few schedules allow, and what a block cannot be cut by."""
    blocks = list(model.slots.values())
    whole = (getattr(block, "indexer", None) is not None for block in blocks)
    spans = (getattr(block, name, None) == "full" for block in blocks for name in ("qk_norm", "norm_span"))
    uncut = not all(isinstance(block, _CUT) for block in blocks) or any(whole) or any(spans)
    return {"vp": 1, "cp": 1, **({"tp": 1} if uncut else {})}


_CUT = (AttentionSpec, MLASpec, Mamba2Spec, MLPSpec, MoESpec)
"""What `zoo.parallel.tensor` has a rule for."""


def _options(
    run: RunSpec, rows: int, micro_batch: int | None, decided: Mapping[str, Any] | None
) -> dict[str, list[int]]:
    """Micro-batches by what is recomputed. A run that goes on keeps the number of its micro-batches: what is a mean
    over one of them stays what it was."""
    train = run.train
    if decided is not None and "num_micro_batches" in decided:
        number = decided["num_micro_batches"]
        if rows % number == 0:
            return {decided["recompute"]: [rows // number]}
    if train.micro_batch != "auto":
        if rows % train.micro_batch:
            raise ConfigError(
                f"train.micro_batch: found {train.micro_batch}; must divide the {rows} sequences of each process: "
                f"{', '.join(str(size) for size in divisors(rows))}"
            )
        sizes = [train.micro_batch]
    else:
        sizes = [size for size in divisors(rows)[::-1] if micro_batch is None or size <= micro_batch]
    return dict.fromkeys(("none", "layer") if train.recompute == "auto" else (train.recompute,), sizes)


class _Prices:
    """What the planner says of a micro-batch and of what is recomputed."""

    def __init__(self, run: RunSpec, machine: HardwareSpec, layout: Layout, compute: str) -> None:
        train = run.train
        self._on_cpu = machine.chip.device in (None, "cpu")

        @cache
        def price(micro_batch: int, recompute: str) -> tuple[float, float | None]:
            options: dict[str, Any] = {"seq_len": train.seq_len, "global_batch": train.batch_size}
            options |= {"micro_batch": micro_batch, "recompute": _PLANNED[recompute], "precision": compute}
            try:
                found = estimate(run.model, machine, layout=layout, optimizer=run.optimizer.type, **options)
            except ConfigError:  # the planner lacks a fact of the chip
                return 0.0, None
            # Of a processor that several processes share, it knows no speed.
            return sum(found.memory_gib.values()), None if self._on_cpu else found.step_time_s

        self._price = price

    def memory(self, micro_batch: int, recompute: str) -> float:
        """GiB on a process."""
        return self._price(micro_batch, recompute)[0]

    def seconds(self, micro_batch: int, recompute: str) -> float | None:
        """Of a step."""
        return self._price(micro_batch, recompute)[1]

"""What is said of a run that does not fit: what it needs, what there is, and the nearest thing that would fit."""

from __future__ import annotations

from collections.abc import Iterator

from zoo.plan.adapters import adapter_size
from zoo.plan.machines import machines
from zoo.plan.own_memory import peak_memory
from zoo.plan.question import divisors
from zoo.spec.finetune import LoraFinetune, NoFinetune
from zoo.spec.model import ModelSpec
from zoo.spec.run import RunSpec
from zoo.spec.train import AdamWSpec, MuonSpec, OptimizerSpec
from zoo.spec.twin import shrink


def memory_gib(
    run: RunSpec, model: ModelSpec, optimizer: OptimizerSpec, micro_batch: int, recompute: str, compute: str
) -> float:
    """The predicted peak of a step of `run` with another model, optimizer or micro-batch."""
    lora = run.finetune
    return peak_memory(
        model,
        batch_size=micro_batch,
        seq_len=run.train.seq_len,
        recompute=recompute,
        optimizer=optimizer,
        weights=run.precision.weights,
        compute=compute,
        grad_accumulation=max(1, run.train.batch_size // micro_batch),
        adapters=adapter_size(model, lora.targets, lora.rank) if isinstance(lora, LoraFinetune) else None,
    ).total


def refusal(run: RunSpec, micro_batch: int, recompute: str, room_gib: float, compute: str) -> str:
    """One message for a run that needs more than `room_gib` even with `micro_batch` and `recompute`."""
    needed = memory_gib(run, run.model, run.optimizer, micro_batch, recompute, compute)
    fitting = [
        *_smaller_step(run, micro_batch, recompute, room_gib, compute),
        *_other_optimizer(run, room_gib, compute),
        *_twin(run, room_gib, compute),
        *_machine(needed),
    ]
    advice = "; or ".join(fitting) or "no machine that zoo knows has as much on one device"
    return (
        f"train: {run.model.name} needs {_gib(needed)} with train.micro_batch={micro_batch} "
        f"train.recompute={recompute} optimizer={run.optimizer.type}; "
        f"{run.hardware.name} has {_gib(room_gib)} to spare; "
        f"what would fit: {advice}; or try it with train.check_memory=false"
    )


def _gib(value: float) -> str:
    return f"{value:,.0f} GiB" if value >= 100 else f"{value:.3g} GiB"


def _smaller_step(run: RunSpec, micro_batch: int, recompute: str, room_gib: float, compute: str) -> Iterator[str]:
    """A smaller micro-batch, or the largest one that fits with layers computed again."""
    for name in dict.fromkeys((recompute, "layer")):
        for size in divisors(run.train.batch_size)[::-1]:
            if size > micro_batch or (size == micro_batch and name == recompute):
                continue
            gib = memory_gib(run, run.model, run.optimizer, size, name, compute)
            if gib <= room_gib:
                changes = {"train.micro_batch": (size, micro_batch), "train.recompute": (name, recompute)}
                settings = [f"{key}={now}" for key, (now, before) in changes.items() if now != before]
                yield f"{' '.join(settings)} ({_gib(gib)})"
                return


def _other_optimizer(run: RunSpec, room_gib: float, compute: str) -> Iterator[str]:
    """Muon keeps one number for each parameter of a matrix, AdamW two."""
    if not isinstance(run.optimizer, AdamWSpec):
        return
    muon = MuonSpec(lr=run.optimizer.lr, adamw=run.optimizer)
    gib = memory_gib(run, run.model, muon, 1, "layer", compute)
    if gib <= room_gib:
        yield f"optimizer=muon train.micro_batch=1 train.recompute=layer ({_gib(gib)})"


def _twin(run: RunSpec, room_gib: float, compute: str) -> Iterator[str]:
    if not isinstance(run.finetune, NoFinetune):  # a model that comes from a checkpoint stays what it is
        return
    twin = shrink(run.model)
    if twin.params().total < run.model.params().total:
        gib = memory_gib(run, twin, run.optimizer, 1, "none", compute)
        if gib <= room_gib:
            yield f"model_scale=tiny ({_gib(gib)})"


def _machine(needed: float) -> Iterator[str]:
    """The least machine with a device that holds as much."""
    for machine in machines():
        if (machine.chip.memory_gib or 0.0) >= needed:
            yield f"hardware={machine.name} ({machine.chip.memory_gib:.4g} GiB on a device)"
            return

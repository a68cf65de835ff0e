"""Save and restore a run, exactly. The layout is that of `zoo.train.rundir`."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn, optim

from zoo.train.rundir import Checkpoint, checkpoint_dir, partial_dir, publish, seal

MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"


def save_checkpoint(
    run_dir: Path,
    step: int,
    model: nn.Module,
    optimizers: Iterable[optim.Optimizer],
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write the checkpoint of `step`, then remove those that `zoo.train.rundir.publish` no longer keeps.

    It is written under a hidden name, flushed to disk and renamed: a process that is killed leaves the whole
    checkpoint or none. `state` holds JSON values.

    Raises:
        OSError: it cannot be written. The checkpoints of before are as they were, and what was written is gone.
    """
    partial = partial_dir(run_dir, step)
    try:
        partial.mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, partial / MODEL)
        save_file(_optimizer_tensors(optimizers), partial / OPTIMIZER)
        seal(partial, step, state)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(str(error)) from error
    publish(run_dir, step, keep)
    return checkpoint_dir(run_dir, step)


def load_checkpoint(checkpoint: Checkpoint, model: nn.Module, optimizers: Iterable[optim.Optimizer]) -> None:
    """Fill `model` and `optimizers` from a checkpoint of the same model and optimizer settings.

    Raises:
        RuntimeError: tensors are missing, left over or of another shape.
    """
    model.load_state_dict(load_file(checkpoint.path / MODEL))
    tensors = load_file(checkpoint.path / OPTIMIZER)
    for optimizer in optimizers:
        _fill(optimizer, tensors)
    if tensors:
        raise RuntimeError(f"{checkpoint.path / OPTIMIZER} holds tensors of no parameter: {', '.join(tensors)}")


def _fill(optimizer: optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Move the optimizer's tensors out of `tensors` into its state."""
    keys: dict[str, list[str]] = {}
    for full_key in tensors:
        name, key = full_key.rsplit("/", 1)
        keys.setdefault(name, []).append(key)
    layout = optimizer.state_dict()
    state = {}
    for group in layout["param_groups"]:
        for index, name in zip(group["params"], group["param_names"], strict=True):
            # Cloned: tensors of a mapped file may lie at addresses that make vector code round differently.
            state[index] = {key: tensors.pop(f"{name}/{key}").clone() for key in keys.get(name, ())}
    optimizer.load_state_dict({**layout, "state": {index: values for index, values in state.items() if values}})


def _optimizer_tensors(optimizers: Iterable[optim.Optimizer]) -> dict[str, Tensor]:
    tensors = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                for key, value in optimizer.state.get(parameter, {}).items():
                    tensors[f"{name}/{key}"] = torch.as_tensor(value).contiguous()
    return tensors

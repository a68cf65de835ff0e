"""Save and restore a run, exactly. The layout is that of `zoo.train.rundir`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn, optim

from zoo.train.rundir import FORMAT, STATE, Checkpoint, checkpoint_dir, find_checkpoints

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
    """Write the checkpoint of `step`, then remove all but the newest `keep`.

    It is written under a hidden name, flushed to disk and renamed: a process that is killed leaves the whole
    checkpoint or none. `state` holds JSON values.
    """
    final = checkpoint_dir(run_dir, step)
    partial = final.with_name(f".{final.name}.partial")
    for leftover in (partial, final):
        if leftover.exists():
            shutil.rmtree(leftover)
    partial.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, partial / MODEL)
    save_file(_optimizer_tensors(optimizers), partial / OPTIMIZER)
    sizes = {name: (partial / name).stat().st_size for name in (MODEL, OPTIMIZER)}
    text = json.dumps({"format": FORMAT, "step": step, **state, "files": sizes}, indent=1)
    (partial / STATE).write_text(text, encoding="utf-8")
    for path in (*partial.iterdir(), partial):
        _flush(path)
    partial.rename(final)
    _flush(final.parent)
    for old in find_checkpoints(run_dir)[0][:-keep]:
        shutil.rmtree(old.path)
    return final


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


def _flush(path: Path) -> None:
    """Wait until a file, or the entries of a directory, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

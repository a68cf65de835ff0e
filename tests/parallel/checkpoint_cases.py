"""What the processes of the pool run for tests of checkpoints: train, save, load, go on."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import optim

from tests.parallel import cases
from zoo.decoder import Decoder
from zoo.parallel import World, parallelize, share_counts
from zoo.parallel import step as parallel_step
from zoo.parallel.checkpoint import load, pieces_of, save
from zoo.plan.layout import Layout
from zoo.spec.base import ConfigError
from zoo.spec.train import AdamWSpec, MuonSpec, OptimizerSpec
from zoo.train import trainer
from zoo.train.checkpoint import load_checkpoint, save_checkpoint
from zoo.train.crew import Alone
from zoo.train.optim import build_optimizers
from zoo.train.rundir import Checkpoint, checkpoint_dir

ADAMW = AdamWSpec(lr=0.01, eps=1e-3)
MUON = MuonSpec(lr=0.01, adamw=ADAMW)
BEFORE, AFTER, CLIP = 2, 3, 0.5

State = tuple[list[dict[str, float]], dict[str, NDArray[Any]]]
"""Losses of steps, and what a process holds at their end: no tensors, whose memory would end with the process."""


class Trainee:
    """A model with its optimizers, spread over the processes of the case or, without a layout, on one alone."""

    def __init__(self, name: str, layout: Layout | None, optimizer: OptimizerSpec, seed: int = 0) -> None:
        self.model: Decoder = cases.model_of(cases.spec_of(name), torch.float64)
        if seed:
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.add_(torch.randn_like(parameter) * seed)
        self.world = None if layout is None else World.of(layout)
        if self.world is not None:
            parallelize(self.model, self.world)
        self.optimizers: list[optim.Optimizer] = build_optimizers(self.model, optimizer)

    def train(self, steps: range) -> State:
        losses = [self._step(step) for step in steps]
        pieces = pieces_of(self.model, self.optimizers)
        return losses, {name: piece.local.numpy() for name, piece in pieces.items()}

    def _step(self, step: int) -> dict[str, float]:
        batch, rows, model = cases.batch_of(self.model.spec, step), cases.ROWS // cases.MICRO_BATCHES, self.model
        if self.world is None:
            losses = trainer.accumulate(model, batch, rows, nullcontext)
            trainer.clip_gradients(model.parameters(), CLIP)
        else:
            dp = self.world.layout.dp
            own = cases.own_rows(batch, self.world.rows_index, dp)
            losses = parallel_step.accumulate(model, own, rows // dp, nullcontext, self.world)
            parallel_step.clip_gradients(model.parameters(), CLIP, self.world)
            share_counts(model, self.world)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for moe in model.moe_layers().values():
            moe.update_bias()
            moe.tokens_per_expert.zero_()
        return losses


def write(name: str, layout: Layout, optimizer: OptimizerSpec, folder: Path) -> State:
    """Train, save, and train on."""
    trainee = Trainee(name, layout, optimizer)
    trainee.train(range(BEFORE))
    save(folder, pieces_of(trainee.model, trainee.optimizers))
    return trainee.train(range(BEFORE, BEFORE + AFTER))


def read(name: str, layout: Layout | None, optimizer: OptimizerSpec, folder: Path) -> State:
    """Train on from a checkpoint, from other weights than those that its writers began with."""
    trainee = Trainee(name, layout, optimizer, seed=1)
    if layout is None:
        Alone().load(Checkpoint(folder, BEFORE), trainee.model, trainee.optimizers)
    else:
        load(folder, trainee.model, trainee.optimizers, whole=layout.pp == 1)
    return trainee.train(range(BEFORE, BEFORE + AFTER))


def write_alone(name: str, optimizer: OptimizerSpec, run_dir: Path) -> State:
    """As `write`, in the format of a single process."""
    trainee = Trainee(name, None, optimizer)
    trainee.train(range(BEFORE))
    save_checkpoint(run_dir, BEFORE, trainee.model, trainee.optimizers, {}, keep=1)
    found = trainee.train(range(BEFORE, BEFORE + AFTER))
    again = Trainee(name, None, optimizer, seed=1)
    load_checkpoint(Checkpoint(checkpoint_dir(run_dir, BEFORE), BEFORE), again.model, again.optimizers)
    assert again.train(range(BEFORE, BEFORE + AFTER))[0] == found[0]
    return found


def refusal(name: str, folder: Path, change: dict[str, Any]) -> str:
    """What is said of a checkpoint of another model."""
    spec = cases.spec_of(name)
    moe = spec.slots["moe"].replace(**change)
    model = cases.model_of(spec.replace(slots={**spec.slots, "moe": moe}), torch.float64)
    try:
        load(folder, parallelize(model, World.of(Layout(dp=2))), ())
    except ConfigError as error:
        return str(error)
    return ""

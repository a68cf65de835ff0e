"""Checkpoints: exact, whole or absent, and refused when they belong to other settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn, optim

from zoo.spec.train import AdamWSpec, MuonSpec, OptimizerSpec
from zoo.train.checkpoint import MODEL, load_checkpoint, save_checkpoint
from zoo.train.optim import build_optimizers
from zoo.train.rundir import STATE, differences, find_checkpoints, find_run


def new_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    model.register_buffer("counter", torch.tensor(seed))
    return model


def step(model: nn.Module, optimizers: list[optim.Optimizer], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    for optimizer in optimizers:
        optimizer.step()


@pytest.mark.parametrize("spec", [AdamWSpec(lr=0.1), MuonSpec(lr=0.1, adamw=AdamWSpec(lr=0.1))])
def test_training_goes_on_exactly(tmp_path: Path, spec: OptimizerSpec) -> None:
    model = new_model(1)
    optimizers = build_optimizers(model, spec)
    step(model, optimizers, 1)
    save_checkpoint(tmp_path, 1, model, optimizers, {"note": "kept"}, keep=2)
    step(model, optimizers, 2)

    other = new_model(2)
    others = build_optimizers(other, spec)
    (checkpoint,), notes = find_checkpoints(tmp_path)
    load_checkpoint(checkpoint, other, others)
    step(other, others, 2)
    assert notes == []
    assert checkpoint.state()["note"] == "kept"
    assert other.counter == 1
    for before, after in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(before, after)


def save_steps(run_dir: Path, *steps: int, keep: int = 9, settings: dict[str, object] | None = None) -> None:
    model = new_model(0)
    for number in steps:
        save_checkpoint(run_dir, number, model, [], {"settings": settings or {}}, keep)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    save_steps(tmp_path, 100, 200, 300, 1000, keep=2)
    assert [checkpoint.step for checkpoint in find_checkpoints(tmp_path)[0]] == [300, 1000]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_000300", "step_001000"]


def test_torn_checkpoints_are_passed_over_with_a_note(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2, 3, 4, 5)
    folder = tmp_path / "checkpoints"
    (folder / "step_000002" / MODEL).unlink()
    (folder / "step_000003" / STATE).write_text('{"format": 1, "step"')
    with (folder / "step_000004" / MODEL).open("r+b") as file:
        file.truncate(10)
    (folder / ".step_000006.partial").mkdir()
    checkpoints, notes = find_checkpoints(tmp_path)
    assert [checkpoint.step for checkpoint in checkpoints] == [1, 5]
    assert len(notes) == 3
    assert "step_000002: model.safetensors is missing" in notes[0]
    assert "step_000003: state.json cannot be read" in notes[1]
    assert "step_000004: model.safetensors has 10 bytes instead of" in notes[2]


def test_a_checkpoint_of_another_optimizer_is_not_taken(tmp_path: Path) -> None:
    model = new_model(0)
    optimizers = build_optimizers(model, MuonSpec(lr=0.1, adamw=AdamWSpec(lr=0.1)))
    step(model, optimizers, 0)
    save_checkpoint(tmp_path, 1, model, optimizers, {}, keep=1)
    (checkpoint,), _ = find_checkpoints(tmp_path)
    with pytest.raises((RuntimeError, KeyError)):
        load_checkpoint(checkpoint, nn.Linear(3, 4), [])
    with pytest.raises(RuntimeError, match="tensors of no parameter"):
        load_checkpoint(checkpoint, model, [])


SETTINGS = {"model": {"d_model": 8, "name": "a"}, "train": {"steps": 10, "seed": 0, "log_every": 1}, "schedule": {}}


def test_differences_say_what_cannot_and_what_can_change() -> None:
    now = {"model": {"d_model": 9, "name": "b"}, "train": {"steps": 20, "seed": 0, "log_every": 2}, "schedule": {}}
    fixed, changed = differences(SETTINGS, now)
    assert fixed == ["model.d_model: was 8, now 9"]
    assert changed == ["train.steps: was 10, now 20"]


def test_the_newest_unfinished_run_of_the_same_settings_is_found(tmp_path: Path) -> None:
    other = {**SETTINGS, "model": {"d_model": 9}}
    save_steps(tmp_path / "day" / "1-same", 5, settings=SETTINGS)
    save_steps(tmp_path / "day" / "2-other", 5, settings=other)
    save_steps(tmp_path / "day" / "3-done", 5, 10, settings=SETTINGS)
    assert find_run(tmp_path, SETTINGS) == tmp_path / "day" / "1-same"
    assert find_run(tmp_path / "day", SETTINGS) is None

"""The training loop on a tiny model: it learns, and what must not matter does not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.runs import Listener, small_run
from zoo.hardware import Speed
from zoo.plan.own_memory import peak_memory
from zoo.spec.base import ConfigError
from zoo.train import assembly, loop, trainer
from zoo.train.errors import TrainingError
from zoo.train.events import RunFinished
from zoo.train.metrics_file import MetricsFile, read_metrics
from zoo.train.signals import StopSignal
from zoo.train.trainer import RoutingCounter, accumulate, evaluate

UNBALANCED = ("model.moe.balance.aux_loss=0", "model.moe.balance.z_loss=0")
BIASED = ("model/moe/router=sigmoid", "model.moe.balance={bias_update_rate: 0.01}")


pytestmark = pytest.mark.usefixtures("known_machine")


def train(folder: Path, *overrides: str, name: str = "run", stop: StopSignal | None = None) -> Listener:
    listener = Listener()
    loop.train(small_run(folder, *overrides), folder / name, [listener], stop)
    return listener


def assert_same_losses(left: Listener, right: Listener, tolerance: float) -> None:
    assert len(left.losses) == len(right.losses) > 0
    for ours, theirs in zip(left.losses, right.losses, strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance, abs=tolerance)


def test_a_short_run_learns_and_tells_of_it(tmp_path: Path) -> None:
    heard = train(tmp_path, "train.steps=40", "train.eval_every=20", "train.log_every=10", "checkpoint.every=20")
    assert [event.step for event in heard.steps] == list(range(1, 41))
    assert [event.step for event in heard.evaluations] == [20, 40]
    assert heard.steps[0].bits_per_byte > 7
    assert heard.evaluations[-1].bits_per_byte < 0.6 * heard.steps[0].bits_per_byte
    assert set(heard.steps[0].losses) == {"cross_entropy", "balance", "router_z"}
    assert [bool(event.routing) for event in heard.steps] == [step % 10 == 0 for step in range(1, 41)]
    # Each report covers 10 steps of 64 tokens, each of which makes two choices.
    assert {sum(layer.load) for event in heard.steps for layer in event.routing} == {10 * 64 * 2}
    assert heard.steps[0].mfu
    assert heard.start.baselines == heard.end.baselines
    assert 0 < heard.end.baselines["order-2 bytes"] < 8
    assert heard.end.reason == "done"
    assert heard.end.sample
    assert {path.name for path in heard.end.files} >= {"config.yaml", "versions.json", "step_000040"}
    assert all(path.exists() for path in heard.end.files)


@pytest.mark.parametrize(
    "overrides",
    [
        ("optimizer=muon", "schedule=wsd"),
        ("precision=bf16",),
        ("precision=bf16", "precision.weights=bf16"),
        ("+model.mlp={type: mlp, d_ffn: 64}", "model.kinds.sparse.ffn=mlp", "~model.moe", "schedule=constant"),
        BIASED,
    ],
    ids=" ".join,
)
def test_other_recipes_learn_too(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    heard = train(tmp_path, "train.steps=25", *overrides)
    assert heard.evaluations[-1].loss < 0.7 * heard.steps[0].loss


def test_bf16_changes_the_arithmetic_and_not_the_weights(tmp_path: Path) -> None:
    exact, rounded = train(tmp_path, name="fp32"), train(tmp_path, "precision=bf16", name="bf16")
    assert_same_losses(exact, rounded, tolerance=0.05)
    assert exact.losses != rounded.losses


def test_recomputing_activations_changes_nothing(tmp_path: Path) -> None:
    kept, again = train(tmp_path, name="kept"), train(tmp_path, "train.recompute=layer", name="again")
    assert kept.losses == again.losses
    assert [event.grad_norm for event in kept.steps] == [event.grad_norm for event in again.steps]
    assert [event.routing for event in kept.steps] == [event.routing for event in again.steps]


@pytest.mark.parametrize("kernels", ["reference", "auto"])
def test_kernels_agree(tmp_path: Path, kernels: str) -> None:
    assert_same_losses(train(tmp_path, name="cpu"), train(tmp_path, f"kernels={kernels}", name=kernels), 1e-4)


def gradients(folder: Path, batch_size: int, *overrides: str) -> tuple[dict[str, float], dict[str, Any], list[Any]]:
    """Losses, gradients and routing counts of one batch of 8 rows in micro-batches."""
    parts = assembly.assemble(small_run(folder, *overrides))
    generator = torch.Generator().manual_seed(1)
    inputs, targets = (torch.randint(1, 256, (8, 16), generator=generator) for _ in range(2))
    targets[0, :13] = -100
    targets[5] = -100
    losses = accumulate(parts.model, (inputs, targets), batch_size, parts.autocast)
    counts = [moe.tokens_per_expert.tolist() for moe in parts.model.moe_layers().values()]
    return losses, {name: parameter.grad for name, parameter in parts.model.named_parameters()}, counts


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_accumulated_gradients_are_those_of_one_large_batch(tmp_path: Path, batch_size: int) -> None:
    losses, grads, counts = gradients(tmp_path, batch_size, *UNBALANCED)
    whole_losses, whole_grads, whole_counts = gradients(tmp_path, 8, *UNBALANCED)
    assert losses == pytest.approx(whole_losses, rel=1e-5)
    assert counts == whole_counts
    for name, grad in whole_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_accumulation_is_a_larger_batch_for_the_whole_run(tmp_path: Path) -> None:
    large = train(tmp_path, "train.batch_size=4", *UNBALANCED, name="large")
    small = train(tmp_path, "train.batch_size=4", "train.micro_batch=2", *UNBALANCED, name="small")
    assert_same_losses(large, small, tolerance=1e-4)


def test_evaluation_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    parts = assembly.assemble(small_run(tmp_path, *BIASED))
    before = {name: value.clone() for name, value in parts.model.state_dict().items()}
    windows = torch.randint(0, 256, (5, 16)), torch.randint(0, 256, (5, 16))
    settings: dict[str, Any] = {"autocast": parts.autocast, "step": 1, "bytes_per_token": 2.0}
    whole, parted = (evaluate(parts.model, windows, batch_size=size, **settings) for size in (5, 2))
    assert whole.loss == pytest.approx(parted.loss, rel=1e-5)
    assert whole.num_tokens == parted.num_tokens == 80
    assert whole.bits_per_byte == pytest.approx(whole.loss / math.log(2) / 2)
    assert parts.model.training
    assert all(parameter.grad is None for parameter in parts.model.parameters())
    for moe in parts.model.moe_layers().values():
        assert moe.tokens_per_expert.sum() == 0
    assert all(torch.equal(value, before[name]) for name, value in parts.model.state_dict().items())


def test_the_step_moves_correction_biases_towards_an_even_load(tmp_path: Path) -> None:
    parts = assembly.assemble(small_run(tmp_path, *BIASED))
    layers = parts.model.moe_layers()
    counter = RoutingCounter(layers)
    parts.model.loss(torch.randint(0, 256, (4, 16)), torch.randint(0, 256, (4, 16)))
    counts = {index: moe.tokens_per_expert.clone() for index, moe in layers.items()}
    counter.step_done()
    for index, moe in layers.items():
        load = counts[index].to(torch.float32)
        torch.testing.assert_close(moe.router.correction_bias, 0.01 * torch.sign(load.mean() - load))
        assert moe.tokens_per_expert.sum() == 0
    assert {layer.layer: list(layer.load) for layer in counter.report()} == {i: c.tolist() for i, c in counts.items()}
    assert all(layer.num_dead == 8 for layer in counter.report())


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    overrides = ("optimizer.lr=1e30", "schedule=constant", "schedule.warmup=0", "checkpoint.every=1")
    with pytest.raises(TrainingError, match=r"^step \d+: the loss term .* is (nan|inf); .*; try a smaller"):
        train(tmp_path, "train.steps=50", *overrides)
    assert not (tmp_path / "run/checkpoints").exists()  # the first update already leaves weights of no use


def test_a_gradient_that_is_no_number_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(*arguments: Any) -> dict[str, float]:
        model = arguments[0]
        losses = accumulate(*arguments)
        model.head.weight.grad[0, 0] = math.nan
        return losses

    monkeypatch.setattr(trainer, "accumulate", poisoned)
    with pytest.raises(TrainingError, match=r"^step 1: the gradient of head.weight is not finite"):
        train(tmp_path, "train.watch.max_skipped=0")


class StopsAfter(StopSignal):
    """A stop that comes in a step that was counted out."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.left = steps

    @property
    def requested(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("overrides", [(), ("optimizer=muon",), ("precision=bf16",), BIASED], ids=" ".join)
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    whole = train(tmp_path, *overrides, name="whole")
    first = train(tmp_path, *overrides, stop=StopsAfter(4))
    assert (first.end.reason, first.end.step) == ("interrupted", 4)
    second = train(tmp_path, *overrides, "checkpoint.resume=auto")
    assert second.start.first_step == 4
    assert "resumed from step_000004" in second.start.choices
    assert first.losses + second.losses == whole.losses
    assert [event.routing for event in first.steps + second.steps] == [event.routing for event in whole.steps]
    assert second.evaluations[-1].loss == whole.evaluations[-1].loss
    assert second.end.sample == whole.end.sample


def test_a_resumed_run_keeps_the_precision_that_was_decided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, "precision=auto", stop=StopsAfter(2))
    monkeypatch.setattr(assembly, "measure", lambda chip: Speed({"fp32": 0.1, "bf16": 0.9}, 10.0))
    resumed = train(tmp_path, "precision=auto", "checkpoint.resume=auto")
    assert "precision fp32: as the run was started" in resumed.start.choices
    assert "in fp32 (measured)" in resumed.start.hardware


def test_a_used_directory_is_not_overwritten(tmp_path: Path) -> None:
    train(tmp_path)
    with pytest.raises(ConfigError, match=r"^checkpoint.resume: found 'never'; .* holds checkpoints of another run"):
        train(tmp_path)


def test_a_finished_run_only_evaluates_when_it_is_resumed(tmp_path: Path) -> None:
    first, again = train(tmp_path), train(tmp_path, "checkpoint.resume=auto")
    assert again.steps == []
    assert again.evaluations[-1].loss == first.evaluations[-1].loss
    assert isinstance(again.end, RunFinished)
    settings = json.loads(next((tmp_path / "run").glob("checkpoints/*/state.json")).read_text())["settings"]
    assert settings["model"]["name"] == "tiny_moe"


def test_predictions_stand_beside_what_happens(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    run = small_run(tmp_path, "train.batch_size=4", "train.micro_batch=2")
    loop.train(run, tmp_path / "run", [metrics])
    metrics.close()
    records = read_metrics(metrics.path)
    started, finished = records[0], records[-1]
    assert started["predicted"] == finished["predicted"]
    # Nothing was measured of this machine's operations (`quick`); memory follows from shapes alone.
    assert started["predicted"]["step_time_s"] is None
    needed = peak_memory(run.model, batch_size=2, seq_len=16, optimizer=run.optimizer, grad_accumulation=2).total
    assert started["predicted"]["peak_memory_gib"] == pytest.approx(needed)
    times = sorted(record["step_time_s"] for record in records if record["event"] == "step")
    assert times[0] <= finished["step_time_s"] <= times[-1]
    assert finished["mfu"] > 0
    assert finished["peak_memory_gib"] is None or finished["peak_memory_gib"] >= 0


def test_a_resumed_run_keeps_its_micro_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = small_run(tmp_path, "train.steps=2", "train.batch_size=4")
    loop.train(first, tmp_path / "run")
    state = json.loads((tmp_path / "run/checkpoints/step_000002/state.json").read_text())
    assert (state["micro_batch"], state["recompute"]) == (4, "none")
    # A machine with less memory, or another speed, would choose otherwise now.
    monkeypatch.setattr(assembly, "available_gib", lambda device: 1e-4)
    more = small_run(
        tmp_path, "train.steps=4", "train.batch_size=4", "train.check_memory=false", "checkpoint.resume=auto"
    )
    listener = Listener()
    loop.train(more, tmp_path / "run", [listener])
    assert "micro-batch 4 of 4 sequences: as the run was started" in listener.start.choices
    with pytest.raises(ConfigError, match=r"^train: .* needs .* GiB"):
        loop.train(small_run(tmp_path, "train.steps=4"), tmp_path / "other")

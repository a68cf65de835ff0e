"""What a run keeps and measures beside its weights: their moving average, the noise scale, a batch that grows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.train.runs import Listener, small_run
from zoo.data.batches import Batches
from zoo.spec.base import ConfigError
from zoo.train.ema import AVERAGE, Ema, average_of
from zoo.train.events import StepDone
from zoo.train.loop import Session, train
from zoo.train.noise import NoiseScale
from zoo.train.schedule import batch_sizes
from zoo.train.signals import StopSignal


def test_the_average_follows_its_formula_and_swaps_back() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    ema = Ema([("weight", weight)], decay=0.5)
    values, average = [1.0, 3.0, 7.0, 15.0], None
    for steps, value in enumerate(values):
        with torch.no_grad():
            weight.fill_(value)
        ema.step()
        kept = min(0.5, (1 + steps) / (10 + steps))
        average = value if average is None else kept * average + (1 - kept) * value
    held = ema.state[weight][AVERAGE]
    assert held.dtype == torch.float32
    assert held.tolist() == pytest.approx([average] * 2)
    with ema.swapped():
        assert weight.tolist() == [torch.tensor(average).bfloat16().item()] * 2
    assert weight.tolist() == [15.0] * 2


def test_a_run_reports_the_average_and_resumes_with_it(tmp_path: Path) -> None:
    settings = ["train.ema=0.9", "train.noise_scale=true", "train.eval_every=3", "checkpoint.every=3"]
    run, whole = small_run(tmp_path, *settings), Listener()
    train(run, tmp_path / "whole", [whole])
    for found in whole.evaluations:
        assert found.average_loss is not None
        assert found.average_loss != found.loss
    reported = [step.noise_scale_tokens for step in whole.steps]
    assert [number for number, value in enumerate(reported, 1) if value is not None] in ([], [3], [6], [3, 6])
    # The measurement leaves nothing behind: without it every loss is the same.
    plain = Listener()
    train(small_run(tmp_path, "train.ema=0.9", "train.eval_every=3"), tmp_path / "plain", [plain])
    assert plain.losses == whole.losses
    assert [found.average_loss for found in plain.evaluations] == [found.average_loss for found in whole.evaluations]
    # Stopped at step 3 and resumed, it ends where it would have.
    stop, resumed = StopSignal(), Listener()

    class Stopper(Listener):
        def step_done(self, event: StepDone) -> None:
            super().step_done(event)
            if event.step == 3:
                stop.number = 15

    train(run, tmp_path / "halves", [Stopper()], stop)
    again = small_run(tmp_path, *settings, "checkpoint.resume=auto")
    train(again, tmp_path / "halves", [resumed])
    assert resumed.evaluations[-1].average_loss == whole.evaluations[-1].average_loss
    assert resumed.losses == whole.losses[3:]


def test_no_average_is_kept_unless_asked_for(tmp_path: Path) -> None:
    session = Session(small_run(tmp_path), tmp_path / "run", [])
    assert average_of(session.parts.optimizers) is None


def test_the_noise_scale_of_made_up_gradients_is_found() -> None:
    """Gradients of a token: a fixed direction and noise of a known covariance."""
    generator, mean = torch.Generator().manual_seed(0), torch.full((64,), 0.1)
    noise, small, big = NoiseScale(), 8, 64
    estimates = []
    for _ in range(2000):
        tokens = mean + 0.5 * torch.randn(big, 64, generator=generator)
        noise.take(float(tokens[:small].mean(0).norm()), small, float(tokens.mean(0).norm()), big)
        if noise.tokens is not None:
            estimates.append(noise.tokens)
    expected = 64 * 0.25 / float(mean.square().sum())
    assert torch.tensor(estimates).median().item() == pytest.approx(expected, rel=0.15)


def test_the_noise_scale_of_nothing_is_not_known() -> None:
    noise = NoiseScale()
    assert noise.tokens is None
    noise.take(1.0, 4, 1.0, 4)
    assert noise.tokens is None
    noise.take(1.0, 4, 2.0, 8)  # a larger batch with a longer gradient: no noise to be seen
    assert noise.tokens is None


@given(
    sizes=st.lists(st.integers(1, 6), max_size=5),
    full=st.integers(1, 6),
    world=st.integers(1, 3),
    last=st.integers(1, 9),
)
def test_a_batch_that_grows_reads_every_row_once(sizes: list[int], full: int, world: int, last: int) -> None:
    tokens = torch.arange(5000).numpy()
    ranks = [
        Batches(tokens, batch_size=full, seq_len=3, seed=5, rank=rank, world_size=world, first_sizes=sizes)
        for rank in range(world)
    ]
    rows = [row for step in range(last) for batches in ranks for row in batches.batch(step)[0].tolist()]
    single = Batches(tokens, batch_size=1, seq_len=3, seed=5)
    assert rows == [single.batch(number)[0][0].tolist() for number in range(len(rows))]
    assert len(rows) == world * sum([*sizes, *[full] * last][:last])


def test_the_batch_grows_as_the_settings_say(tmp_path: Path) -> None:
    run, heard = small_run(tmp_path, "train.batch_warmup=3", "train.batch_start=1"), Listener()
    assert batch_sizes(run.train) == [1, 2, 3]
    train(run, tmp_path / "run", [heard])
    assert [step.num_tokens for step in heard.steps] == [16, 32, 48, 64, 64, 64]
    assert batch_sizes(run.train, unit=2) == [2, 2, 4]
    with pytest.raises(ConfigError, match=r"^train\.batch_warmup: found 3; all processes take 4 sequences together"):
        batch_sizes(run.train, unit=4)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.batch_start=2", r"^train\.batch_start: found 2; has no effect without train\.batch_warmup"),
        ("train.ema=1.0", r"^train\.ema: found 1\.0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tmp_path: Path, setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small_run(tmp_path, setting)

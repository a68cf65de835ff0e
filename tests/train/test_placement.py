"""What is chosen of a run before it starts, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import zoo
from tests.train.runs import small_run
from zoo.plan.own_memory import peak_memory
from zoo.plan.question import divisors
from zoo.spec.base import ConfigError
from zoo.spec.run import RunSpec
from zoo.train.placement import CLEARLY_FASTER, RESERVE, Placement, choose, place


def no_seconds(micro_batch: int, recompute: str) -> None:
    return None


@given(
    batch=st.integers(1, 256),
    weights=st.floats(0.1, 10),
    each=st.floats(0.01, 5),
    room=st.floats(0.05, 100),
    best=st.integers(0, 8),
)
def test_a_choice_never_exceeds_the_memory_and_keeps_the_batch(
    batch: int, weights: float, each: float, room: float, best: int
) -> None:
    def memory(micro_batch: int, recompute: str) -> float:
        return weights + each * micro_batch * (1.0 if recompute == "none" else 0.25)

    def seconds(micro_batch: int, recompute: str) -> float:
        return 1.0 + abs(micro_batch - 2**best) + (recompute == "layer")

    sizes = divisors(batch)[::-1]
    found = choose({"none": sizes, "layer": sizes}, memory, seconds, room)
    if found is None:
        assert memory(1, "layer") > room
        return
    micro_batch, recompute, reasons = found
    assert batch % micro_batch == 0
    assert memory(micro_batch, recompute) <= room
    assert (recompute == "layer") == (memory(1, "none") > room)
    assert len(reasons) == 1 + (batch > 1)
    largest = next(size for size in sizes if memory(size, recompute) <= room)
    assert micro_batch == largest or CLEARLY_FASTER * seconds(micro_batch, recompute) <= seconds(largest, recompute)


def test_a_smaller_micro_batch_is_taken_only_where_it_is_clearly_faster() -> None:
    times = {8: 1.0, 4: 0.99, 2: 0.5, 1: 0.4}
    found = choose({"none": [8, 4, 2, 1]}, lambda size, how: float(size), lambda size, how: times[size], None)
    assert found is not None
    assert found[0] == 8
    times[4] = 0.9
    found = choose({"none": [8, 4, 2, 1]}, lambda size, how: float(size), lambda size, how: times[size], None)
    assert found == (
        1,
        "none",
        ("micro-batch 1 of 8 sequences: it takes 1 GiB, and larger ones are predicted to be slower",),
    )


def placed(run: RunSpec, room_gib: float | None, decided: dict[str, object] | None = None) -> Placement:
    return place(run, compute="fp32", room_gib=room_gib, seconds=no_seconds, decided=decided)


def needed(run: RunSpec, micro_batch: int, recompute: str = "none") -> float:
    return peak_memory(
        run.model,
        batch_size=micro_batch,
        seq_len=run.train.seq_len,
        recompute=recompute,
        optimizer=run.optimizer,
        grad_accumulation=run.train.batch_size // micro_batch,
    ).total


def test_what_is_open_follows_the_memory(tmp_path: Path) -> None:
    run = small_run(tmp_path, "train.batch_size=64", "train.seq_len=64")
    whole = placed(run, None)
    assert (whole.micro_batch, whole.num_micro_batches, whole.recompute) == (64, 1, "none")
    assert whole.memory_gib == pytest.approx(needed(run, 64))
    half = placed(run, needed(run, 32) / (1 - RESERVE) * 1.001)
    assert (half.micro_batch, half.num_micro_batches, half.recompute) == (32, 2, "none")
    assert half.reasons[0].startswith("micro-batch 32 of 64 sequences: it takes ")
    assert half.reasons[1] == "recompute none: all activations fit"


def test_what_the_settings_say_is_no_choice(tmp_path: Path) -> None:
    run = small_run(tmp_path, "train.batch_size=64", "train.micro_batch=16", "train.recompute=layer")
    found = placed(run, None)
    assert (found.micro_batch, found.num_micro_batches, found.recompute, found.reasons) == (16, 4, "layer", ())


def test_a_resumed_run_keeps_what_it_was_started_with(tmp_path: Path) -> None:
    run = small_run(tmp_path, "train.batch_size=64")
    found = placed(run, None, {"micro_batch": 8, "recompute": "layer", "compute": "fp32"})
    assert (found.micro_batch, found.recompute) == (8, "layer")
    assert found.reasons == (
        "micro-batch 8 of 64 sequences: as the run was started",
        "recompute layer: as the run was started",
    )


def test_a_run_that_cannot_fit_is_refused_with_the_nearest_that_would(tmp_path: Path) -> None:
    run = small_run(
        tmp_path, "optimizer=adamw", "train.batch_size=64", "train.seq_len=64", "train.micro_batch=64",
        "train.recompute=none",
    )  # fmt: skip
    room = needed(run, 16) * 1.01
    with pytest.raises(ConfigError) as error:
        placed(run, room / (1 - RESERVE))
    text = str(error.value)
    assert text.startswith(f"train: {run.model.name} needs {needed(run, 64):.3g} GiB with train.micro_batch=64 ")
    assert f"cpu has {room:.3g} GiB to spare" in text
    assert f"train.micro_batch=16 ({needed(run, 16):.3g} GiB)" in text
    assert re.search(r"; or hardware=\w+ \(\d+ GiB on a device\)", text)
    assert text.endswith("train.check_memory=false")
    assert placed(run.replace(train=run.train.replace(check_memory=False)), room).micro_batch == 64


def test_what_fits_nowhere_is_said_to_fit_nowhere(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    run = run.replace(model=zoo.load("kimi_k2"))
    with pytest.raises(
        ConfigError, match=r"needs [\d,]+ GiB with .*; what would fit: model_scale=tiny \(.* GiB\); or try"
    ):
        placed(run, 1.0)


def test_a_micro_batch_divides_the_batch(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train.micro_batch: found 3; must divide train.batch_size, 4; or auto"):
        small_run(tmp_path, "train.micro_batch=3")

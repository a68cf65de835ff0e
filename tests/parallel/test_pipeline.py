"""What each stage of a pipeline has, what it says of a batch, and what it refuses."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from tests.models import small_spec
from tests.parallel import cases
from tests.parallel.pool import Pool
from zoo.decoder import build
from zoo.parallel import World, accumulate, clip_gradients, parallelize
from zoo.plan.layout import Layout
from zoo.spec.base import ConfigError


def names(name: str, layout: Layout) -> list[str]:
    model = parallelize(build(cases.spec_of(name), device="meta"), World.of(layout))
    return [parameter for parameter, _ in model.named_parameters()]


def test_every_parameter_has_its_name_and_one_stage(pool: Pool) -> None:
    first, last = pool.run(2, names, "hybrid", Layout(pp=2))
    whole = [name for name, _ in build(cases.spec_of("hybrid"), device="meta").named_parameters()]
    assert sorted(first + last) == sorted(whole)
    assert {name.split(".")[1] for name in first if name.startswith("layers")} == {"0", "1", "2"}
    assert "embed.weight" in first
    assert {"norm.weight", "head.weight"} <= set(last)


def test_pieces_of_a_stage_are_far_apart(pool: Pool) -> None:
    first, last = pool.run(2, names, "hybrid", Layout(pp=2, vp=2))
    # Six layers in four pieces of one, two, two, one.
    assert {name.split(".")[1] for name in first if name.startswith("layers")} == {"0", "3", "4"}
    assert {name.split(".")[1] for name in last if name.startswith("layers")} == {"1", "2", "5"}


@pytest.mark.parametrize("name", ["options", "mixers"])
def test_both_ends_have_the_embedding_that_both_need(name: str, pool: Pool) -> None:
    """Of `options` the head is tied; both predict further tokens, whose embeddings enter at the end."""
    first, last = pool.run(2, names, name, Layout(pp=2))
    shared = {"embed.weight", "embed.positions"} if name == "options" else {"embed.weight"}
    assert set(first) & set(last) == shared
    assert any(parameter.startswith("mtp.") for parameter in last)
    assert not any(parameter.startswith("mtp.") for parameter in first)


def embeddings(layout: Layout) -> Any:
    """After some steps."""
    world = World.of(layout)
    model = parallelize(cases.model_of(cases.spec_of("options"), torch.float32), world)
    cases.train(model, 3, world, 4)
    return model.embed.weight.detach().numpy()


def test_embeddings_on_both_ends_stay_the_same(pool: Pool) -> None:
    first, last = pool.run(2, embeddings, Layout(pp=2))
    assert np.array_equal(first, last)


def evaluation(name: str, layout: Layout) -> tuple[dict[str, float], float, int]:
    world = World.of(layout)
    model = cases.model_of(cases.spec_of(name), torch.float64)
    if layout.num_devices > 1:
        parallelize(model, world)
    batch = cases.own_rows(cases.batch_of(model.spec, 0), world.rows_index, layout.dp, 1)
    with torch.no_grad():
        losses = model.loss(*batch)
    return {key: float(value) for key, value in losses.items.items()}, float(losses.total), int(losses.num_tokens)


@pytest.mark.parametrize("layout", [Layout(pp=2), Layout(dp=2, pp=2, vp=2, shard=2)], ids=str)
def test_every_stage_knows_the_loss(layout: Layout, pool: Pool) -> None:
    ((expected, total, count),) = pool.run(1, evaluation, "mla_moe", Layout())
    for items, found_total, found_count in pool.run(layout.num_devices, evaluation, "mla_moe", layout):
        assert items == pytest.approx(expected, rel=1e-12)
        assert found_total == pytest.approx(total, rel=1e-12)
        assert found_count == count


def autocast_losses(layout: Layout) -> tuple[dict[str, float], float]:
    """Of a step in bf16, and the norm of its gradients."""
    world = World.of(layout)
    model = cases.model_of(cases.spec_of("mla_moe"), torch.float32)
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    batch = cases.batch_of(model.spec, 0)
    parallelize(model, world)
    losses = accumulate(model, batch, cases.ROWS // 4, autocast, world)
    return losses, clip_gradients(model.parameters(), None, world)


def test_the_same_in_bf16(pool: Pool) -> None:
    """A stage computes what the whole model does there, number by number."""
    ((losses, norm),) = pool.run(1, autocast_losses, Layout())
    for found_losses, found_norm in pool.run(2, autocast_losses, Layout(pp=2)):
        assert found_losses == pytest.approx(losses, rel=1e-6)
        assert found_norm == pytest.approx(norm, rel=1e-4)


def refusal(layout: Layout, rows: int, batch_size: int) -> str:
    world = World.of(layout)
    model = parallelize(build(small_spec(layers="2*(dense sparse)")), world)
    tokens = torch.zeros(rows, 8, dtype=torch.int64)
    try:
        accumulate(model, (tokens, tokens), batch_size, nullcontext, world)
    except ConfigError as error:
        return str(error)
    return ""


REFUSED: list[tuple[Layout, int, int, str]] = [
    (Layout(pp=2), 5, 2, "train.batch_size: found 2; with layout.pp, 2, it must divide the 5 rows of a process"),
    (
        Layout(pp=2, vp=2),
        5,
        1,
        "layout.vp: found 2; the 5 micro-batches of a step do not go through pieces",
    ),
]


@pytest.mark.parametrize(("layout", "rows", "batch_size", "reason"), REFUSED, ids=str)
def test_what_a_schedule_cannot_do_is_refused(
    layout: Layout, rows: int, batch_size: int, reason: str, pool: Pool
) -> None:
    for message in pool.run(2, refusal, layout, rows, batch_size):
        assert reason in message


def backward(layout: Layout) -> str:
    model = parallelize(build(small_spec()), World.of(layout))
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    try:
        model.loss(tokens, tokens)
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_pipeline_has_no_loss_to_go_back_from(pool: Pool) -> None:
    for message in pool.run(2, backward, Layout(pp=2)):
        assert "zoo.parallel.accumulate makes gradients" in message


def buffers(layout: Layout, micro_batches: int) -> tuple[int, int]:
    """Different buffers for what a stage receives in a step: streams, and their gradients."""
    world = World.of(layout)
    model: Any = parallelize(cases.model_of(cases.spec_of("hybrid"), torch.float32), world)
    cases.train(model, 1, world, micro_batches)
    (place,) = [model.pipeline._schedules[True][1]._stage]
    streams = {id(info.buffer) for infos in place.args_recv_info.values() for info in infos if info.buffer is not None}
    return len(streams), len({id(info.buffer) for infos in place.grad_recv_info.values() for info in infos})


def test_as_many_streams_are_in_memory_as_are_on_their_way(pool: Pool) -> None:
    # Of the first stage nothing is received but gradients, of the last nothing but streams, one at a time.
    assert pool.run(4, buffers, Layout(pp=4), 8) == [(0, 1), (3, 1), (2, 1), (1, 0)]
    assert pool.run(4, buffers, Layout(pp=4), 2) == [(0, 1), (2, 1), (2, 1), (2, 0)]

"""The search against pricing every layout one by one."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

import zoo
from zoo.plan.question import DEGREES, Question, ask, divisors
from zoo.plan.search import expanded, families, interleavings, micro_batches, num_expanded, priced, search

CASES = [
    ("qwen3_30b_a3b", "h100_8x", ("hardware.num_devices=16",)),
    ("llama3_8b", "h100_8x", ()),
    ("qwen3_30b_a3b", "gb300_nvl72", ("hardware.num_devices=24", "hardware.chip.memory_gib=120")),
    ("qwen3_8b", "tpu_v5p", ("hardware.num_devices=8",)),
]


def question(index: int) -> Question:
    model, hardware, overrides = CASES[index]
    return ask(model, hardware, overrides, seq_len=4096, global_batch=192 if "24" in str(overrides) else 256)


def one_by_one(q: Question) -> dict[tuple[object, ...], zoo.plan.estimate.Estimate]:
    """Every legal layout by loops, priced by `zoo.estimate`; degrees from the rules of the model's shape alone."""
    n, found = q.machine.num_devices, {}
    experts = [1, 8, 16] if "moe" in q.spec.slots else [1]
    for tp, pp, cp, ep in product(divisors(n), divisors(n), divisors(n), experts):
        if n % (tp * pp * cp) or cp > 4096 // 512:
            continue
        dp = n // (tp * pp * cp)
        for vp, micro, again in product((1, 2), (1, 4), ("none", "full")):
            layout = zoo.Layout(tp=tp, pp=pp, vp=vp, cp=cp, ep=ep, dp=dp)
            options = {"seq_len": q.seq_len, "global_batch": q.global_batch, "recompute": again}
            try:
                made = zoo.estimate(q.spec, q.machine, layout=layout, micro_batch=micro, **options)
            except zoo.ConfigError:
                continue
            if vp == 1 or q.global_batch // (dp * micro) >= pp:
                found[(layout, micro, again)] = made
    return found


@pytest.mark.parametrize("index", [0, 1])
def test_nothing_that_fits_is_quicker(index: int) -> None:
    q = question(index)
    found = search(q)
    every = one_by_one(q)
    assert len(every) > 50
    best = min(one.step_time_s for one in every.values() if one.total_memory_gib <= q.room_gib)
    assert found.num_fitting
    assert found.seconds[0] <= best * (1 + 1e-9)


@pytest.mark.parametrize("index", range(len(CASES)))
def test_bounds_lose_no_layout(index: int) -> None:
    """The winner of the search is that of the whole space, every interleaving and recomputation priced."""
    q = question(index)
    seconds, gib, fits = priced(q, "bf16", expanded(q, families(q)))
    found = search(q)
    assert found.fits[0]
    assert found.seconds[0] == pytest.approx(float(seconds[fits].min()), rel=1e-12)
    assert found.memory_gib[0] <= q.room_gib < float(gib.max())


@pytest.mark.parametrize("index", range(len(CASES)))
def test_rows_are_legal_and_priced_as_estimates_are(index: int) -> None:
    q = question(index)
    found = search(q)
    for row in np.unique(np.linspace(0, len(found) - 1, 7).astype(int)):
        made = zoo.estimate(
            q.spec,
            q.machine,
            layout=found.layout(row),
            micro_batch=found.micro_batch(row),
            recompute=found.recompute(row),
            seq_len=q.seq_len,
            global_batch=q.global_batch,
        )
        assert made.num_devices == q.machine.num_devices
        assert found.seconds[row] == pytest.approx(made.step_time_s)
        assert found.memory_gib[row] == pytest.approx(made.total_memory_gib)
        assert bool(found.fits[row]) == (made.total_memory_gib <= q.room_gib)


def test_order() -> None:
    found = search(question(0))
    number = found.num_fitting
    assert 0 < number < len(found)
    assert np.all(found.fits[:number])
    assert np.all(np.diff(found.seconds[:number]) >= 0)
    assert not np.any(found.fits[number:])
    assert found.num_legal > len(found)


def test_every_dimension_is_searched() -> None:
    table = expanded(question(0), families(question(0)))
    for name in (*DEGREES, "micro_batch", "recompute"):
        assert len(np.unique(table[name])) > 1, name
    assert set(table["micro_batch"]) == set(micro_batches(question(0)))
    columns = np.stack([table[name] for name in (*DEGREES, "micro_batch", "recompute")])
    assert np.unique(columns, axis=1).shape == columns.shape


def test_micro_batches_divide_the_batch_and_are_larger_for_small_models() -> None:
    small = ask("qwen3_0_6b", "h100_8x", seq_len=2048, global_batch=8 * 96)  # d_model 1024
    assert micro_batches(small) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128]
    assert micro_batches(question(1)) == [1, 2, 4, 8, 16]


def test_a_plan_leaves_room_for_the_allocator() -> None:
    q = question(0)
    assert q.room_gib == pytest.approx(0.96 * 80)
    tight, loose = search(replace(q, reserve=0.3)), search(replace(q, reserve=0.0))
    assert loose.seconds[0] <= search(q).seconds[0] <= tight.seconds[0]
    assert tight.memory_gib[0] <= 0.7 * 80


def test_weights_are_shared_nowhere_in_a_domain_and_everywhere() -> None:
    table = families(question(0))
    alone = (table["tp"] == 1) & (table["pp"] == 1) & (table["cp"] == 1)
    assert set(table["shard"][alone]) == {1, 8, 16}


def test_fixed_degrees_are_kept() -> None:
    q = replace(question(0), fixed={"tp": 2, "vp": 3, "micro_batch": 1})
    found = search(q)
    assert len(found)
    for name, value in q.fixed.items():
        assert set(found.table[name]) == {value}


def test_count_is_that_of_the_expansion() -> None:
    q = question(1)
    table = families(q)
    assert num_expanded(q, table) >= len(expanded(q, table)["tp"]) > 0.9 * num_expanded(q, table)


@pytest.mark.parametrize(
    ("layers", "stages", "pieces"),
    [(48, 4, [1, 2, 3, 4, 6, 12]), (62, 4, [1, 2, 3, 4, 6, 8]), (8, 1, [1]), (3, 4, [1])],
)
def test_interleavings_make_the_largest_piece_smaller(layers: int, stages: int, pieces: list[int]) -> None:
    found = interleavings(layers, stages)
    sizes = [-(-layers // (stages * vp)) for vp in found]
    assert sizes == sorted(set(sizes), reverse=True)
    assert found[0] == 1
    if layers % stages == 0:
        assert found == pieces


def test_space_without_a_legal_layout_is_empty() -> None:
    q = replace(question(1), global_batch=1, fixed={"dp": 8})
    assert len(search(q)) == 0

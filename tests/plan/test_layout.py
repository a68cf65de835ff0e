"""The algebra of layouts, and which of them are legal."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import zoo
from tests.models import small_spec
from zoo.plan.layout import RECOMPUTED, Layout, Points, recompute_parts
from zoo.plan.legal import check, legal, problems
from zoo.spec.model import ModelSpec

DEGREE = st.sampled_from([1, 2, 3, 4, 8])
LAYOUTS = st.builds(Layout, tp=DEGREE, pp=DEGREE, vp=DEGREE, cp=DEGREE, ep=DEGREE, etp=DEGREE, dp=DEGREE, shard=DEGREE)


def points(*layouts: Layout, seq_len: int = 64, global_batch: int = 48, micro_batch: int = 1) -> Points:
    return Points.of(layouts, seq_len=seq_len, global_batch=global_batch, micro_batch=micro_batch)


@given(LAYOUTS)
def test_devices_are_the_product(layout: Layout) -> None:
    assert layout.num_devices == layout.tp * layout.pp * layout.cp * layout.dp
    assert points(layout).num_devices[0] == layout.num_devices


@given(LAYOUTS)
def test_experts_and_their_replicas_fill_the_stage(layout: Layout) -> None:
    p = points(layout)
    assert p.expert_dp[0] * layout.ep * layout.etp * layout.pp == pytest.approx(layout.num_devices)


@given(LAYOUTS)
def test_every_sequence_is_worked_on_once(layout: Layout) -> None:
    p = points(layout)
    assert p.num_micro_batches[0] * p.micro_batch[0] * layout.dp == pytest.approx(p.global_batch[0])


@settings(max_examples=60)
@given(st.lists(LAYOUTS, min_size=1, max_size=6))
def test_many_layouts_are_judged_as_one_by_one(layouts: list[Layout]) -> None:
    spec = small_spec()
    together = legal(spec, points(*layouts))
    assert together.tolist() == [bool(legal(spec, points(layout))[0]) for layout in layouts]


@settings(max_examples=100)
@given(LAYOUTS)
def test_what_is_legal_divides(layout: Layout) -> None:
    spec = small_spec()
    if legal(spec, points(layout))[0]:
        assert 4 % layout.tp == 0
        assert any((spec.num_layers + ends) % (layout.pp * layout.vp) == 0 for ends in range(3))
        assert 6 % layout.ep == 0
        assert (layout.dp * layout.cp * layout.tp) % (layout.ep * layout.etp) == 0
        assert (layout.dp * layout.cp) % layout.shard == 0
        assert 48 % layout.dp == 0


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (Layout(tp=3), "tp 3 must divide the 4 heads"),
        (Layout(tp=8), "tp 8 must divide the 4 heads"),
        (Layout(ep=4, dp=4), "ep 4 must divide the 6 experts"),
        (Layout(ep=6, dp=4), "ep * etp, 6 * 1, must divide dp * cp * tp, 4 * 1 * 1"),
        (Layout(pp=5), "pp * vp, 5 * 1, must not exceed the 2 layers, embedding and head"),
        (Layout(vp=2), "vp 2 needs several stages"),
        (Layout(shard=2), "shard 2 must divide dp * cp, 1 * 1"),
        (Layout(dp=5), "micro_batch * dp, 1 * 5, must divide global_batch 48"),
        (Layout(cp=3), "cp 3 must divide half of seq_len 64"),
    ],
)
def test_illegal_layouts_say_why(layout: Layout, words: str) -> None:
    with pytest.raises(zoo.ConfigError) as caught:
        check(small_spec(), points(layout))
    assert words in str(caught.value)


def test_stages_are_even_unless_one_says_otherwise(load_model: Callable[[str], ModelSpec]) -> None:
    spec = load_model("llama3_1_405b")
    p = points(Layout(pp=10, dp=1), seq_len=64)
    with pytest.raises(zoo.ConfigError, match="must divide the 126 layers"):
        check(spec, p)
    check(spec, p, uneven_stages=True)


def test_embedding_and_head_may_stand_for_a_layer_each(load_model: Callable[[str], ModelSpec]) -> None:
    spec = load_model("llama3_1_405b")  # 126 layers; published with pp 16, vp 8 (Megatron-Bridge, 26.08)
    check(spec, points(Layout(pp=16, vp=8), seq_len=64))
    with pytest.raises(zoo.ConfigError, match="must not exceed the 126 layers"):
        check(spec, points(Layout(pp=16, vp=9), seq_len=64), uneven_stages=True)


def test_a_model_without_experts_has_no_expert_parallelism(load_model: Callable[[str], ModelSpec]) -> None:
    found = problems(load_model("llama3_8b"), points(Layout(ep=2, dp=2)))
    assert [rule for rule, broken in found if broken[0]] == ["ep {ep} needs experts; the model has none: set it to 1"]


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "2"])
def test_degrees_are_positive_integers(value: object) -> None:
    with pytest.raises(zoo.ConfigError, match=r"layout\.tp"):
        Layout(tp=value)  # type: ignore[arg-type]


def test_recompute_names() -> None:
    assert recompute_parts("none") == {}
    assert recompute_parts("full") == {"full": 1}
    assert recompute_parts("selective:mla_up_proj,mlp") == {"up": 1, "mlp": 1}
    assert set(recompute_parts("selective:core_attn,moe_act,layernorm,moe")) <= set(RECOMPUTED)
    assert recompute_parts("full+offload") == {"full": 1, "offload": math.inf}
    assert recompute_parts("selective:mlp+offload:20") == {"mlp": 1, "offload": 20}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("selective:everything", "allowed"),
        ("offload:some", "a number of layers"),
        ("offload:0", "a number of layers"),
        ("ful", "full"),
    ],
)
def test_unknown_names_of_recompute(name: str, words: str) -> None:
    with pytest.raises(zoo.ConfigError, match=words):
        recompute_parts(name)


def test_layers_are_offloaded_of_every_stage() -> None:
    p = Points.of(
        [Layout(), Layout(pp=4), Layout(pp=4)], seq_len=8, global_batch=4, recompute=["none", "offload:4", "offload"]
    )
    np.testing.assert_array_equal(p.offloaded(32), [0, 0.5, 1])


def test_one_setting_a_layout_or_one_for_all() -> None:
    some = Points.of([Layout(), Layout()], seq_len=[8, 16], global_batch=4, micro_batch=2, recompute=["none", "full"])
    np.testing.assert_array_equal(some.tokens, [16, 32])
    np.testing.assert_array_equal(some.again("full"), [0, 1])

"""Some layers stand for all: none of their neighbourhoods is missing, and no other one comes up."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.dryrun.stage import in_flight, layers_of, order, sends
from zoo.dryrun.windows import chosen, signatures, stand_ins
from zoo.plan.layout import Layout

PATTERNS = st.lists(st.sampled_from("abc"), min_size=1, max_size=20)


@settings(max_examples=30, deadline=None)
@given(PATTERNS)
def test_chosen_layers_are_neighbours_as_in_the_whole_model(kinds: list[str]) -> None:
    kept = chosen(kinds)
    short = [kinds[index] for index in kept]
    assert signatures(short) == [signatures(kinds)[index] for index in kept]
    assert {*signatures(short)} == {*signatures(kinds)}


@settings(max_examples=30, deadline=None)
@given(PATTERNS)
def test_every_layer_has_one_of_its_kind_to_stand_for_it(kinds: list[str]) -> None:
    kept = chosen(kinds)
    assert [kinds[kept[place]] for place in stand_ins(kinds, kept)] == kinds


def test_a_periodic_model_takes_few_layers() -> None:
    assert len(chosen(["dense"] * 3 + ["sparse"] * 58)) == 7
    assert len(chosen((["local"] * 5 + ["full"]) * 10)) < 16
    assert chosen(["dense"]) == [0]


def test_one_forward_one_backward() -> None:
    layout = Layout(pp=4)
    assert [in_flight(layout, stage, 16) for stage in range(4)] == [4, 3, 2, 1]
    assert in_flight(layout, 0, 2) == 2
    passes = [("forward", 0), ("forward", 1), ("backward", 0), ("forward", 2), ("backward", 1), ("backward", 2)]
    assert list(order(3, 2)) == passes


def test_interleaved_stages_keep_more() -> None:
    # (2 * 3 + 1 * 4 + 1) pieces of half a stage (arXiv:2104.04473, section 2.2)
    assert in_flight(Layout(pp=4, vp=2), 0, 16) == 6
    assert layers_of(8, Layout(pp=2, vp=2), 0) == [0, 1, 4, 5]
    assert [sends(Layout(pp=4), stage) for stage in range(4)] == [1, 2, 2, 1]

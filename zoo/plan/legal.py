"""Which layouts a model and a batch allow, and why not."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from math import gcd
from string import Formatter

import numpy as np

from zoo.plan.layout import Array, Mask, Points
from zoo.spec.base import ConfigError
from zoo.spec.model import ModelSpec
from zoo.spec.moe import MoESpec
from zoo.spec.parallel import ParallelSpec

ENDS = 2
"""Embedding and head, each of which may stand for a layer when a model is cut into pieces (Megatron-Core's
`account_for_embedding_in_pipeline_split` and `account_for_loss_in_pipeline_split`)."""


def head_counts(spec: ModelSpec) -> int:
    """The largest number that divides the heads of every sequence mixer; 0 without heads."""
    return gcd(*(getattr(block, "num_heads", 0) for block in spec.slots.values()))


def mixtures(spec: ModelSpec) -> list[MoESpec]:
    """All mixtures of experts of a model, once for each slot."""
    inner = [block.moe if isinstance(block, ParallelSpec) else block for block in spec.slots.values()]
    return [block for block in inner if isinstance(block, MoESpec)]


def problems(spec: ModelSpec, points: Points, uneven_stages: bool = False) -> Iterator[tuple[str, Mask]]:
    """Every rule as a sentence with the names of its numbers in braces, and where it is broken [n].

    Args:
        uneven_stages: stages may hold different numbers of layers.
    """
    p, layers, experts = points, spec.num_layers, [moe.num_experts for moe in mixtures(spec)]
    heads, stages = head_counts(spec), p.pp * p.vp
    if heads:
        yield f"tp {{tp}} must divide the {heads} heads of every mixer", _rest(heads, p.tp)
    yield f"tp {{tp}} must divide the width of the model, {spec.d_model}", _rest(spec.d_model, p.tp)
    rule = f"pp * vp, {{pp}} * {{vp}}, must not exceed the {layers} layers, embedding and head"
    yield rule, stages > layers + ENDS
    if not uneven_stages:
        even = np.any([np.mod(layers + ends, stages) == 0 for ends in range(ENDS + 1)], axis=0)
        rule = f"pp * vp, {{pp}} * {{vp}}, must divide the {layers} layers; or allow uneven stages (uneven_stages=True)"
        yield rule, np.asarray(~even & (stages <= layers + ENDS), dtype=np.bool_)
    yield "vp {vp} needs several stages; pp is {pp}", (p.vp > 1) & (p.pp == 1)
    yield "ep {ep} needs experts; the model has none: set it to 1", (p.ep > 1) & (not experts)
    for count in sorted(set(experts)):
        yield f"ep {{ep}} must divide the {count} experts", _rest(count, p.ep)
    for moe in mixtures(spec):
        yield f"etp {{etp}} must divide the width of an expert, {moe.d_expert}", _rest(moe.d_expert, p.etp)
    rule = "ep * etp, {ep} * {etp}, must divide dp * cp * tp, {dp} * {cp} * {tp}"
    yield rule, _rest(p.dp * p.cp * p.tp, p.ep * p.etp)
    yield "shard {shard} must divide dp * cp, {dp} * {cp}", _rest(p.dp * p.cp, p.shard)
    yield "cp {cp} must divide half of seq_len {seq_len}", (p.cp > 1) & _rest(p.seq_len, 2 * p.cp)
    rule = "micro_batch * dp, {micro_batch} * {dp}, must divide global_batch {global_batch}"
    yield rule, _rest(p.global_batch, p.micro_batch * p.dp)


def legal(spec: ModelSpec, points: Points, uneven_stages: bool = False) -> Mask:
    """Where no rule is broken, [n]."""
    broken = np.zeros(len(points), dtype=np.bool_)
    for _, mask in problems(spec, points, uneven_stages):
        broken |= mask
    return ~broken


def check(spec: ModelSpec, points: Points, uneven_stages: bool = False) -> None:
    """Raise for the first of `points`, which is most often the only one.

    Raises:
        ConfigError: one line for each rule that it breaks.
    """
    lines = [rule.format(**_numbers(points)) for rule, mask in problems(spec, points, uneven_stages) if mask[0]]
    if lines:
        raise ConfigError("\n".join(f"layout: {line}" for line in lines))


def check_given(spec: ModelSpec, point: Points, given: Collection[str]) -> None:
    """Raise for one layout of which only some numbers are given: no others can make a rule hold that names these alone.

    Raises:
        ConfigError: the first such rule that is broken.
    """
    for rule, mask in problems(spec, point, uneven_stages=True):
        named = {name for _, name, _, _ in Formatter().parse(rule) if name}
        if mask[0] and named <= set(given):
            raise ConfigError(f"layout: {rule.format(**_numbers(point))}")


def _numbers(points: Points) -> dict[str, int]:
    """Of the first."""
    return {name: int(value[0]) for name, value in vars(points).items() if isinstance(value, np.ndarray) and len(value)}


def _rest(whole: Array | float, part: Array) -> Mask:
    return np.asarray(np.mod(whole, part) != 0, dtype=np.bool_)

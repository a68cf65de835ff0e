"""Balancing: the losses against the formulas of their papers, and the direction of the bias update."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zoo.blocks.balance import balance_loss, count_choices, z_loss
from zoo.blocks.base import Context
from zoo.blocks.moe import MoE
from zoo.blocks.router import Router, Routing

D, E, C = 16, 8, 2
SIGMOID = {"type": "top_k", "score": "sigmoid", "correction_bias": True}


def routing(logits: Tensor, top_k: int = C, **options: Any) -> Routing:
    return Router(1, logits.shape[-1], top_k, **options).route(logits)


def switch_loss(route: Routing, valid: Tensor) -> float:
    """arXiv:2101.03961, equations 4 to 6, over the tokens of all rows; f divided by the choices of a token."""
    scores, indices = route.scores[valid], route.indices[valid]
    num_tokens, num_experts = scores.shape
    total = 0.0
    for expert in range(num_experts):
        share = float((indices == expert).sum()) / (num_tokens * indices.shape[-1])
        mean = sum(float(row[expert] / row.sum()) for row in scores) / num_tokens
        total += num_experts * share * mean
    return total


def sequence_loss(scores: Tensor, top_k: int) -> float:
    """arXiv:2412.19437, equations 17 to 20, of one sequence [t, e], with alpha 1."""
    num_tokens, num_experts = scores.shape
    chosen = [sorted(range(num_experts), key=lambda expert: -float(row[expert]))[:top_k] for row in scores]
    total = 0.0
    for expert in range(num_experts):
        f = num_experts / (top_k * num_tokens) * sum(expert in choice for choice in chosen)
        p = sum(float(row[expert] / row.sum()) for row in scores) / num_tokens
        total += f * p
    return total


def some_valid(seed: int) -> Tensor | None:
    """[3, 5] bool with left padding, one row of it whole; or None."""
    return [None, torch.arange(5) >= torch.tensor([[0], [2], [5]])][seed % 2]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["softmax", "sigmoid"]), st.integers(1, 3))
def test_batch_level_is_the_formula(seed: int, score: str, top_k: int) -> None:
    logits = torch.randn(3, 5, E, generator=torch.Generator().manual_seed(seed))
    route, valid = routing(logits, top_k, score=score), some_valid(seed)
    expected = switch_loss(route, torch.ones(3, 5, dtype=torch.bool) if valid is None else valid)
    assert float(balance_loss(route, "batch", valid)) == pytest.approx(expected, rel=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["softmax", "sigmoid"]), st.integers(1, 3))
def test_sequence_level_is_the_formula(seed: int, score: str, top_k: int) -> None:
    logits = torch.randn(3, 5, E, generator=torch.Generator().manual_seed(seed))
    route, valid = routing(logits, top_k, score=score), some_valid(seed)
    rows = list(route.scores) if valid is None else [row[keep] for row, keep in zip(route.scores, valid, strict=True)]
    expected = [sequence_loss(row, top_k) for row in rows if len(row)]
    assert float(balance_loss(route, "sequence", valid)) == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_by_sequence_the_scores_alone_choose() -> None:
    """Not the correction bias, which here sends all tokens to other experts."""
    router = Router(1, E, C, **{key: value for key, value in SIGMOID.items() if key != "type"})
    router.correction_bias[:C] = 100
    route = router.route(torch.randn(1, 9, E))
    assert set(route.indices.flatten().tolist()) == set(range(C))
    assert float(balance_loss(route, "sequence")) == pytest.approx(sequence_loss(route.scores[0], C), rel=1e-5)


@pytest.mark.parametrize("level", ["batch", "sequence"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_even_is_the_least_and_collapsed_the_most(score: str, level: str) -> None:
    """With preferences of equal strength, at the two ends: each expert as often as any other, and always the same."""
    strength = torch.tensor([4.0, 4.0] + [-4.0] * (E - C))
    even = torch.stack([strength.roll(C * token) for token in range(E // C)] * 3)
    losses = {
        "even": balance_loss(routing(even[None], score=score), level),
        "collapsed": balance_loss(routing(strength.expand(1, 12, E), score=score), level),
        "certain": balance_loss(routing(10 * strength.expand(1, 12, E), score=score), level),
        **{str(seed): balance_loss(routing(shuffled_rows(strength, seed), score=score), level) for seed in range(10)},
    }
    assert float(losses.pop("even")) == pytest.approx(1)
    assert float(losses.pop("certain")) == pytest.approx(E / C, rel=1e-3)
    collapsed = float(losses.pop("collapsed"))
    assert all(1 < float(loss) < collapsed for loss in losses.values())


def shuffled_rows(row: Tensor, seed: int) -> Tensor:
    """[1, 12, e], each token with the preferences of `row` in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([row[torch.randperm(len(row), generator=generator)] for _ in range(12)])[None]


@pytest.mark.parametrize("level", ["batch", "sequence"])
def test_undecided_scores_cost_one_whatever_is_chosen(level: str) -> None:
    assert float(balance_loss(routing(torch.zeros(2, 6, E)), level)) == pytest.approx(1)


@pytest.mark.parametrize("level", ["batch", "sequence"])
def test_going_down_the_loss_evens_the_load(level: str) -> None:
    """From a strong preference for two experts, by gradient alone."""
    bias = torch.tensor([2.0, 2.0] + [0.0] * (E - C), requires_grad=True)
    noise = torch.randn(4, 64, E)
    before = count_choices(routing(noise + bias).indices, E).sum(0)
    for _ in range(60):
        (grad,) = torch.autograd.grad(balance_loss(routing(noise + bias), level), bias)
        bias = (bias - 2 * grad).detach().requires_grad_()
    after = count_choices(routing(noise + bias).indices, E).sum(0)
    assert before.max() > 2.5 * before.float().mean()
    assert after.max() < 1.5 * after.float().mean()


def test_z_loss_is_the_formula() -> None:
    logits = torch.randn(2, 3, E)
    squares = [math.log(sum(math.exp(float(value)) for value in row)) ** 2 for row in logits.flatten(0, 1)]
    assert float(z_loss(routing(logits))) == pytest.approx(sum(squares) / 6, rel=1e-5)
    valid = torch.tensor([[True, False, True], [False, False, False]])
    assert float(z_loss(routing(logits), valid)) == pytest.approx((squares[0] + squares[2]) / 2, rel=1e-5)


@pytest.mark.parametrize("level", ["batch", "sequence"])
def test_nothing_but_padding_costs_nothing(level: str) -> None:
    route, nothing = routing(torch.randn(2, 3, E)), torch.zeros(2, 3, dtype=torch.bool)
    assert float(balance_loss(route, level, nothing)) == 0
    assert float(z_loss(route, nothing)) == 0


def moe(**balance: Any) -> MoE:
    return MoE(D, num_experts=E, top_k=C, d_expert=8, router=SIGMOID, balance=balance)


def test_what_is_recorded() -> None:
    x = torch.randn(2, 5, D)
    for balance, names in (
        ({}, {}),
        ({"aux_loss": 0.01}, {"balance": [0.01]}),
        ({"aux_loss": 0.01, "level": "sequence", "z_loss": 0.001}, {"balance": [0.01], "router_z": [0.001]}),
    ):
        block = moe(**balance)
        context = Context.of(x)
        block(x, context)
        assert context.coefficients == names
        assert {name: len(values) for name, values in context.losses.items()} == dict.fromkeys(names, 1)
        quiet = Context.of(x)
        block.eval()(x, quiet)
        assert not quiet.losses


@pytest.mark.parametrize("level", ["batch", "sequence"])
def test_padding_does_not_matter(level: str) -> None:
    block, x = moe(aux_loss=1.0, z_loss=1.0, level=level), torch.randn(2, 7, D)
    found = []
    for noise in (0.0, 5.0):
        changed = x.clone()
        changed[0, :3] += noise
        context = Context.of(changed)
        context.padding = torch.tensor([3, 0])
        block(changed, context)
        found.append(context.losses)
    assert found[0].keys() == found[1].keys() == {"balance", "router_z"}
    assert all(torch.equal(found[0][name][0], found[1][name][0]) for name in found[0])


def test_only_the_router_learns_from_balancing() -> None:
    block, x = moe(aux_loss=1.0, z_loss=1.0), torch.randn(2, 7, D)
    context = Context.of(x)
    block(x, context)
    sum(value for values in context.losses.values() for value in values).backward()
    learned = {name for name, parameter in block.named_parameters() if parameter.grad is not None}
    assert learned == {"router.weight"}


@given(st.lists(st.integers(0, 1000), min_size=E, max_size=E))
def test_the_bias_goes_towards_the_mean(load: list[int]) -> None:
    block = moe(bias_update_rate=0.5)
    block.tokens_per_expert.copy_(torch.tensor(load))
    block.update_bias()
    mean = sum(load) / E
    steps = [0.5 * ((count < mean) - (count > mean)) for count in load]
    assert block.router.correction_bias.tolist() == steps
    assert block.tokens_per_expert.tolist() == load


def test_without_a_rate_the_bias_stays() -> None:
    block = moe()
    block.tokens_per_expert[0] = 5
    block.update_bias()
    assert block.router.correction_bias.abs().sum() == 0


def test_bias_updates_even_the_load() -> None:
    block, x = moe(bias_update_rate=0.01), torch.randn(64, D)
    block.router.weight.data.copy_(torch.randn(E, D) / 4)
    x = x + 2 * block.router.weight.data[0] / block.router.weight.data[0].norm()  # expert 0 is liked by all
    worst = []
    for _ in range(60):
        block.tokens_per_expert.zero_()
        block(x)
        worst.append(float(block.tokens_per_expert.max() / block.tokens_per_expert.float().mean()))
        block.update_bias()
    assert worst[0] > 1.8
    assert worst[-1] < 1.4

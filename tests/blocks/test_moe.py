"""The whole block: its parts put together by hand, counters, padding, precision, a start without a decoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from zoo.blocks.base import Context, initialize
from zoo.blocks.moe import MoE
from zoo.blocks.norm import Norm
from zoo.spec.base import ConfigError, decode
from zoo.spec.moe import MoESpec

D = 32
BASE: dict[str, Any] = {"num_experts": 6, "top_k": 2, "d_expert": 16}
SIGMOID = {"type": "top_k", "score": "sigmoid", "correction_bias": True}
INPUT = {"type": "top_k", "score": "sigmoid", "weigh": "input"}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shared": {"num_shared_experts": 2, "d_shared_expert": 8},
    "gated_shared": {"num_shared_experts": 1, "shared_gate": True},
    "latent": {"d_latent": 8, "num_shared_experts": 1, "gated": False, "activation": "relu2"},
    "normed_latent": {"d_latent": 8, "latent_norm": True, "activation": "situ"},
    "biases": {"bias": True, "activation": "clamped_swish", "activation_limit": 1.0},
    "weighed_input": {"router": INPUT},
    "weighed_latent_input": {"router": INPUT, "d_latent": 8},
}


def block(**options: Any) -> MoE:
    """With weights large enough that every part matters."""
    made = MoE(D, **{**BASE, **options})
    initialize(made, 0.4, 0.4)
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return made


def by_hand(moe: MoE, x: Tensor) -> Tensor:
    """One token [d] through plain matrix products."""
    spec, state = moe.spec, dict(moe.named_parameters())
    routing = moe.router(x)
    inside = x if spec.d_latent is None else state["latent_down.weight"] @ x
    total = torch.zeros_like(inside)
    for weight, expert in zip(routing.weights, routing.indices.tolist(), strict=True):
        on_input = getattr(spec.router, "weigh", "output") == "input"
        output = expert_by_hand(moe, inside * weight if on_input else inside, expert)
        total = total + (output if on_input else output * weight)
    if spec.latent_norm:
        total = F.rms_norm(total, total.shape, state["latent_norm.weight"], 1e-6)
    if spec.d_latent is not None:
        total = state["latent_up.weight"] @ total
    if moe.shared is not None:
        opening = torch.sigmoid(state["shared_gate.weight"] @ x) if spec.shared_gate else 1
        total = total + moe.shared(x) * opening
    return total


def expert_by_hand(moe: MoE, x: Tensor, expert: int) -> Tensor:
    experts, spec = moe.experts, moe.spec
    if not spec.gated:
        return experts.down[expert] @ (experts.up[expert] @ x).clamp_min(0) ** 2
    hidden = experts.gate_up[expert] @ x + (experts.gate_up_bias[expert] if spec.bias else 0)
    gate, up = hidden[: spec.d_expert], hidden[spec.d_expert :]
    match spec.activation:
        case "silu":
            active = gate * torch.sigmoid(gate) * up
        case "situ":
            active = 4 * torch.tanh(gate / 4) * torch.sigmoid(gate) * 25 * torch.tanh(up / 25)
        case _:
            limit = spec.activation_limit or 0.0
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            active = (up + 1) * gate * torch.sigmoid(1.702 * gate)
    return experts.down[expert] @ active + (experts.down_bias[expert] if spec.bias else 0)


@pytest.mark.parametrize("backend", ["auto", "grouped", "grouped_mm", "loop"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_parts_put_together_by_hand(variant: str, backend: str) -> None:
    moe = block(**VARIANTS[variant])
    moe.experts.backend = backend
    x = torch.randn(9, D)
    expected = torch.stack([by_hand(moe, token) for token in x])
    torch.testing.assert_close(moe(x), expected, rtol=1e-4, atol=1e-5 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_gradients_agree_with_the_loop(variant: str) -> None:
    moe, x = block(**VARIANTS[variant]), torch.randn(2, 30, D, requires_grad=True)
    found = {}
    for backend in ("loop", "grouped", "grouped_mm"):
        moe.experts.backend = backend
        found[backend] = torch.autograd.grad(moe(x).square().sum(), [x, *moe.parameters()])
    for backend in ("grouped", "grouped_mm"):
        for one, other in zip(found[backend], found["loop"], strict=True):
            assert float((one - other).abs().max() / other.abs().max()) < 1e-5


def test_names_and_shapes() -> None:
    options = {"d_latent": 8, "latent_norm": True, "num_shared_experts": 2, "shared_gate": True, "router": SIGMOID}
    moe = block(**options)
    assert {name: tuple(tensor.shape) for name, tensor in moe.state_dict().items()} == {
        "router.weight": (6, 32),
        "router.correction_bias": (6,),
        "latent_down.weight": (8, 32),
        "experts.gate_up": (6, 32, 8),
        "experts.down": (6, 8, 16),
        "latent_norm.weight": (8,),
        "latent_up.weight": (32, 8),
        "shared.gate.weight": (32, 32),
        "shared.up.weight": (32, 32),
        "shared.down.weight": (32, 32),
        "shared_gate.weight": (1, 32),
    }


def test_leading_axes_are_free() -> None:
    moe, x = block(num_shared_experts=1).eval(), torch.randn(2, 3, 4, D)
    torch.testing.assert_close(moe(x).flatten(0, 2), moe(x.flatten(0, 2)))
    torch.testing.assert_close(moe(x[0, 0, 0]), moe(x)[0, 0, 0])
    assert moe(x[:0]).shape == (0, 3, 4, D)


def test_the_router_can_read_something_else() -> None:
    moe, x, other = block(), torch.randn(2, 5, D), torch.randn(2, 5, D)
    routing = moe.router(other.flatten(0, 1))
    expected = moe.experts(x.flatten(0, 1), routing.weights, routing.indices).view_as(x)
    torch.testing.assert_close(moe(x, router_input=other), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_starts_ready_without_a_decoder(variant: str) -> None:
    moe = MoE(D, **{**BASE, **VARIANTS[variant]})
    assert all(parameter.isfinite().all() for parameter in moe.parameters())
    assert moe(torch.randn(4, D)).isfinite().all()
    assert moe.tokens_per_expert.sum() == 8


def test_a_smaller_start_for_the_last_matrices() -> None:
    moe = MoE(128, num_experts=4, top_k=1, d_expert=64, d_latent=32, num_shared_experts=1)
    initialize(moe, 1.0, 0.01)
    small = {name for name, parameter in moe.named_parameters() if float(parameter.detach().std()) < 0.1}
    assert small == {"latent_up.weight", "shared.down.weight"}


def test_the_norm_inside_takes_after_the_model() -> None:
    options = {**BASE, "d_latent": 8, "latent_norm": True}
    norm = Norm(4).spec.replace(type="layer", bias=True, eps=1e-3, weight="plus_one")
    moe = MoE(D, decode(MoESpec, options), norm=norm)
    assert moe.latent_norm is not None
    assert moe.latent_norm.spec == norm.replace(type="rms", bias=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    moe, x = block(num_shared_experts=1), torch.randn(2, 30, D)
    expected = moe(x).detach()
    found = moe.to(dtype)(x.to(dtype)).detach()
    assert found.dtype == dtype
    # In bf16, a few tokens may choose other experts, so the typical difference counts.
    assert float((found.float() - expected).abs().median() / expected.abs().median()) < 0.02


def test_autocast() -> None:
    moe, x = block(num_shared_experts=1), torch.randn(2, 30, D)
    expected = moe(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        found = moe(x)
    assert found.dtype == torch.bfloat16
    assert float((found.detach().float() - expected).abs().median() / expected.abs().median()) < 0.02
    found.sum().backward()
    assert {parameter.grad.dtype for parameter in moe.parameters()} == {torch.float32}


def test_counts_only_in_training_mode() -> None:
    moe, x = block(), torch.randn(2, 7, D)
    moe.eval()(x)
    assert moe.tokens_per_expert.sum() == 0
    moe.train()(x)
    moe(x)
    expected = torch.bincount(moe.router(x).indices.flatten(), minlength=6)
    assert torch.equal(moe.tokens_per_expert, 2 * expected)
    assert "tokens_per_expert" not in moe.state_dict()
    moe.to(torch.bfloat16)
    assert moe.tokens_per_expert.dtype == torch.int64


def test_padding_does_not_count() -> None:
    moe, x = block(), torch.randn(2, 7, D)
    context = Context.of(x)
    context.padding = torch.tensor([3, 0])
    moe(x, context)
    seen = torch.cat((x[0, 3:], x[1]))
    assert torch.equal(moe.tokens_per_expert, torch.bincount(moe.router(seen).indices.flatten(), minlength=6))


@pytest.mark.parametrize("balance", [{}, {"aux_loss": 0.1, "z_loss": 0.1}, {"aux_loss": 0.1, "level": "sequence"}])
def test_recomputation_counts_and_records_once(balance: dict[str, Any]) -> None:
    moe, x = block(balance=balance, num_shared_experts=1), torch.randn(2, 7, D, requires_grad=True)
    gradients = {}
    for how in ("plain", "recomputed"):
        context = Context.of(x)
        moe.tokens_per_expert.zero_()
        if how == "plain":
            y = moe(x, context)
        else:
            y = checkpoint(moe, x, context, use_reentrant=False, context_fn=context.recompute_contexts)
        total = y.sum() + sum(value * 0.1 for values in context.losses.values() for value in values)
        gradients[how] = torch.autograd.grad(total, [x, *moe.parameters()])
        assert moe.tokens_per_expert.sum() == 2 * 7 * 2
        assert all(len(values) == 1 for values in context.losses.values())
    assert all(torch.equal(one, other) for one, other in zip(*gradients.values(), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 7}, r"MoESpec.top_k: found 7; must be at most num_experts \(6\)"),
        ({"num_experts": 0}, "MoESpec.num_experts: found 0"),
        ({"latent_norm": True}, "MoESpec.latent_norm: found True; needs d_latent"),
        ({"shared_gate": True}, "MoESpec.shared_gate: found True; needs num_shared_experts"),
        ({"router": {"type": "top"}}, "MoESpec.router.type: found 'top'; allowed: .*top_k"),
        ({"router": {"type": "top_k", "num_groups": 4}}, "MoESpec.router.num_groups: found 4; must divide num_experts"),
        ({"balance": {"bias_update_rate": 0.1}}, "balance.bias_update_rate: found 0.1; needs router.correction_bias"),
        (
            {"balance": {"aux_los": 0.1}},
            "balance.aux_los: found 0.1; .* did you mean aux_loss",
        ),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MoE(D, **{**BASE, **options})


@pytest.mark.parametrize("variant", VARIANTS)
def test_descriptions_survive_the_way_through_yaml(variant: str) -> None:
    spec = decode(MoESpec, {**BASE, **VARIANTS[variant]})
    assert decode(MoESpec, spec.to_dict()) == spec
    twin = decode(MoESpec, {**BASE, **VARIANTS[variant], "num_experts": 64, "top_k": 6}).shrunk(512)
    assert (twin.num_experts, twin.top_k, twin.d_expert) == (8, 2, 16)
    assert (twin.shared_gate, twin.gated, twin.latent_norm) == (spec.shared_gate, spec.gated, spec.latent_norm)
    assert twin.router == spec.router

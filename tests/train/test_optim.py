"""Parameter roles, decay, learning rates, and Muon against plain arithmetic on single matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from zoo.blocks.roles import Role, role_of
from zoo.config import load
from zoo.decoder import build
from zoo.spec.base import ConfigError
from zoo.spec.train import AdamWSpec, MuonSpec
from zoo.train.muon import COEFFICIENTS, Muon, matched_scale, orthogonalize
from zoo.train.optim import build_optimizers, set_lr


class Names(nn.Module):
    """Parameters under the names that a decoder uses."""

    SHAPES = {
        "embed.weight": (11, 4),
        "layers.0.mixer_norm.weight": (4,),
        "layers.0.mixer.q.weight": (6, 4),
        "layers.0.mixer.q.bias": (6,),
        "layers.0.mixer.a_log": (6, 4),
        "layers.0.ffn.router.weight": (3, 4),
        "layers.0.ffn.experts.gate_up": (3, 10, 4),
        "layers.0.ffn.experts.gate_up_bias": (3, 10),
        "layers.0.ffn.experts.down": (3, 4, 5),
        "head.weight": (11, 4),
    }

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in self.SHAPES.items():
            *path, leaf = name.split(".")
            module: nn.Module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            parameter = nn.Parameter(torch.randn(shape, generator=generator))
            parameter.grad = torch.randn(shape, generator=generator)
            module.register_parameter(leaf, parameter)


EXPECTED_ROLES = dict(
    zip(Names.SHAPES, "embedding vector matrix vector vector router experts vector experts head".split(), strict=True)
)


def test_roles_follow_names_and_shapes() -> None:
    assert {name: role_of(name, parameter) for name, parameter in Names().named_parameters()} == EXPECTED_ROLES


def groups_of(model: Names, spec: AdamWSpec | MuonSpec) -> dict[str, dict[str, object]]:
    return {
        name: {**group, "owner": type(optimizer).__name__}
        for optimizer in build_optimizers(model, spec)
        for group in optimizer.param_groups
        for name in group["param_names"]
    }


def test_adamw_decays_matrices_only() -> None:
    groups = groups_of(Names(), AdamWSpec(lr=1e-3, weight_decay=0.3))
    decayed = {name for name, group in groups.items() if group["weight_decay"] == 0.3}
    assert decayed == {name for name, role in EXPECTED_ROLES.items() if role not in (Role.EMBEDDING, Role.VECTOR)}
    assert {group["weight_decay"] for name, group in groups.items() if name not in decayed} == {0.0}
    assert all(group["fused"] for group in groups.values())


def test_adamw_decays_everything_when_told() -> None:
    groups = groups_of(Names(), AdamWSpec(lr=1e-3, weight_decay=0.3, decay="all"))
    assert {group["weight_decay"] for group in groups.values()} == {0.3}


def test_muon_takes_the_matrices_of_the_layers() -> None:
    spec = MuonSpec(lr=1e-2, adamw=AdamWSpec(lr=3e-3))
    groups = groups_of(Names(), spec)
    mine = {name for name, group in groups.items() if group["owner"] == "Muon"}
    assert mine == {name for name, role in EXPECTED_ROLES.items() if role in (Role.MATRIX, Role.EXPERTS)}
    assert groups["layers.0.ffn.experts.gate_up"]["num_parts"] == 2
    assert groups["layers.0.ffn.experts.down"]["num_parts"] == 1
    assert groups["layers.0.ffn.router.weight"]["lr"] == 3e-3


def test_every_parameter_moves_and_set_lr_scales_each_peak() -> None:
    model = Names()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizers = build_optimizers(model, MuonSpec(lr=1e-2, adamw=AdamWSpec(lr=3e-3)))
    set_lr(optimizers, 0.5)
    assert [group["lr"] for optimizer in optimizers for group in optimizer.param_groups] == [5e-3] * 2 + [1.5e-3] * 2
    for optimizer in optimizers:
        optimizer.step()
    assert all((parameter != before[name]).all() for name, parameter in model.named_parameters())


def plain_orthogonalize(matrix: Tensor, steps: int) -> Tensor:
    a, b, c = COEFFICIENTS
    x = matrix / matrix.norm()
    for _ in range(steps):
        x = a * x + b * x @ x.T @ x + c * x @ x.T @ x @ x.T @ x
    return x


def plain_muon(weight: Tensor, grads: list[Tensor], lr: float, weight_decay: float, momentum: float) -> Tensor:
    buffer = torch.zeros_like(weight)
    for grad in grads:
        buffer = momentum * buffer + grad
        update = plain_orthogonalize(grad + momentum * buffer, steps=5)
        weight = weight - lr * (0.2 * max(weight.shape) ** 0.5 * update + weight_decay * weight)
    return weight


def test_muon_on_a_stack_of_pairs_is_muon_on_each_matrix() -> None:
    generator = torch.Generator().manual_seed(1)
    stack = torch.randn(3, 10, 4, generator=generator)
    grads = [torch.randn(3, 10, 4, generator=generator) for _ in range(3)]
    parameter = nn.Parameter(stack.clone())
    group = {"params": [("gate_up", parameter)], "num_parts": 2}
    optimizer = Muon([group], lr=0.05, momentum=0.9, weight_decay=0.1)
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step()
    for expert in range(3):
        for rows in (slice(0, 5), slice(5, 10)):
            expected = plain_muon(stack[expert, rows], [grad[expert, rows] for grad in grads], 0.05, 0.1, 0.9)
            torch.testing.assert_close(parameter[expert, rows], expected, rtol=1e-4, atol=1e-5)


def test_the_scale_matches_the_rms_of_adamw() -> None:
    matrix = torch.randn(256, 64, generator=torch.Generator().manual_seed(2))
    update = orthogonalize(matrix, 5) * matched_scale(256, 64)
    assert update.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.2)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 24),
    columns=st.integers(1, 24),
    scale=st.floats(1e-4, 1e4),
    seed=st.integers(0, 2**16),
)
def test_orthogonalized_singular_values_are_near_one(rows: int, columns: int, scale: float, seed: int) -> None:
    """Started from singular values well above zero, all end in the band of the quintic, with the same vectors."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, rank, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(columns, rank, generator=generator)).Q
    values = torch.empty(rank).uniform_(0.2, 1.0, generator=generator)
    result = orthogonalize(scale * (left * values) @ right.T, steps=5)
    inside = left.T @ result @ right
    torch.testing.assert_close(inside, torch.diag(inside.diagonal()), rtol=0, atol=1e-3)
    assert ((inside.diagonal() > 0.65) & (inside.diagonal() < 1.25)).all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), batch=st.integers(1, 4))
def test_orthogonalize_treats_leading_dimensions_as_a_batch(seed: int, batch: int) -> None:
    matrices = torch.randn(batch, 6, 9, generator=torch.Generator().manual_seed(seed))
    singly = torch.stack([orthogonalize(matrix, 5) for matrix in matrices])
    torch.testing.assert_close(orthogonalize(matrices, 5), singly, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(orthogonalize(matrices.mT, 5), singly.mT, rtol=1e-4, atol=1e-5)


def test_an_expert_without_gradient_gets_no_update() -> None:
    assert orthogonalize(torch.zeros(2, 3, 4), 5).abs().max() == 0


def test_wider_models_learn_at_rates_that_follow_from_the_width() -> None:
    narrow, wide = (
        {
            name: (group["lr"], group["weight_decay"])
            for optimizer in build_optimizers(Names(), MuonSpec(lr=0.2, adamw=AdamWSpec(lr=0.1)), ratio)
            for group in optimizer.param_groups
            for name in group["param_names"]
        }
        for ratio in (1.0, 4.0)
    )
    factors = {"matrix": 0.5, "experts": 0.5, "router": 0.25, "head": 0.25, "embedding": 1.0, "vector": 1.0}
    for name, role in EXPECTED_ROLES.items():
        assert wide[name][0] == pytest.approx(narrow[name][0] * factors[role])
        # What weights shrink by stays.
        assert wide[name][0] * wide[name][1] == pytest.approx(narrow[name][0] * narrow[name][1])


def test_rules_change_the_parameters_that_they_name() -> None:
    rules = [{"match": "*.experts.*", "lr_scale": 0.5}, {"match": "*.down", "weight_decay": 0.0}]
    groups = groups_of(Names(), AdamWSpec(lr=1e-3, weight_decay=0.3, rules=rules))
    found = {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()}
    assert found["layers.0.ffn.experts.gate_up"] == (5e-4, 0.3)
    assert found["layers.0.ffn.experts.down"] == (5e-4, 0.0)
    assert found["layers.0.mixer.q.weight"] == (1e-3, 0.3)
    with pytest.raises(ConfigError, match=r"^optimizer\.rules\.0\.match: found 'nothing'"):
        groups_of(Names(), AdamWSpec(lr=1e-3, rules=[{"match": "nothing"}]))


def test_initial_weights_follow_from_the_width() -> None:
    plain, scaled = ("model.d_model=64", "model.attention.num_heads=2"), ("model.init.width_base=16",)
    weights = []
    for overrides in (plain, plain + scaled):
        torch.manual_seed(0)
        weights.append(dict(build(load("tiny_moe", *overrides)).named_parameters()))
    for name, parameter in weights[0].items():
        factor = {"matrix": 0.5, "experts": 0.5, "router": 0.25, "head": 0.25}.get(role_of(name, parameter), 1.0)
        torch.testing.assert_close(weights[1][name], parameter * factor)
    with pytest.raises(ConfigError, match=r"^model\.init\.width_base: found 16.*head\.tied=false"):
        load("tiny_moe", *scaled, "model.head.tied=true")

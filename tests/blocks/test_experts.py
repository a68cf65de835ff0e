"""Every fast way through the experts against the plain loop: outputs and all gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from zoo.blocks import compiled
from zoo.blocks.dispatch import Dispatch
from zoo.blocks.experts import Experts
from zoo.spec.base import ConfigError

D, E, F, C = 32, 6, 16, 2
VARIANTS: dict[str, dict[str, Any]] = {
    "gated": {},
    "ungated": {"gated": False, "activation": "relu2"},
    "biases": {"bias": True, "activation": "clamped_swish", "activation_limit": 1.0},
    "ungated_biases": {"bias": True, "gated": False, "activation": "gelu"},
    "situ": {"activation": "situ"},
}
FAST = {"grouped": ("grouped", False), "recomputed": ("grouped", True), "grouped_mm": ("grouped_mm", False)}


def experts(
    num_experts: int = E, d_in: int = D, d_expert: int = F, dtype: Any = torch.float32, **options: Any
) -> Experts:
    """With weights large enough that the activations bend."""
    made = Experts(d_in, num_experts, d_expert, **options).to(dtype)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return made


def routes(kind: str, num_tokens: int = 40, num_experts: int = E) -> Tensor:
    """Indices [t, c]."""
    match kind:
        case "spread":
            return torch.rand(num_tokens, num_experts).topk(C).indices
        case "idle":  # experts 0 and 3 get nothing
            return torch.tensor([1, 2, 4, 5])[torch.rand(num_tokens, 4).topk(C).indices]
        case "collapsed":
            return torch.tensor([4, 1]).expand(num_tokens, C)
        case _:
            raise ValueError(kind)


def results(
    module: Experts, backend: str, recompute: bool, x: Tensor, w: Tensor | None, indices: Tensor
) -> list[Tensor]:
    """Output, then the gradients of x, of the weights if there are any, and of every parameter."""
    module.backend, module.recompute = backend, recompute
    x, w = x.clone().requires_grad_(), None if w is None else w.clone().requires_grad_()
    output = module(x, w, indices)
    probe = torch.linspace(-1, 1, output.numel()).view_as(output).to(output.dtype)
    wanted = [part for part in (x, w, *module.parameters()) if part is not None]
    return [output.detach(), *torch.autograd.grad((output * probe).sum(), wanted)]


def error(found: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest value."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    if not found.numel():
        return 0.0
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


def assert_agree(module: Experts, fast: str, x: Tensor, w: Tensor | None, indices: Tensor, bound: float) -> None:
    expected = results(module, "loop", False, x, w, indices)
    found = results(module, *FAST[fast], x, w, indices)
    assert max(error(one, other) for one, other in zip(found, expected, strict=True)) < bound


@pytest.mark.parametrize("fast", FAST)
@pytest.mark.parametrize("kind", ["spread", "idle", "collapsed"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_fast_paths_agree_with_the_loop(variant: str, kind: str, fast: str) -> None:
    assert_agree(experts(**VARIANTS[variant]), fast, torch.randn(40, D), torch.rand(40, C), routes(kind), 2e-6)


@pytest.mark.parametrize("fast", ["grouped", "recomputed"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_in_fp64(variant: str, fast: str) -> None:
    module = experts(dtype=torch.float64, **VARIANTS[variant])
    x, w = torch.randn(40, D, dtype=torch.float64), torch.rand(40, C, dtype=torch.float64)
    assert_agree(module, fast, x, w, routes("idle"), 1e-14)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_derivatives(variant: str) -> None:
    module = experts(3, 4, 4, dtype=torch.float64, backend="grouped", **VARIANTS[variant])
    names = [name for name, _ in module.named_parameters()]
    indices = torch.tensor([[0, 2], [2, 0], [0, 2]])

    def call(x: Tensor, w: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x, w, indices))

    x, w = torch.randn(3, 4, dtype=torch.float64), torch.rand(3, 2, dtype=torch.float64)
    inputs = [part.detach().requires_grad_() for part in (x, w, *module.parameters())]
    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("fast", FAST)
@pytest.mark.parametrize("variant", VARIANTS)
def test_bf16(variant: str, fast: str) -> None:
    """As close to fp64 as the loop is, within a factor of two."""
    module = experts(dtype=torch.bfloat16, **VARIANTS[variant])
    x, w, indices = torch.randn(40, D).to(torch.bfloat16), torch.rand(40, C), routes("idle")
    loop = results(module, "loop", False, x, w, indices)
    found = results(module, *FAST[fast], x, w, indices)
    exact = results(module.double(), "loop", False, x.double(), w.double(), indices)
    for mine, plain, true in zip(found, loop, exact, strict=True):
        assert mine.dtype == plain.dtype
        assert error(mine.double(), true) < max(2 * error(plain.double(), true), 0.01)


@pytest.mark.parametrize("fast", FAST)
def test_autocast(fast: str) -> None:
    module, x, w, indices = experts(), torch.randn(40, D), torch.rand(40, C), routes("idle")
    with torch.autocast("cpu", torch.bfloat16):
        found = results(module, *FAST[fast], x, w, indices)
        loop = results(module, "loop", False, x, w, indices)
    exact = results(module, "loop", False, x, w, indices)
    assert [part.dtype for part in found] == [torch.bfloat16, *[torch.float32] * 4]
    for mine, plain, true in zip(found, loop, exact, strict=True):
        assert error(mine.float(), true) < max(2 * error(plain.float(), true), 0.02)


def test_autocast_leaves_fp64_alone() -> None:
    module, x = experts(dtype=torch.float64), torch.randn(5, D, dtype=torch.float64)
    plain = module(x, None, routes("spread", 5))
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x, None, routes("spread", 5)).dtype == plain.dtype == torch.float64


@st.composite
def loads(draw: st.DrawFn) -> tuple[int, Tensor]:
    """A number of experts, and choices of which some experts may have many and some none."""
    num_experts, num_tokens = draw(st.integers(1, 9)), draw(st.integers(0, 20))
    top_k = draw(st.integers(1, num_experts))
    favourite = torch.tensor(draw(st.lists(st.floats(0, 5), min_size=num_experts, max_size=num_experts)))
    noise = torch.rand(num_tokens, num_experts, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    return num_experts, (favourite + noise).topk(top_k).indices


@settings(max_examples=40, deadline=None)
@given(loads(), st.sampled_from(["grouped", "recomputed"]), st.sampled_from(["gated", "ungated_biases"]), st.booleans())
def test_any_load(load: tuple[int, Tensor], fast: str, variant: str, weighted: bool) -> None:
    num_experts, indices = load
    module = experts(num_experts, 5, 3, **VARIANTS[variant])
    weights = torch.rand(indices.shape) if weighted else None
    assert_agree(module, fast, torch.randn(len(indices), 5), weights, indices, 1e-5)


@settings(max_examples=40, deadline=None)
@given(loads())
def test_dispatch_sorts_and_finds_back(load: tuple[int, Tensor]) -> None:
    num_experts, indices = load
    dispatch = Dispatch.of(indices, num_experts)
    sorted_experts = indices.flatten()[dispatch.order]
    assert torch.equal(sorted_experts, indices.flatten().sort(stable=True).values)
    assert torch.equal(dispatch.order.flatten()[dispatch.row], torch.arange(indices.numel()).view_as(indices))
    assert torch.equal(dispatch.token[dispatch.row], torch.arange(len(indices))[:, None].expand_as(indices))
    bounds = dispatch.bounds()
    for expert in range(num_experts):
        assert (sorted_experts[bounds[expert] : bounds[expert + 1]] == expert).all()
    assert bounds[-1] == indices.numel()


def test_more_experts_than_a_byte_counts() -> None:
    indices = torch.rand(30, 300).topk(4).indices
    assert_agree(experts(300, 4, 4), "grouped", torch.randn(30, 4), torch.rand(30, 4), indices, 1e-5)


@pytest.mark.parametrize("backend", ["loop", "grouped", "grouped_mm"])
def test_idle_experts_have_zero_gradients(backend: str) -> None:
    module = experts(backend=backend, bias=True)
    module(torch.randn(40, D), torch.rand(40, C), routes("idle")).sum().backward()
    for parameter in module.parameters():
        assert parameter.grad is not None
        busy = parameter.grad.flatten(1).abs().sum(1) > 0
        assert busy.tolist() == [False, True, True, False, True, True]


@pytest.mark.parametrize("backend", ["loop", "grouped", "grouped_mm", "auto"])
def test_experts_have_no_order(backend: str) -> None:
    module, shuffled, place = experts(backend=backend), experts(backend=backend), torch.randperm(E)
    for mine, other in zip(module.parameters(), shuffled.parameters(), strict=True):
        other.data.copy_(mine.data[place])
    x, w, indices = torch.randn(40, D), torch.rand(40, C), routes("spread")
    renamed = torch.argsort(place)[indices]
    torch.testing.assert_close(shuffled(x, w, renamed), module(x, w, indices))


def test_equal_inputs_give_equal_bits() -> None:
    module, x, w, indices = experts(), torch.randn(40, D), torch.rand(40, C), routes("spread")
    first, second = (results(module, "grouped", False, x, w, indices) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", ["grouped", "grouped_mm", "loop"])
def test_gradients_without_memory_of_their_own(backend: str) -> None:
    """The gradient of a sum is one number seen many times, that of a transpose has strides of its own."""
    module, x, w, indices = experts(backend=backend), torch.randn(40, D), torch.rand(40, C), routes("spread")
    x.requires_grad_()
    (expanded,) = torch.autograd.grad(module(x, w, indices).sum(), x)
    (whole,) = torch.autograd.grad(module(x, w, indices), x, torch.ones(40, D))
    torch.testing.assert_close(expanded, whole)
    probe = torch.randn(D, 40)
    (strided,) = torch.autograd.grad((module(x, w, indices).T * probe).sum(), x)
    (plain,) = torch.autograd.grad((module(x, w, indices) * probe.T.contiguous()).sum(), x)
    torch.testing.assert_close(strided, plain)


def test_inputs_without_memory_of_their_own() -> None:
    module, x, indices = experts(backend="grouped"), torch.randn(D, 40).T, routes("spread").T.contiguous().T
    torch.testing.assert_close(module(x, None, indices), module(x.contiguous(), None, indices.contiguous()))


@pytest.mark.parametrize("recompute", [False, True])
def test_activation_checkpoint(recompute: bool) -> None:
    module = experts(backend="grouped", recompute=recompute)
    x, w, indices = torch.randn(40, D, requires_grad=True), torch.rand(40, C), routes("spread")
    outside = checkpoint(module, x, w, indices, use_reentrant=False)
    plain = torch.autograd.grad(module(x, w, indices).square().sum(), [x, *module.parameters()])
    found = torch.autograd.grad(outside.square().sum(), [x, *module.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(found, plain, strict=True))


@pytest.mark.parametrize("frozen", [["gate_up"], ["down"], ["gate_up", "down"]])
def test_frozen_parameters(frozen: list[str]) -> None:
    module, x, w, indices = experts(backend="grouped"), torch.randn(40, D), torch.rand(40, C), routes("spread")
    whole = dict(zip(("x", "gate_up", "down"), _gradients(module, x, w, indices), strict=True))
    for name in frozen:
        module.get_parameter(name).requires_grad_(False)
    x = x.clone().requires_grad_()
    module(x, w, indices).square().sum().backward()
    for name, parameter in [("x", x), *module.named_parameters()]:
        assert (parameter.grad is None) == (name in frozen)
        assert name in frozen or torch.equal(parameter.grad, whole[name])


def _gradients(module: Experts, x: Tensor, w: Tensor, indices: Tensor) -> tuple[Tensor, ...]:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(module(x, w, indices).square().sum(), [x, *module.parameters()])


def test_used_twice_in_one_graph() -> None:
    module, x, w, indices = experts(backend="grouped"), torch.randn(40, D), torch.rand(40, C), routes("spread")
    twice = torch.autograd.grad(module(module(x, w, indices), w, indices).sum(), list(module.parameters()))
    module.backend = "loop"
    plain = torch.autograd.grad(module(module(x, w, indices), w, indices).sum(), list(module.parameters()))
    assert max(error(one, other) for one, other in zip(twice, plain, strict=True)) < 1e-5


@pytest.mark.parametrize(
    ("backend", "num_tokens", "dtype", "d_in"),
    [
        ("grouped_mm", 40, torch.float32, D),
        ("grouped", 40, torch.float64, D),
        ("grouped", 40, torch.float32, 30),  # rows that are no multiple of 16 bytes
        ("grouped", 200, torch.float32, D),  # many rows for each expert
    ],
)
def test_the_automatic_choice_fits(
    backend: str, num_tokens: int, dtype: torch.dtype, d_in: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without compiled kernels; with them: test_compiled.py."""
    monkeypatch.setattr(compiled, "is_loaded", lambda: False)
    module = experts(d_in=d_in, dtype=dtype)
    x, indices = torch.randn(num_tokens, d_in, dtype=dtype), routes("spread", num_tokens)
    assert module.backend_for(x, indices.numel()) == backend
    chosen = module(x, None, indices)
    module.backend = backend
    assert torch.equal(module(x, None, indices), chosen)


def test_shapes_and_flops_without_numbers() -> None:
    with FlopCounterMode(display=False) as counted:
        experts(backend="grouped")(torch.randn(40, D), torch.rand(40, C), routes("spread"))
    module = Experts(D, E, F).to("meta")
    x, indices = torch.empty(40, D, device="meta"), torch.empty(40, C, device="meta", dtype=torch.int64)
    for backend in ("auto", "loop", "grouped", "grouped_mm"):
        module.backend = backend
        with FlopCounterMode(display=False) as expected:
            assert module(x, torch.empty(40, C, device="meta"), indices).shape == x.shape
        assert counted.get_total_flops() == expected.get_total_flops() == 2 * 40 * C * 3 * D * F


def test_starts_ready() -> None:
    module = Experts(64, 8, 64, bias=True)
    module.init_weights(std=1.0, out_std=0.1)
    stds = {name: float(parameter.detach().std()) for name, parameter in module.named_parameters()}
    assert stds == {
        "gate_up": pytest.approx(1, rel=0.1),
        "down": pytest.approx(0.1, rel=0.1),
        "gate_up_bias": 0,
        "down_bias": 0,
    }


def test_mistakes() -> None:
    with pytest.raises(ConfigError, match=r"Experts.activation: found 'silly'"):
        Experts(D, E, F, activation="silly")
    with pytest.raises(ConfigError, match=r"experts: found 'fast'; allowed: auto, loop, grouped, grouped_mm, compiled"):
        Experts(D, E, F, backend="fast")(torch.randn(3, D), None, torch.zeros(3, 1, dtype=torch.int64))

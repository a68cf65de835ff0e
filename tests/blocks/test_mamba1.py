"""Mamba-1 against a plain recurrence and against transformers; cached, padded and packed passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.blocks import mixer_checks
from zoo.blocks import selective_scan as scan_module
from zoo.blocks.base import initialize
from zoo.blocks.mamba1 import Mamba1
from zoo.blocks.selective_scan import selective_scan, selective_step
from zoo.spec.base import ConfigError
from zoo.spec.mamba1 import Mamba1Spec

D = 16
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "inner_norms": {"inner_norms": True, "d_state": 5},
    "biases": {"bias": True, "conv_bias": False, "d_inner": 48, "dt_rank": 3},
    "narrow": {"conv_width": 1, "d_state": 1, "d_inner": 16},
}


def make(name: str) -> Mamba1:
    return mixer_checks.started(Mamba1(D, **OPTIONS[name]))


def plain(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, documents: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence token by token, shapes as in `selective_scan`."""
    rows = []
    for t in range(x.shape[1]):
        if documents is not None and t:
            state = state * (documents[:, t] == documents[:, t - 1])[:, None, None]
        state = state * (dt[:, t, :, None] * a).exp() + torch.einsum("bd,bd,bn->bdn", dt[:, t], x[:, t], b[:, t])
        rows.append(torch.einsum("bdn,bn->bd", state, c[:, t]))
    return torch.stack(rows, 1), state


def scan_inputs(length: int, strength: float = 1.0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Random inputs of two rows and four channels, with the state before them."""
    x, dt = torch.randn(2, length, 4, dtype=dtype), torch.rand(2, length, 4, dtype=dtype)
    b, c = torch.randn(2, 2, length, 3, dtype=dtype)
    return [x, dt, -strength * torch.rand(4, 3, dtype=dtype), b, c, torch.randn(2, 4, 3, dtype=dtype)]


@settings(deadline=None, max_examples=40)
@given(
    length=st.integers(1, 40),
    strength=st.sampled_from([0.0, 1.0, 16.0, 1000.0]),
    packed=st.booleans(),
    together=st.sampled_from([1, 100, 300, 2**20]),
    seed=st.integers(0, 99),
)
def test_scan_equals_the_recurrence_with_all_gradients(
    length: int, strength: float, packed: bool, together: int, seed: int
) -> None:
    torch.manual_seed(seed)
    inputs = [part.requires_grad_() for part in scan_inputs(length, strength)]
    documents = (torch.rand(2, length) < 0.2).cumsum(1) if packed else None
    expected = plain(*inputs, documents)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(scan_module.MOST_STATES, "cpu", together)
        found = selective_scan(*inputs, documents)
    weights = [torch.randn_like(part) for part in expected]
    gradients = [torch.autograd.grad(outputs, inputs, weights) for outputs in (found, expected)]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


def test_a_step_equals_the_recurrence() -> None:
    *inputs, state = scan_inputs(1)
    expected, after = plain(*inputs, state)
    x, dt, a, b, c = inputs
    found = selective_step(x[:, 0], dt[:, 0], a, b[:, 0], c[:, 0], state)
    torch.testing.assert_close((found, state), (expected[:, 0], after), rtol=0, atol=1e-12)


@pytest.mark.parametrize("strength", [0.01, 30.0, 1e4])
def test_fp32_is_exact_enough_however_strong_the_decay(strength: float) -> None:
    leaves = [part.requires_grad_() for part in scan_inputs(300, strength, torch.float32)]
    exact = [part.detach().double().requires_grad_() for part in leaves]
    for function, inputs in ((selective_scan, leaves), (plain, exact)):
        function(*inputs)[0].square().sum().backward()
    for part, wanted in zip(leaves, exact, strict=True):
        assert (part.grad - wanted.grad).abs().max() < 1e-4 * wanted.grad.abs().max()


def test_memory_of_the_scan_does_not_hold_the_states_of_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept for the backward pass: inputs and one state for each stretch of tokens, here of 64."""
    monkeypatch.setitem(scan_module.MOST_STATES, "cpu", 64 * 24)
    inputs = [part.requires_grad_() for part in scan_inputs(1024)]
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 8
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        selective_scan(*inputs)
    assert sum(kept.values()) < 1024 * 24 / 2 + 3 * sum(part.numel() for part in inputs)


@pytest.mark.parametrize("pieces", mixer_checks.PIECES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_cached_equals_whole(name: str, pieces: Sequence[int]) -> None:
    mixer_checks.check_cached(make(name), pieces)


@pytest.mark.parametrize("pieces", mixer_checks.PIECES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_left_padding_changes_nothing(name: str, pieces: Sequence[int]) -> None:
    mixer_checks.check_left_padding(make(name), pieces)


@pytest.mark.parametrize("name", OPTIONS)
def test_documents_of_a_row_do_not_meet(name: str) -> None:
    mixer_checks.check_documents(make(name))


def test_rows_of_a_state_can_be_chosen() -> None:
    mixer_checks.check_selected_rows(make("inner_norms"))


@pytest.mark.parametrize("name", OPTIONS)
def test_every_weight_learns(name: str) -> None:
    mixer_checks.check_every_weight_learns(make(name))


def test_low_precision_is_close_and_keeps_its_dtype() -> None:
    mixer_checks.check_low_precision(make("inner_norms"))


def test_steps_and_decays_start_as_released_models_did() -> None:
    block = Mamba1(D, d_inner=256)
    initialize(block, 0.02, 0.02)
    torch.testing.assert_close(block.a_log.detach().exp(), torch.arange(1.0, 17).expand(256, 16))
    steps = F.softplus(block.dt_bias)
    assert 0.99e-3 < steps.min() < 2e-3 < 0.05 < steps.max() < 0.101
    assert block.skip.eq(1).all()


def test_widths_follow_from_the_model() -> None:
    spec = Mamba1Spec().resolved(100)
    assert (spec.d_inner, spec.dt_rank) == (200, 7)
    assert Mamba1Spec(d_inner=64, dt_rank=2).resolved(100) == Mamba1Spec(d_inner=64, dt_rank=2)


def test_mistakes_are_explained() -> None:
    with pytest.raises(ConfigError, match=r"d_state: found 0; .*greater than 0"):
        Mamba1(D, d_state=0)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_tiny_twin_keeps_the_options(name: str) -> None:
    spec = Mamba1Spec.model_validate(OPTIONS[name])
    tiny = spec.shrunk(2048)
    changed = {"d_inner", "d_state", "dt_rank"}
    assert tiny.model_dump(exclude=changed) == spec.model_dump(exclude=changed)
    assert tiny.resolved(64) == tiny


# Parity with transformers.

SIZES: list[dict[str, Any]] = [
    {"d_inner": 32, "d_state": 5, "dt_rank": 4},
    {"d_inner": 48, "d_state": 16, "dt_rank": 1, "conv_width": 3, "bias": True, "conv_bias": False},
]


def jamba(sizes: dict[str, Any]) -> tuple[nn.Module, Mamba1]:
    from transformers.models.jamba.modeling_jamba import JambaConfig, JambaMambaMixer

    config = JambaConfig(
        hidden_size=D,
        mamba_expand=sizes["d_inner"] // D,
        mamba_d_state=sizes["d_state"],
        mamba_dt_rank=sizes["dt_rank"],
        mamba_d_conv=sizes.get("conv_width", 4),
        mamba_conv_bias=sizes.get("conv_bias", True),
        mamba_proj_bias=sizes.get("bias", False),
        rms_norm_eps=1e-6,
    )
    return filled(JambaMambaMixer(config, 0), Mamba1(D, **sizes, inner_norms=True))


def mamba(sizes: dict[str, Any]) -> tuple[nn.Module, Mamba1]:
    from transformers.models.mamba.modeling_mamba import MambaConfig, MambaMixer

    config = MambaConfig(
        hidden_size=D,
        expand=sizes["d_inner"] // D,
        state_size=sizes["d_state"],
        time_step_rank=sizes["dt_rank"],
        conv_kernel=sizes.get("conv_width", 4),
        use_conv_bias=sizes.get("conv_bias", True),
        use_bias=sizes.get("bias", False),
    )
    return filled(MambaMixer(config, 0), Mamba1(D, **sizes))


def filled(theirs: nn.Module, ours: Mamba1) -> tuple[nn.Module, Mamba1]:
    """Both with the same weights, large enough that every part matters."""
    held = dict(theirs.requires_grad_(False).named_parameters())
    for name, weight in held.items():
        weight.normal_(std=0.5)
        weight.add_("norm" in name)
    spec = ours.spec
    weights = {"a_log": held["A_log"], "skip": held["D"], "dt_bias": held["dt_proj.bias"]}
    weights["dt.weight"] = held["dt_proj.weight"]
    for kind in [name.removeprefix("in_proj.") for name in held if name.startswith("in_proj.")]:
        weights[f"x.{kind}"], weights[f"z.{kind}"] = held[f"in_proj.{kind}"].chunk(2)
    parts = held["x_proj.weight"].split([spec.dt_rank, spec.d_state, spec.d_state])
    weights |= {f"{name}.weight": part for name, part in zip(("dt_down", "b", "c"), parts, strict=True)}
    names = {"conv": "conv1d", "out": "out_proj"} | {f"{part}_norm": f"{part}_layernorm" for part in ("dt", "b", "c")}
    for our_name, name in names.items():
        for kind in ("weight", "bias"):
            if f"{name}.{kind}" in held:
                weights[f"{our_name}.{kind}"] = held[f"{name}.{kind}"]
    ours.requires_grad_(False).load_state_dict(weights)
    return theirs.eval(), ours


def largest_difference(theirs: nn.Module, ours: Mamba1, length: int, dtype: torch.dtype) -> float:
    """As a share of the standard deviation."""
    x = torch.randn(2, length, D, dtype=dtype)
    expected = theirs.to(dtype)(x)
    return float((ours.to(dtype)(x) - expected).abs().max() / expected.std())


@pytest.mark.parametrize("length", [1, 5, 70])
@pytest.mark.parametrize("sizes", SIZES, ids=["plain", "biases"])
@pytest.mark.parametrize("family", [jamba, mamba])
def test_equals_transformers(family: Any, sizes: dict[str, Any], length: int) -> None:
    theirs, ours = family(sizes)
    assert largest_difference(theirs, ours, length, torch.float32) < 1e-4
    assert largest_difference(theirs, ours, length, torch.float64) < 1e-9

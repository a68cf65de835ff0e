"""Mamba-2 against a plain recurrence and against transformers; cached, padded and packed passes."""

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
from zoo.blocks import ssd as ssd_module
from zoo.blocks.base import initialize
from zoo.blocks.mamba2 import Mamba2
from zoo.blocks.ssd import ssd, ssd_step
from zoo.spec.base import ConfigError
from zoo.spec.mamba2 import Mamba2Spec

D = 16
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "groups": {"num_groups": 2},
    "group_per_head": {"num_groups": 4, "conv_width": 2},
    "biases": {"bias": True, "conv_bias": False, "num_groups": 2, "norm_span": "full"},
    "bounded": {"dt_min": 0.3, "dt_max": 0.7, "norm_before_gate": True},
    "narrow": {"conv_width": 1, "d_state": 1, "head_dim": 4},
}


def make(name: str, **more: Any) -> Mamba2:
    options = {"num_heads": 4, "head_dim": 8, "d_state": 6, "chunk_size": 4, **OPTIONS[name], **more}
    return mixer_checks.started(Mamba2(D, **options))


def plain(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, documents: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence token by token, shapes as in `ssd`."""
    b, c = (part.repeat_interleave(x.shape[2] // part.shape[2], 2) for part in (b, c))
    rows = []
    for t in range(x.shape[1]):
        if documents is not None and t:
            state = state * (documents[:, t] == documents[:, t - 1])[:, None, None, None]
        state = state * (dt[:, t] * a).exp()[..., None, None]
        state = state + torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], b[:, t])
        rows.append(torch.einsum("bhpn,bhn->bhp", state, c[:, t]))
    return torch.stack(rows, 1), state


def scan_inputs(
    length: int, groups: int = 2, strength: float = 1.0, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Random inputs of two rows and four heads, with the state before them."""
    x, dt = torch.randn(2, length, 4, 3, dtype=dtype), torch.rand(2, length, 4, dtype=dtype)
    b, c = torch.randn(2, 2, length, groups, 5, dtype=dtype)
    return [x, dt, -strength * torch.rand(4, dtype=dtype), b, c, torch.randn(2, 4, 3, 5, dtype=dtype)]


@settings(deadline=None, max_examples=40)
@given(
    length=st.integers(1, 40),
    chunk_size=st.sampled_from([1, 3, 8, 64]),
    groups=st.sampled_from([1, 2, 4]),
    strength=st.sampled_from([0.0, 1.0, 16.0, 1000.0]),
    packed=st.booleans(),
    together=st.sampled_from([1, 150, 2**20]),
    seed=st.integers(0, 99),
)
def test_chunks_equal_the_recurrence_with_all_gradients(
    length: int, chunk_size: int, groups: int, strength: float, packed: bool, together: int, seed: int
) -> None:
    torch.manual_seed(seed)
    inputs = [part.requires_grad_() for part in scan_inputs(length, groups, strength)]
    documents = (torch.rand(2, length) < 0.2).cumsum(1) if packed else None
    expected = plain(*inputs, documents)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssd_module, "CACHED_ELEMENTS", together)
        found = ssd(*inputs[:5], chunk_size, inputs[5], documents)
        weights = [torch.randn_like(part) for part in expected]
        gradients = [torch.autograd.grad(outputs, inputs, weights) for outputs in (found, expected)]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


def test_a_step_equals_the_recurrence() -> None:
    *inputs, state = scan_inputs(1)
    expected, after = plain(*inputs, state)
    x, dt, a, b, c = inputs
    found = ssd_step(x[:, 0], dt[:, 0], a, b[:, 0], c[:, 0], state)
    torch.testing.assert_close((found, state), (expected[:, 0], after), rtol=0, atol=1e-12)


@pytest.mark.parametrize("strength", [1.0, 30.0, 1e4])
def test_fp32_is_exact_enough_however_strong_the_decay(strength: float) -> None:
    leaves = [part.requires_grad_() for part in scan_inputs(300, 2, strength, torch.float32)]
    found = ssd(*leaves[:5], 128, leaves[5])[0]
    found.square().sum().backward()
    exact = [part.detach().double().requires_grad_() for part in leaves]
    expected = plain(*exact)[0]
    expected.square().sum().backward()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    for part, wanted in zip(leaves, exact, strict=True):
        assert (part.grad - wanted.grad).abs().max() < 1e-4 * wanted.grad.abs().max().clamp_min(1)


def test_memory_of_the_scan_does_not_hold_matrices_of_the_whole_sequence() -> None:
    """What is kept for the backward pass: inputs, the result and some states; no [s, s], no decays between tokens."""
    x, dt, a, b, c, _ = scan_inputs(512, 1)
    inputs = [part.requires_grad_() for part in (x, dt, a, b, c)]
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: sizes.append(kept.numel()) or kept, lambda kept: kept):
        ssd(*inputs, 64)
    assert sum(sizes) < 3 * sum(part.numel() for part in inputs)


@pytest.mark.parametrize("pieces", mixer_checks.PIECES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_cached_equals_whole(name: str, pieces: Sequence[int]) -> None:
    mixer_checks.check_cached(make(name), pieces)


@pytest.mark.parametrize("pieces", mixer_checks.PIECES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_left_padding_changes_nothing(name: str, pieces: Sequence[int]) -> None:
    mixer_checks.check_left_padding(make(name), pieces)


@pytest.mark.parametrize("chunk_size", [3, 64])
@pytest.mark.parametrize("name", OPTIONS)
def test_documents_of_a_row_do_not_meet(name: str, chunk_size: int) -> None:
    mixer_checks.check_documents(make(name, chunk_size=chunk_size))


def test_rows_of_a_state_can_be_chosen() -> None:
    mixer_checks.check_selected_rows(make("groups"))


@pytest.mark.parametrize("name", OPTIONS)
def test_every_weight_learns(name: str) -> None:
    mixer_checks.check_every_weight_learns(make(name, dt_max=None))


def test_low_precision_is_close_and_keeps_its_dtype() -> None:
    mixer_checks.check_low_precision(make("groups"))


def test_chunk_size_changes_nothing() -> None:
    x = torch.randn(2, 23, D, dtype=torch.float64)
    blocks = [make("groups", chunk_size=size) for size in (1, 5, 64)]
    for block in blocks[1:]:
        block.load_state_dict(blocks[0].state_dict())
        torch.testing.assert_close(block(x), blocks[0](x), rtol=0, atol=1e-9)


def test_steps_and_decays_start_as_released_models_did() -> None:
    block = Mamba2(D, num_heads=256, head_dim=2)
    initialize(block, 0.02, 0.02)
    assert 1 <= block.a_log.exp().min() < 2 < 15 < block.a_log.exp().max() <= 16.001
    steps = F.softplus(block.dt_bias)
    assert 0.99e-3 < steps.min() < 2e-3 < 0.05 < steps.max() < 0.101
    assert steps.detach().log10().mean().item() == pytest.approx(-2, abs=0.15)  # log-uniform
    assert torch.cat((block.skip, block.norm.weight)).eq(1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_groups": 3}, r"num_groups: found 3; must divide num_heads \(4\)"),
        ({"dt_min": 0.1, "dt_max": 0.01}, r"dt_max: found 0\.01; must be above dt_min \(0\.1\)"),
        ({"norm_span": "head"}, r"norm_span: found 'head'; .*'group' or 'full'"),
        ({"d_states": 3}, r"d_states: found 3; unknown key .*did you mean d_state"),
    ],
)
def test_mistakes_are_explained(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Mamba2(D, num_heads=4, **options)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_tiny_twin_keeps_the_options(name: str) -> None:
    spec = Mamba2Spec.model_validate({"num_heads": 64, "num_groups": 8, **OPTIONS[name]})
    tiny = spec.shrunk(2048)
    changed = {"num_heads", "head_dim", "num_groups", "d_state", "chunk_size"}
    assert tiny.model_dump(exclude=changed) == spec.model_dump(exclude=changed)
    assert (tiny.num_groups > 1) == (spec.num_groups > 1)
    assert tiny.d_inner == 128


# Parity with transformers. The classes are one and the same but for the names of a config and the bounds of steps.

SIZES: list[dict[str, Any]] = [
    {"num_heads": 4, "head_dim": 8, "num_groups": 2, "d_state": 6},
    {"num_heads": 6, "head_dim": 8, "num_groups": 1, "d_state": 5, "bias": True, "conv_bias": False},
    {"num_heads": 2, "head_dim": 24, "num_groups": 2, "d_state": 16, "conv_width": 3},
]
CHUNK = 16


def nemotron_h(sizes: dict[str, Any]) -> tuple[nn.Module, Mamba2]:
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHConfig, NemotronHMamba2Mixer

    config = NemotronHConfig(
        hidden_size=D,
        layers_block_type=["mamba"],
        mamba_num_heads=sizes["num_heads"],
        mamba_head_dim=sizes["head_dim"],
        n_groups=sizes["num_groups"],
        ssm_state_size=sizes["d_state"],
        conv_kernel=sizes.get("conv_width", 4),
        use_conv_bias=sizes.get("conv_bias", True),
        use_bias=sizes.get("bias", False),
        chunk_size=CHUNK,
        time_step_min=0.5,
        layer_norm_epsilon=1e-6,
    )
    # It bounds the steps from below where the released models were trained without a bound; large, so that it matters.
    return filled(NemotronHMamba2Mixer(config, 0), Mamba2(D, **sizes, dt_min=0.5, chunk_size=CHUNK))


def granite_hybrid(sizes: dict[str, Any]) -> tuple[nn.Module, Mamba2]:
    from transformers.models.granitemoehybrid.modeling_granitemoehybrid import (
        GraniteMoeHybridConfig,
        GraniteMoeHybridMambaLayer,
    )

    config = GraniteMoeHybridConfig(**like_bamba(sizes), layer_types=["mamba"], rms_norm_eps=1e-6)
    return filled(GraniteMoeHybridMambaLayer(config, 0), Mamba2(D, **sizes, chunk_size=CHUNK))


def bamba_bounded(sizes: dict[str, Any]) -> tuple[nn.Module, Mamba2]:
    from transformers.models.bamba.modeling_bamba import BambaConfig, BambaMixer

    config = BambaConfig(**like_bamba(sizes), time_step_limit=(0.2, 0.9), rms_norm_eps=1e-6)
    return filled(BambaMixer(config, 0), Mamba2(D, **sizes, dt_min=0.2, dt_max=0.9, chunk_size=CHUNK))


def falcon_h1_normed_first(sizes: dict[str, Any]) -> tuple[nn.Module, Mamba2]:
    from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1Config, FalconH1Mixer

    config = FalconH1Config(
        **like_bamba(sizes),
        mamba_d_ssm=sizes["num_heads"] * sizes["head_dim"],
        mamba_norm_before_gate=True,
        mamba_rms_norm=True,
        projectors_bias=sizes.get("bias", False),
        ssm_in_multiplier=1.0,
        rms_norm_eps=1e-6,
    )
    theirs = FalconH1Mixer(config, 0)
    theirs.mup_vector = 1.0  # factors on the projections, which its model sets
    return filled(theirs, Mamba2(D, **sizes, norm_before_gate=True, chunk_size=CHUNK))


def like_bamba(sizes: dict[str, Any]) -> dict[str, Any]:
    return {
        "hidden_size": D,
        "num_hidden_layers": 1,
        "mamba_expand": sizes["num_heads"] * sizes["head_dim"] // D,
        "mamba_n_heads": sizes["num_heads"],
        "mamba_d_head": sizes["head_dim"],
        "mamba_n_groups": sizes["num_groups"],
        "mamba_d_state": sizes["d_state"],
        "mamba_d_conv": sizes.get("conv_width", 4),
        "mamba_conv_bias": sizes.get("conv_bias", True),
        "mamba_proj_bias": sizes.get("bias", False),
        "mamba_chunk_size": CHUNK,
    }


def filled(theirs: nn.Module, ours: Mamba2) -> tuple[nn.Module, Mamba2]:
    """Both with the same weights, large enough that every part matters."""
    held = dict(theirs.requires_grad_(False).named_parameters())
    for name, weight in held.items():
        weight.normal_(std=0.5)
        weight.add_("norm" in name)
    spec = ours.spec
    shared_width = spec.num_groups * spec.d_state
    widths = [spec.d_inner, spec.d_inner, shared_width, shared_width, spec.num_heads]
    weights = {"a_log": held["A_log"], "skip": held["D"], "dt_bias": held["dt_bias"]}
    for kind in [name.removeprefix("in_proj.") for name in held if name.startswith("in_proj.")]:
        rows = held[f"in_proj.{kind}"].split(widths)
        weights |= {f"{name}.{kind}": part for name, part in zip(("z", "x", "b", "c", "dt"), rows, strict=True)}
    names = {"conv": "conv1d", "norm": "norm", "out": "out_proj"}
    for our_name, name in names.items():
        for kind in ("weight", "bias"):
            if f"{name}.{kind}" in held:
                weights[f"{our_name}.{kind}"] = held[f"{name}.{kind}"]
    ours.requires_grad_(False).load_state_dict(weights)
    return theirs.eval(), ours


FAMILIES = [nemotron_h, granite_hybrid, bamba_bounded, falcon_h1_normed_first]


def largest_difference(theirs: nn.Module, ours: Mamba2, length: int, dtype: torch.dtype) -> float:
    """As a share of the standard deviation."""
    x = torch.randn(2, length, D, dtype=dtype)
    ours, expected = ours.requires_grad_(False), theirs.to(dtype)(x)
    return float((ours.to(dtype)(x) - expected).abs().max() / expected.std())


@pytest.mark.parametrize("length", [1, 5, 16, 50])
@pytest.mark.parametrize("sizes", SIZES, ids=["groups", "biases", "group_per_head"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers(family: Any, sizes: dict[str, Any], length: int) -> None:
    assert largest_difference(*family(sizes), length, torch.float32) < 1e-4


@pytest.mark.parametrize("sizes", SIZES, ids=["groups", "biases", "group_per_head"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers_in_fp64(family: Any, sizes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Their scan casts to fp32 whatever the dtype, and ours does not: its rounding is all that parts them."""
    theirs, ours = family(sizes)
    assert largest_difference(theirs, ours, 50, torch.float64) < 1e-5
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    assert largest_difference(theirs, ours, 50, torch.float64) < 1e-9


def test_the_bound_of_steps_is_a_departure() -> None:
    """Without it, the released definition, the result is another one wherever a step is small."""
    theirs, bounded = nemotron_h(SIZES[0])
    free = Mamba2(D, **SIZES[0], chunk_size=CHUNK)
    free.load_state_dict(bounded.state_dict())
    assert largest_difference(theirs, free, 20, torch.float32) > 1e-2

"""The gated delta rule against a plain recurrence and against transformers; cached, padded and packed passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.blocks import mixer_checks
from zoo.blocks.base import Context, initialize
from zoo.blocks.delta import GatedDelta, GatedNorm
from zoo.blocks.delta_rule import delta_chunks, delta_step
from zoo.spec.base import ConfigError
from zoo.spec.delta import DeltaSpec

D = 40
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one_key_head": {"num_qk_heads": 1},
    "shared_key_heads": {"num_qk_heads": 2, "v_head_dim": 10},
    "negative_eigenvalues": {"beta_scale": 2.0, "v_head_dim": 12, "norm_eps": 1e-5},
    "channels": {"decay": {"per": "channel", "rank": 6}, "gate_rank": 6, "gate_activation": "sigmoid"},
    "channels_bounded": {"decay": {"per": "channel", "lower_bound": -5.0}, "norm_weight": "fp32"},
    "channels_shared": {"decay": {"per": "channel"}, "num_qk_heads": 2, "conv_width": 2},
    "bounded": {"decay": {"lower_bound": -3.0}, "conv_width": 1},
}


def make(name: str, **more: Any) -> GatedDelta:
    block = GatedDelta(D, **{"num_heads": 4, "head_dim": 8, "chunk_size": 4, **OPTIONS[name], **more}).double()
    initialize(block, 0.3, 0.3)
    return block


def plain(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor, documents: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence token by token, shapes as in `delta_chunks`."""
    q, k = (part.repeat_interleave(v.shape[2] // part.shape[2], 2) for part in (q, k))
    rows = []
    for t in range(q.shape[1]):
        if documents is not None and t:
            state = state * (documents[:, t] == documents[:, t - 1])[:, None, None, None]
        state = state * log_decay[:, t].exp()[..., None]
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        state = state + torch.einsum("bh,bhk,bhv->bhkv", beta[:, t], k[:, t], error)
        rows.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(rows, 1), state


def rule_inputs(
    length: int, qk_heads: int = 2, per_channel: bool = False, strength: float = 1.0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    """Random inputs of two rows and four heads, with the state before them."""
    q, k = (F.normalize(torch.randn(2, length, qk_heads, 6, dtype=dtype), dim=-1) for _ in range(2))
    log_decay = -strength * torch.rand(2, length, 4, 6 if per_channel else 1, dtype=dtype)
    beta, v = 2 * torch.rand(2, length, 4, dtype=dtype), torch.randn(2, length, 4, 5, dtype=dtype)
    return q, k, v, log_decay, beta, torch.randn(2, 4, 6, 5, dtype=dtype)


@settings(deadline=None, max_examples=40)
@given(
    length=st.integers(1, 40),
    chunk_size=st.sampled_from([1, 2, 8, 64]),
    qk_heads=st.sampled_from([1, 2, 4]),
    per_channel=st.booleans(),
    strength=st.sampled_from([0.0, 0.3, 10.0, 1000.0]),
    packed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_chunks_equal_the_recurrence_with_all_gradients(
    length: int, chunk_size: int, qk_heads: int, per_channel: bool, strength: float, packed: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    inputs = [part.requires_grad_() for part in rule_inputs(length, qk_heads, per_channel, strength)]
    documents = (torch.rand(2, length) < 0.2).cumsum(1) if packed else None
    expected = plain(*inputs, documents)
    found = delta_chunks(*inputs, documents, chunk_size)
    weights = [torch.randn_like(part) for part in expected]
    gradients = [torch.autograd.grad(outputs, inputs, weights) for outputs in (found, expected)]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_step_equals_the_recurrence(per_channel: bool) -> None:
    *inputs, state = rule_inputs(1, 4, per_channel)
    expected, after = plain(*inputs, state)
    found = delta_step(*(part[:, 0] for part in inputs), state)
    torch.testing.assert_close(found, (expected[:, 0], after), rtol=0, atol=1e-12)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("strength", [1.0, 30.0, 300.0, 1e4])
def test_fp32_is_exact_enough_however_strong_the_decay(strength: float, per_channel: bool) -> None:
    inputs = rule_inputs(130, 4, per_channel, strength, torch.float32)
    leaves = [part.requires_grad_() for part in inputs]
    found = delta_chunks(*leaves)[0]
    expected = plain(*(part.detach().double() for part in inputs))[0]
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-5)
    found.square().sum().backward()
    assert all(part.grad.isfinite().all() for part in leaves)


def test_fp32_is_exact_enough_when_all_keys_are_the_same() -> None:
    """The triangular matrix is as far from the identity as it can be: powers of it would overflow fp32."""
    q, k, v, log_decay, beta, state = rule_inputs(128, 4, False, 0.0, torch.float32)
    k, beta = k[:, :1].expand_as(k), torch.full_like(beta, 1.999)
    found = delta_chunks(q, k, v, log_decay, beta, state)[0]
    expected = plain(*(part.double() for part in (q, k, v, log_decay, beta, state)))[0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pieces", mixer_checks.PIECES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_cached_equals_whole(name: str, pieces: list[int]) -> None:
    mixer_checks.check_cached(make(name), pieces)


@pytest.mark.parametrize("pieces", mixer_checks.PIECES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_left_padding_changes_nothing(name: str, pieces: list[int]) -> None:
    mixer_checks.check_left_padding(make(name), pieces)


@pytest.mark.parametrize("name", OPTIONS)
def test_documents_of_a_row_do_not_meet(name: str) -> None:
    mixer_checks.check_documents(make(name))


def test_rows_of_a_state_can_be_chosen() -> None:
    mixer_checks.check_selected_rows(make("shared_key_heads"))


@pytest.mark.parametrize("name", OPTIONS)
def test_every_weight_learns(name: str) -> None:
    mixer_checks.check_every_weight_learns(make(name))


@pytest.mark.parametrize("name", ["plain", "channels"])
def test_low_precision_is_close_and_keeps_its_dtype(name: str) -> None:
    block, x = make(name).float(), torch.randn(2, 20, D)
    expected = block(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = block(x)
    low = block.bfloat16()(x.bfloat16())
    assert mixed.dtype == low.dtype == torch.bfloat16
    for found in (mixed, low):
        assert (found.float() - expected).abs().max() < 0.05 * expected.std()


def test_decays_start_slow_and_varied() -> None:
    block = GatedDelta(D, num_heads=64, head_dim=4, decay={"per": "channel"})
    initialize(block, 0.02, 0.02)
    assert 1 <= block.a_log.exp().min() < 3 < 14 < block.a_log.exp().max() <= 16.001
    steps = F.softplus(block.dt_bias)
    assert 0.99e-3 < steps.min() < 2e-3 < 0.05 < steps.max() < 0.101


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_qk_heads": 3}, r"num_qk_heads: found 3; must divide num_heads \(4\)"),
        ({"beta_scale": 3.0}, r"beta_scale: found 3\.0; must be at most 2"),
        ({"chunk_size": 48}, r"chunk_size: found 48; must be a power of two"),
        ({"decay": {"lower_bound": 5.0}}, r"decay\.lower_bound: found 5\.0; .*less than 0"),
    ],
)
def test_mistakes_are_explained(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GatedDelta(D, **{"num_heads": 4, "head_dim": 8, **options})


def test_documents_and_a_state_are_refused_together() -> None:
    block, x = make("plain"), torch.randn(1, 4, D, dtype=torch.float64)
    with pytest.raises(ValueError, match="documents"):
        block(x, Context(torch.arange(4)[None], documents=torch.zeros(1, 4)), block.new_state(1, 4, x.device, x.dtype))


@pytest.mark.parametrize("name", OPTIONS)
def test_a_tiny_twin_keeps_the_options(name: str) -> None:
    spec = DeltaSpec.model_validate({"num_heads": 32, "head_dim": 128, **OPTIONS[name]})
    tiny = spec.shrunk(2048)
    assert tiny.num_heads * tiny.head_dim == 64
    kept = {"conv_width", "beta_scale", "gate_activation", "norm_weight", "norm_eps"}
    assert all(getattr(tiny, field) == getattr(spec, field) for field in kept)
    assert (tiny.qk_heads < tiny.num_heads) == (spec.qk_heads < spec.num_heads)
    assert tiny.decay.per == spec.decay.per
    assert bool(tiny.decay.rank) == bool(spec.decay.rank)


# Parity with transformers. One entry a class: what differs from Qwen3-Next is an option of ours and a name of theirs.


def qwen3_next(heads: dict[str, int]) -> tuple[torch.nn.Module, GatedDelta]:
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextConfig, Qwen3NextGatedDeltaNet

    theirs = Qwen3NextGatedDeltaNet(Qwen3NextConfig(hidden_size=D, num_hidden_layers=1, **linear(heads)), 0)
    ours = GatedDelta(D, **heads)
    qk, v = heads["head_dim"], heads["v_head_dim"] * heads["num_heads"] // heads["num_qk_heads"]
    qkvz = randomised(theirs)["in_proj_qkvz.weight"].unflatten(0, (heads["num_qk_heads"], -1)).split([qk, qk, v, v], 1)
    ba = theirs.in_proj_ba.weight.unflatten(0, (heads["num_qk_heads"], 2, -1)).unbind(1)
    q, k, v, gate, beta, decay = (part.flatten(0, 1) for part in (*qkvz, *ba))
    fill(ours, theirs, q=q, k=k, v=v, gate=gate, beta=beta, decay=decay, out=theirs.out_proj.weight)
    return theirs, ours


def qwen3_5(heads: dict[str, int]) -> tuple[torch.nn.Module, GatedDelta]:
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet, Qwen3_5TextConfig

    theirs = Qwen3_5GatedDeltaNet(Qwen3_5TextConfig(hidden_size=D, num_hidden_layers=1, **linear(heads)), 0)
    ours, held = GatedDelta(D, **heads), randomised(theirs)
    q, k, v = held["in_proj_qkv.weight"].split([part.out_features for part in (ours.q, ours.k, ours.v)])
    gate, beta, decay = (held[f"in_proj_{name}.weight"] for name in "zba")
    fill(ours, theirs, q=q, k=k, v=v, gate=gate, beta=beta, decay=decay, out=held["out_proj.weight"])
    return theirs, ours


def olmo_hybrid(heads: dict[str, int]) -> tuple[torch.nn.Module, GatedDelta]:
    from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridConfig, OlmoHybridGatedDeltaNet

    theirs = OlmoHybridGatedDeltaNet(OlmoHybridConfig(hidden_size=D, num_hidden_layers=4, **linear(heads)), 0)
    held = randomised(theirs)
    ours = GatedDelta(D, beta_scale=2.0, norm_eps=1e-5, **heads)
    names = {"q": "q", "k": "k", "v": "v", "beta": "b", "decay": "a", "gate": "g", "out": "o"}
    fill(ours, theirs, **{name: held[f"{their}_proj.weight"] for name, their in names.items()})
    return theirs, ours


KDA_NAMES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "beta": "b_proj", "out": "o_proj"}
LOW_RANK_NAMES = {"gate_down": "g_a_proj", "gate": "g_b_proj"}
LOW_RANK_NAMES |= {"decay_down": "forget_gate.f_a_proj", "decay": "forget_gate.f_b_proj"}
FULL_RANK_NAMES = {"gate": "g_proj", "decay": "forget_gate.f_proj"}
KDA: dict[str, Any] = {"num_heads": 3, "head_dim": 8, "gate_activation": "sigmoid", "norm_weight": "fp32"}


def kda(theirs: torch.nn.Module, names: dict[str, str], **options: Any) -> tuple[torch.nn.Module, GatedDelta]:
    held, ours = randomised(theirs), GatedDelta(D, **{**KDA, **options})
    fill(ours, theirs, **{name: held[f"{their}.weight"] for name, their in {**KDA_NAMES, **names}.items()})
    return theirs, ours


def kimi_linear(heads: dict[str, int]) -> tuple[torch.nn.Module, GatedDelta]:
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearConfig, KimiLinearDeltaAttention

    theirs = KimiLinearDeltaAttention(KimiLinearConfig(hidden_size=D, num_hidden_layers=2, **linear(KDA)), 0)
    return kda(theirs, LOW_RANK_NAMES, decay={"per": "channel", "rank": 8}, gate_rank=8)


def glm5_next(heads: dict[str, int]) -> tuple[torch.nn.Module, GatedDelta]:
    from transformers.models.glm5_next.modeling_glm5_next import Glm5NextTextConfig, Glm5NextTextLinearAttention

    config = Glm5NextTextConfig(hidden_size=D, num_hidden_layers=4, linear_lower_bound=-5.0, **linear(KDA))
    decay = {"per": "channel", "rank": 8, "lower_bound": -5.0}
    return kda(Glm5NextTextLinearAttention(config, 0), LOW_RANK_NAMES, decay=decay, gate_rank=8)


def bailing_hybrid(heads: dict[str, int]) -> tuple[torch.nn.Module, GatedDelta]:
    from transformers import BailingHybridConfig
    from transformers.models.bailing_hybrid.modeling_bailing_hybrid import BailingHybridDeltaAttention

    theirs = BailingHybridDeltaAttention(BailingHybridConfig(hidden_size=D, num_hidden_layers=6, **linear(KDA)), 0)
    return kda(theirs, FULL_RANK_NAMES, decay={"per": "channel", "lower_bound": -5.0})


def linear(heads: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config of transformers, of which each class takes its own."""
    common = {"linear_conv_kernel_dim": 4, "rms_norm_eps": 1e-6}
    if "num_qk_heads" not in heads:
        return {**common, "linear_num_heads": heads["num_heads"], "linear_head_dim": heads["head_dim"]}
    names = {"num_heads": "num_value_heads", "num_qk_heads": "num_key_heads"}
    names |= {"head_dim": "key_head_dim", "v_head_dim": "value_head_dim"}
    return {**common, **{f"linear_{their}": heads[name] for name, their in names.items()}}


def randomised(module: torch.nn.Module) -> dict[str, Tensor]:
    """The weights of a module, now large enough that every part matters."""
    module.requires_grad_(False)
    for name, weight in module.named_parameters():
        weight.normal_(std=0.5)
        weight.add_("norm" in name)
    return dict(module.named_parameters())


def fill(ours: GatedDelta, theirs: torch.nn.Module, **matrices: Tensor) -> None:
    """Copy weights: the matrices by our names, and what every class calls alike."""
    held = {name.rpartition("forget_gate.")[-1]: weight for name, weight in theirs.named_parameters()}
    weights = {f"{name}.weight": weight for name, weight in matrices.items()}
    weights |= {"conv.weight": held["conv1d.weight"], "a_log": held["A_log"].flatten(), "dt_bias": held["dt_bias"]}
    weights["norm.weight"] = held["o_norm.weight" if "o_norm.weight" in held else "norm.weight"]
    ours.requires_grad_(False).load_state_dict(weights)


HEADS = [
    {"num_heads": 4, "num_qk_heads": 2, "head_dim": 8, "v_head_dim": 8},
    {"num_heads": 3, "num_qk_heads": 1, "head_dim": 8, "v_head_dim": 12},
    {"num_heads": 2, "num_qk_heads": 2, "head_dim": 12, "v_head_dim": 6},
]
SCALAR = [(family, heads) for family in (qwen3_next, qwen3_5, olmo_hybrid) for heads in HEADS]
CASES = [*SCALAR, *((family, HEADS[0]) for family in (kimi_linear, glm5_next, bailing_hybrid))]
NAMES = [f"{family.__name__}-{'-'.join(map(str, heads.values()))}" for family, heads in CASES]


def largest_difference(theirs: torch.nn.Module, ours: GatedDelta, length: int, dtype: torch.dtype) -> float:
    """As a share of the standard deviation."""
    x = torch.randn(2, length, D, dtype=dtype)
    expected = theirs.to(dtype)(x)
    return float((ours.to(dtype)(x) - expected).abs().max() / expected.std())


@pytest.mark.parametrize("length", [1, 5, 150])
@pytest.mark.parametrize(("family", "heads"), CASES, ids=NAMES)
def test_equals_transformers(family: Any, heads: dict[str, int], length: int) -> None:
    assert largest_difference(*family(heads), length, torch.float32) < 1e-4


class Lifted:
    """torch without fp32: what a module casts to it becomes fp64."""

    def __getattr__(self, name: str) -> Any:
        return torch.float64 if name == "float32" else getattr(torch, name)


@pytest.mark.parametrize(("family", "heads"), CASES, ids=NAMES)
def test_equals_transformers_in_fp64_without_its_casts(
    family: Any, heads: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their rule runs in fp32 whatever the dtype: its rounding is all that parts it from ours, which runs in fp64."""
    theirs, ours = family(heads)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(f"{type(theirs).__module__}.torch", Lifted())
    assert largest_difference(theirs, ours, 150, torch.float64) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_norm_and_gate_round_as_transformers_does(activation: str, dtype: torch.dtype) -> None:
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearRMSNormGated
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

    theirs = (Qwen3NextRMSNormGated if activation == "silu" else KimiLinearRMSNormGated)(12).to(dtype)
    weight = "plain" if activation == "silu" else "fp32"
    spec = DeltaSpec(num_heads=1, head_dim=12, gate_activation=activation, norm_weight=weight)
    ours = GatedNorm(12, spec, 1e-6).to(dtype)
    for part in (theirs, ours):
        part.weight.data = torch.linspace(0.3, 2, 12, dtype=dtype)
    x, gate = torch.randn(2, 50, 12, dtype=dtype)
    torch.testing.assert_close(ours(x, gate), theirs(x, gate), rtol=2e-7 if dtype == torch.float32 else 0, atol=0)

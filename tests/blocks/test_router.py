"""Routers against those of transformers, and what must hold for any router."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Config, DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Config, DeepseekV3TopkRouter
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Config, DeepseekV4TopKRouter
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeConfig, Ernie4_5_MoeTopKRouter
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextConfig, Gemma4TextRouter
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeConfig, Glm4MoeTopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssTopKRouter
from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeConfig, GraniteMoeTopKRouter
from transformers.models.llama4.modeling_llama4 import Llama4Router, Llama4TextConfig
from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralTopKRouter
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHConfig, NemotronHTopkRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeConfig, OlmoeTopKRouter
from transformers.models.phimoe.modeling_phimoe import PhimoeConfig, PhimoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeTopKRouter

from zoo.blocks.moe import MoE
from zoo.blocks.router import Router, RouterModule, Routing, SparseMixerRouter
from zoo.spec import base
from zoo.spec.base import ConfigError, register_mirror, register_spec, registered
from zoo.spec.router import RouterSpec

D, E, C = 24, 16, 4
SIGMOID = {"score": "sigmoid", "correction_bias": True}
LOCAL = {"hidden_size": D, "num_local_experts": E, "num_experts_per_tok": C}
COUNT = {"hidden_size": D, "num_experts": E, "num_experts_per_tok": C}
ROUTED = {"hidden_size": D, "n_routed_experts": E, "num_experts_per_tok": C}
GROUPS, NO_GROUPS = {"n_group": 4, "topk_group": 2}, {"n_group": 1, "topk_group": 1}
SCALED = {"routed_scaling_factor": 2.5}

PEERS: dict[str, tuple[Any, Any, dict[str, Any], dict[str, Any]]] = {
    "mixtral": (MixtralTopKRouter, MixtralConfig, LOCAL, {}),
    "olmoe": (OlmoeTopKRouter, OlmoeConfig, {**COUNT, "norm_topk_prob": False}, {"normalize": False}),
    "olmoe_normalised": (OlmoeTopKRouter, OlmoeConfig, {**COUNT, "norm_topk_prob": True}, {}),
    "qwen3_moe": (Qwen3MoeTopKRouter, Qwen3MoeConfig, {**COUNT, "norm_topk_prob": True}, {}),
    "granite": (GraniteMoeTopKRouter, GraniteMoeConfig, LOCAL, {"score_chosen": True}),
    "gpt_oss": (GptOssTopKRouter, GptOssConfig, LOCAL, {"score_chosen": True, "logit_bias": True}),
    "ernie": (
        Ernie4_5_MoeTopKRouter,
        Ernie4_5_MoeConfig,
        {"hidden_size": D, "moe_num_experts": E, "moe_k": C},
        {"correction_bias": True},
    ),
    "deepseek_v2": (
        DeepseekV2TopkRouter,
        DeepseekV2Config,
        {**ROUTED, **GROUPS, **SCALED, "num_attention_heads": 1, "topk_method": "group_limited_greedy"},
        {"normalize": False, "route_scale": 2.5, "num_groups": 4, "top_groups": 2, "group_score": "max"},
    ),
    "deepseek_v3": (
        DeepseekV3TopkRouter,
        DeepseekV3Config,
        {**ROUTED, **GROUPS, **SCALED},
        {**SIGMOID, "route_scale": 2.5, "num_groups": 4, "top_groups": 2},
    ),
    "deepseek_v4": (
        DeepseekV4TopKRouter,
        DeepseekV4Config,
        {**ROUTED, **SCALED},
        {**SIGMOID, "score": "sqrt_softplus", "route_scale": 2.5},
    ),
    "glm4_moe": (
        Glm4MoeTopkRouter,
        Glm4MoeConfig,
        {**ROUTED, **NO_GROUPS, **SCALED},
        {**SIGMOID, "route_scale": 2.5},
    ),
    "nemotron_h": (
        NemotronHTopkRouter,
        NemotronHConfig,
        {**ROUTED, **NO_GROUPS, **SCALED},
        {**SIGMOID, "route_scale": 2.5},
    ),
    "llama4": (
        Llama4Router,
        Llama4TextConfig,
        {**LOCAL, "num_experts_per_tok": 1},
        {"score": "sigmoid", "score_chosen": True, "normalize": False, "weigh": "input"},
    ),
    "gemma4": (
        Gemma4TextRouter,
        Gemma4TextConfig,
        {"hidden_size": D, "num_experts": E, "top_k_experts": C, "rms_norm_eps": 1e-6},
        {"input_norm": True, "expert_scale": True},
    ),
}
RENAMED = {"scale": "input_scale", "per_expert_scale": "expert_scale", "proj.weight": "weight"}


def like(router: RouterModule, peer: nn.Module) -> None:
    """Random weights, the same in both."""
    torch.nn.init.normal_(peer.weight if hasattr(peer, "weight") else peer.proj.weight)
    mine = router.state_dict()
    for name, tensor in [*peer.named_parameters(), *peer.named_buffers()]:
        if not name.endswith("weight"):
            tensor.data.normal_(1.0 if "scale" in name else 0.0, 0.2)
        own = "correction_bias" if name.endswith("correction_bias") else RENAMED.get(name, name)
        mine[own].copy_(tensor.data.view_as(mine[own]))
    assert len(mine) == len(list(peer.parameters())) + len(list(peer.buffers()))


def spread(weights: Tensor, indices: Tensor, num_experts: int = E) -> Tensor:
    """Weights [t, e], 0 for experts that were not chosen: the order of choices does not matter."""
    return torch.zeros(len(weights), num_experts, dtype=weights.dtype).scatter(1, indices, weights)


@pytest.mark.parametrize("name", PEERS)
def test_equals_transformers(name: str) -> None:
    peer_class, config_class, config, options = PEERS[name]
    peer = peer_class(config_class(**config))
    top_k = config.get("num_experts_per_tok", C)
    router = Router(D, E, top_k, **options)
    like(router, peer)
    x = torch.randn(200, D)
    routing = router(x)
    first, second, *rest = peer(x)
    if name == "llama4":  # the weights of all experts, 0 for those that were not chosen, and the logits
        expected, logits = first, second
    else:
        expected, logits = spread(second, rest[0]), first if name != "gemma4" else routing.logits
    torch.testing.assert_close(spread(routing.weights, routing.indices), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(routing.logits, logits, rtol=1e-5, atol=1e-6)


def test_sparse_mixer_equals_transformers_in_evaluation_mode() -> None:
    peer = PhimoeTopKRouter(PhimoeConfig(**{**LOCAL, "num_experts_per_tok": 2}, router_jitter_noise=0.05)).eval()
    router = SparseMixerRouter(D, E, 2, jitter=0.05)
    like(router, peer)
    x = torch.randn(200, D) / 2
    _, weights, indices = peer(x)
    routing = router(x)
    assert torch.equal(routing.indices, indices)
    torch.testing.assert_close(routing.weights, weights)
    assert (weights < 0.99).any()  # the case of several experts close to the best one has come up

    grads = [
        torch.autograd.grad(w.square().sum(), m.weight)[0] for w, m in ((routing.weights, router), (weights, peer))
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("router", [SparseMixerRouter(D, E, C, jitter=0.3), Router(D, E, C, **SIGMOID)])
def test_training_and_evaluation_route_alike(router: RouterModule) -> None:
    x = torch.randn(50, D)
    trained, evaluated = router.train()(x), router.eval()(x)
    assert all(torch.equal(one, other) for one, other in zip(trained, evaluated, strict=True))


OPTIONS = st.fixed_dictionaries(
    {
        "score": st.sampled_from(["softmax", "sigmoid", "sqrt_softplus"]),
        "normalize": st.booleans(),
        "route_scale": st.sampled_from([1.0, 2.5]),
        "correction_bias": st.booleans(),
        "num_groups": st.sampled_from([1, 4]),
        "group_score": st.sampled_from(["max", "top2_sum"]),
    }
)


@settings(max_examples=60, deadline=None)
@given(OPTIONS, st.integers(1, 4), st.integers(0, 10**6))
def test_what_holds_for_any_options(options: dict[str, Any], top_k: int, seed: int) -> None:
    torch.manual_seed(seed)
    groups = options["num_groups"]
    router = Router(D, E, top_k, **options, top_groups=max(1, groups // 2))
    router.weight.data.normal_()
    if router.correction_bias is not None:
        router.correction_bias.normal_()
    routing = Routing(*(part.detach() for part in router(torch.randn(9, D))))
    assert [part.dtype for part in routing] == [torch.float32, torch.int64, torch.float32, torch.float32]
    assert all(len(set(chosen)) == top_k for chosen in routing.indices.tolist())

    # Weights are scores, however the choice was made: a bias never weighs.
    expected = routing.scores.gather(1, routing.indices)
    if options["normalize"]:
        expected = expected / expected.sum(1, keepdim=True)
    torch.testing.assert_close(routing.weights, expected * options["route_scale"])

    merit = routing.scores + (0 if router.correction_bias is None else router.correction_bias)
    for token, chosen in enumerate(routing.indices.tolist()):
        assert set(chosen) == brute_force(merit[token], options, top_k)


def brute_force(merit: Tensor, options: dict[str, Any], top_k: int) -> set[int]:
    """The rule in words: the best half of the groups is open, and of their experts the best are chosen."""
    size = E // options["num_groups"]
    groups = [list(range(start, start + size)) for start in range(0, E, size)]
    best_of_group = 1 if options["group_score"] == "max" else 2
    groups.sort(key=lambda group: -sum(sorted(merit[group].tolist())[-best_of_group:]))
    allowed = [expert for group in groups[: max(1, len(groups) // 2)] for expert in group]
    return set(sorted(allowed, key=lambda expert: -float(merit[expert]))[:top_k])


def test_experts_have_no_order() -> None:
    router, shuffled = Router(D, E, C, **SIGMOID, expert_scale=True), Router(D, E, C, **SIGMOID, expert_scale=True)
    place = torch.randperm(E)
    for mine, other in zip(router.state_dict().values(), shuffled.state_dict().values(), strict=True):
        other.copy_(mine.normal_()[place])
    x = torch.randn(30, D)
    one, other = router(x), shuffled(x)
    torch.testing.assert_close(spread(one.weights, one.indices)[:, place], spread(other.weights, other.indices))


def test_autocast_changes_nothing() -> None:
    router, x = Router(D, E, C, input_norm=True), torch.randn(30, D)
    plain = router(x)
    with torch.autocast("cpu", torch.bfloat16):
        inside = router(x)
    assert all(torch.equal(one, other) for one, other in zip(plain, inside, strict=True))


def test_weights_in_bf16_are_used_in_fp32() -> None:
    router, x = Router(D, E, C).to(torch.bfloat16), torch.randn(30, D).to(torch.bfloat16)
    wide = Router(D, E, C)
    wide.load_state_dict(router.state_dict())
    assert all(torch.equal(one, other) for one, other in zip(router(x), wide(x.float()), strict=True))


def test_the_correction_bias_stays_exact() -> None:
    router = Router(D, E, C, **SIGMOID)
    router.correction_bias.normal_()
    before = router.correction_bias.clone()
    router.to(torch.bfloat16)
    assert router.weight.dtype == torch.bfloat16
    assert router.correction_bias.dtype == torch.float32
    assert torch.equal(router.correction_bias, before)
    assert "correction_bias" in router.state_dict()
    assert router.to("meta").correction_bias.is_meta


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
def test_extreme_logits_give_finite_numbers(score: Literal["softmax", "sigmoid", "sqrt_softplus"]) -> None:
    router = Router(1, 4, 2, score=score)
    router.weight.data.copy_(torch.tensor([[1.0], [0.5], [-1.0], [-2.0]]))
    x = torch.tensor([[1e4], [-1e4], [0.0]])
    routing = router(x)
    routing.weights.sum().backward()
    assert routing.weights.isfinite().all()
    assert router.weight.grad.isfinite().all()
    certain = Router(1, 2, 2, score=score)
    certain.weight.data.fill_(-1.0)
    assert certain(torch.tensor([[1e4]])).weights.isfinite().all()


def test_leading_axes_are_free() -> None:
    router, x = Router(D, E, C), torch.randn(2, 3, D)
    for one, other in zip(router(x), router(x.flatten(0, 1)), strict=True):
        torch.testing.assert_close(one.flatten(0, 1), other)


@pytest.mark.parametrize(
    ("top_k", "options", "message"),
    [
        (17, {}, r"Router.top_k: found 17; must be at most num_experts \(16\)"),
        (2, {"num_groups": 3}, r"router.num_groups: found 3; must divide num_experts \(16\)"),
        (5, {"num_groups": 4}, r"top_k: found 5; must be at most 4, the experts of top_groups"),
        (2, {"num_groups": 16, "top_groups": 2}, "must leave 2 experts in a group"),
        (2, {"top_groups": 2}, "router.top_groups: found 2; must be at most num_groups"),
        (2, {"score_chosen": True, "correction_bias": True}, "router.score_chosen: found True; cannot be combined"),
        (2, {"scores": "sigmoid"}, "router.scores: found 'sigmoid'; unknown key of TopKRouterSpec; did you mean score"),
        (0, {}, "Router.top_k: found 0"),
    ],
)
def test_mistakes(top_k: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Router(D, E, top_k, **options)


class EveryRouterSpec(RouterSpec):
    """All experts, with equal weights: a router from outside of the package."""

    type: Literal["every_expert"] = "every_expert"


class EveryRouter(RouterModule):
    describes: ClassVar[type[RouterSpec]] = EveryRouterSpec

    def route(self, logits: Tensor) -> Routing:
        indices = torch.arange(self.top_k).expand(*logits.shape[:-1], self.top_k)
        return Routing(torch.ones_like(logits[..., : self.top_k]), indices, logits.softmax(-1), logits)


def test_a_router_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(base._REGISTRY, RouterSpec, registered(RouterSpec))  # other tests must not find it
    register_spec(EveryRouterSpec)
    register_mirror("blocks", EveryRouterSpec, EveryRouter)
    moe = MoE(D, num_experts=3, top_k=3, d_expert=8, router={"type": "every_expert"})
    x = torch.randn(5, D)
    every = torch.arange(3).expand(5, 3)
    assert isinstance(moe.router, EveryRouter)
    torch.testing.assert_close(moe(x), moe.experts(x, None, every))

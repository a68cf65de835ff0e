"""Adapters of low rank: nothing at first, then a difference that merges into plain weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import zoo
from zoo.adapt.lora import adapt, adaptable, adapters_of, fill_adapters, kept_of, merge_adapters
from zoo.blocks.adapted import Adapted, AdaptedExperts, AdaptedLinear
from zoo.blocks.experts import Experts
from zoo.decoder import Decoder
from zoo.spec.base import ConfigError
from zoo.spec.finetune import LoraFinetune

MODELS = {
    "attention and MLPs": ["qwen3_0_6b"],
    "experts": ["qwen3_30b_a3b"],
    "experts with biases, windows": ["gpt_oss_20b"],
    "MLA, shared experts": ["deepseek_v3"],
    "Mamba-2, latent experts without gates": ["nemotron_3_super_120b_a12b"],
    "delta rule": ["qwen3_next_80b_a3b"],
    "an indexer": ["deepseek_v3_2"],
    "a scale on inputs": ["llama4_scout_17b_16e"],
}


def lora(**options: object) -> LoraFinetune:
    return LoraFinetune.model_validate({"path": "somewhere", "rank": 4, "alpha": 8.0, **options})


def twin(name: str, dtype: torch.dtype = torch.float64) -> Decoder:
    torch.manual_seed(0)
    model = zoo.build(name, "model_scale=tiny", dtype=dtype)
    with torch.no_grad():
        for value in model.parameters():
            value += 0.05 * torch.randn_like(value)
    return model.eval()


def tokens_of(model: Decoder, rows: int = 2, length: int = 33) -> Tensor:
    return torch.randint(model.spec.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))


def stir(model: Decoder) -> None:
    """Give every adapter a difference that shows."""
    with torch.no_grad():
        for value in adapters_of(model).values():
            value.normal_(std=0.1)


@torch.no_grad()
@pytest.mark.parametrize("what", MODELS)
def test_merged_logits_are_the_adapted_ones(what: str) -> None:
    model = twin(*MODELS[what])
    names = list(model.state_dict())
    kinds = [type(module) for module in model.modules()]
    tokens = tokens_of(model)
    plain = model(tokens)
    adapt(model, lora())
    assert torch.allclose(model(tokens), plain, rtol=0, atol=1e-12)  # B is zero
    stir(model)
    adapted = model(tokens)
    merge_adapters(model)
    # Some routers and norms work in fp32: their rounding is all that may differ.
    assert (model(tokens) - adapted).norm() < 1e-5 * adapted.norm()
    assert (adapted - plain).norm() > 1e-2 * plain.norm()
    assert list(model.state_dict()) == names
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize("what", MODELS)
def test_adapters_alone_are_trained_and_their_gradients_are_those_of_the_matrices(what: str) -> None:
    """With dL/dW the gradient of a merged weight: dL/dA = s B^T dL/dW and dL/dB = s dL/dW A^T."""
    model = twin(*MODELS[what])
    adapt(model, lora())
    stir(model)
    tokens = tokens_of(model)
    model.loss(tokens, tokens).total.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == set(adapters_of(model))
    factors = {
        name: module.factors(weight) for name, (module, weight) in adaptable(model) if isinstance(module, Adapted)
    }
    values = {name: (pair[0].detach().clone(), pair[1].detach().clone()) for name, pair in factors.items() if pair}
    grads = {name: (pair[0].grad, pair[1].grad) for name, pair in factors.items() if pair}
    merge_adapters(model)
    model.zero_grad()
    model.loss(tokens, tokens).total.backward()
    assert grads
    for name, (a_grad, b_grad) in grads.items():
        whole = model.get_parameter(name).grad
        assert whole is not None
        a, b = values[name]
        for ours, theirs in ((a_grad, 2.0 * b.mT @ whole), (b_grad, 2.0 * whole @ a.mT)):
            assert ours is not None
            assert (ours - theirs).norm() <= 2e-4 * theirs.norm() + 1e-9, name


def test_merging_is_the_sum_to_the_last_bit() -> None:
    model = twin("qwen3_30b_a3b", torch.float32)
    adapt(model, lora(targets=["*.experts.*", "layers.0.mixer.q.weight"]))
    stir(model)
    expected = {}
    for name, (module, weight) in adaptable(model):
        pair = module.factors(weight) if isinstance(module, Adapted) else None
        plain = getattr(module, weight).detach().clone()
        if pair is not None and plain.ndim == 3:
            expected[name] = torch.stack([w + 2.0 * (b @ a) for w, a, b in zip(plain, *pair, strict=True)])
        else:
            expected[name] = plain if pair is None else plain + 2.0 * (pair[1] @ pair[0])
    merge_adapters(model)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in expected.items())


def test_targets_say_where_adapters_stand() -> None:
    model = twin("qwen3_30b_a3b")
    adapt(model, lora(targets=["*.mixer.[qv].weight", "layers.0.ffn.experts.down"]))
    names = {name.rpartition(".lora")[0] for name in adapters_of(model) if ".lora" in name}
    assert names == {f"layers.{n}.mixer.{part}" for n in range(model.spec.num_layers) for part in "qv"}
    assert isinstance(model.get_submodule("layers.0.ffn.experts"), AdaptedExperts)
    assert type(model.get_submodule("layers.1.ffn.experts")) is Experts
    stacks = {name: list(value.shape) for name, value in adapters_of(model).items() if "experts" in name}
    num_experts, d_model, d_expert = model.get_parameter("layers.0.ffn.experts.down").shape
    assert stacks == {
        "layers.0.ffn.experts.down_lora_a": [num_experts, 4, d_expert],
        "layers.0.ffn.experts.down_lora_b": [num_experts, d_model, 4],
    }


@pytest.mark.parametrize("pattern", ["*.router.*", "embed.weight", "layers.9.*", "*.mixer.w"])
def test_what_cannot_be_adapted_is_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match=r"finetune.targets: found .* matches matrices inside layers"):
        adapt(twin("qwen3_30b_a3b"), lora(targets=["*.mixer.*", pattern]))


def test_a_model_is_adapted_once() -> None:
    model = twin("qwen3_0_6b")
    adapt(model, lora())
    with pytest.raises(ConfigError, match="merge them first"):
        adapt(model, lora())


def test_adapters_alone_are_kept_and_loaded() -> None:
    model, other = twin("qwen3_30b_a3b"), twin("qwen3_30b_a3b")
    adapt(model, lora())
    stir(model)
    adapt(other, lora())
    kept = kept_of(model).state_dict()
    assert all(".lora_" in name or "_lora_" in name for name in kept)
    kept_of(other).load_state_dict(kept)
    tokens = tokens_of(model)
    assert torch.equal(model(tokens), other(tokens))
    assert kept_of(twin("qwen3_0_6b")).state_dict().keys() == twin("qwen3_0_6b").state_dict().keys()
    with pytest.raises(ConfigError, match=r"lora_a: the adapters have no such tensor"):
        fill_adapters(other, {name: value for name, value in kept.items() if not name.endswith("q.lora_a")})


def test_bf16_weights_have_fp32_adapters_and_autocast_works() -> None:
    model = twin("qwen3_30b_a3b", torch.bfloat16)
    adapt(model, lora())
    assert {value.dtype for value in adapters_of(model).values()} == {torch.float32}
    stir(model)
    tokens = tokens_of(model)
    model.loss(tokens, tokens).total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    wide = twin("qwen3_30b_a3b", torch.float32)
    adapt(wide, lora())
    stir(wide)
    with torch.autocast("cpu", torch.bfloat16):
        close = wide(tokens)
    assert (close.float() - wide(tokens)).norm() < 0.1 * wide(tokens).norm()


@torch.no_grad()
@pytest.mark.parametrize("what", ["attention and MLPs", "experts", "MLA, shared experts"])
def test_generation_sees_the_adapters(what: str) -> None:
    """Kernels and absorbed matrices read weights by themselves: they must not read around the adapters."""
    model = twin(*MODELS[what], dtype=torch.float32)
    adapt(model, lora())
    stir(model)
    tokens = tokens_of(model, length=5)
    model.decoding = "eager"
    written = model.generate(tokens, max_new_tokens=12)
    model.decoding = "compiled"
    assert torch.equal(model.generate(tokens, max_new_tokens=12), written)
    merge_adapters(model)
    assert torch.equal(model.generate(tokens, max_new_tokens=12), written)


def test_frozen_routers_keep_their_correction_bias() -> None:
    model = zoo.build("tiny_moe", "model/moe/router=sigmoid", "model.moe.balance={bias_update_rate: 0.1}")
    tokens = tokens_of(model)
    (first, *_) = model.moe_layers().values()
    for frozen in (True, False):
        first.router.weight.requires_grad_(not frozen)
        model.train().loss(tokens, tokens)
        first.update_bias()
        assert bool(first.router.correction_bias.any()) is not frozen


def test_modules_are_swapped_in_place() -> None:
    model = twin("qwen3_0_6b")
    linear = model.get_submodule("layers.0.mixer.q")
    before = linear.weight
    adapt(model, lora())
    assert model.get_submodule("layers.0.mixer.q") is linear
    assert type(linear) is AdaptedLinear
    assert linear.weight is before
    assert isinstance(linear, nn.Linear)

"""`zoo export`: every key that is written exists, and says what the model is."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import MEGATRON, TITAN, assert_keys_exist, assert_origins, recorded_calls, values_of

import zoo
from zoo.blocks.router import Router
from zoo.cli import main
from zoo.handover.fields import Call, Code, Field, runs, source
from zoo.handover.hand import Hand
from zoo.handover.megatron_blocks import moe_fields
from zoo.handover.megatron_parallel import stage_list
from zoo.handover.refusals import Refusals
from zoo.plan.layout import Layout
from zoo.spec.base import ConfigError, Spec
from zoo.spec.moe import MoESpec
from zoo.spec.router import TopKRouterSpec

Recipe = Callable[..., tuple[str, Hand]]
PROVIDERS = {
    "qwen3_30b_a3b": "GPTModelProvider",
    "gpt_oss_20b": "GPTModelProvider",
    "llama3_1_8b": "GPTModelProvider",
    "smollm3_3b": "GPTModelProvider",
    "deepseek_v3": "MLAModelProvider",
    "nemotron_3_nano_30b_a3b": "HybridModelProvider",
}
TITANS = ("llama3_1_8b", "qwen3_0_6b", "deepseek_v3", "qwen3_coder_480b_a35b")


@pytest.mark.parametrize("model", PROVIDERS)
def test_megatron_has_every_key(recipe: Recipe, model: str) -> None:
    text, _ = recipe("megatron_bridge", model)
    assert_keys_exist(text, MEGATRON["keys"])
    assert_origins(text)
    names = [name for name, _ in recorded_calls(text, MEGATRON["keys"])]
    assert PROVIDERS[model] in names
    made = values_of(text, PROVIDERS[model])
    assert made["activation_func"] in MEGATRON["activations"]
    assert values_of(text, "ConfigContainer")["mixed_precision"] in MEGATRON["precisions"]


@pytest.mark.parametrize("model", TITANS)
def test_torchtitan_has_every_key(recipe: Recipe, model: str) -> None:
    text, hand = recipe("torchtitan", model)
    assert_keys_exist(text, TITAN["keys"])
    assert_origins(text)
    tree = ast.parse(text)
    compile(tree, model, "exec")
    made = values_of(text, "ParallelismConfig")
    layout = hand.layout
    degrees = (
        "data_parallel_replicate",
        "data_parallel_shard",
        "tensor_parallel",
        "context_parallel",
        "pipeline_parallel",
    )
    product = 1
    for name in degrees:
        product *= made[f"{name}_degree"]
    assert product == layout.num_devices == 256
    assert made["data_parallel_shard_degree"] * layout.cp == layout.shard


def test_latent_attention_in_numbers(recipe: Recipe) -> None:
    """arXiv:2412.19437, section 4.2."""
    text, _ = recipe("megatron_bridge", "deepseek_v3")
    made = values_of(text, "MLAModelProvider")
    expected = {
        "hidden_size": 7168,
        "num_layers": 61,
        "num_attention_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_head_dim": 128,
        "qk_pos_emb_head_dim": 64,
        "v_head_dim": 128,
        "ffn_hidden_size": 18432,
        "moe_ffn_hidden_size": 2048,
        "moe_shared_expert_intermediate_size": 2048,
        "num_moe_experts": 256,
        "moe_router_topk": 8,
        "moe_router_num_groups": 8,
        "moe_router_group_topk": 4,
        "moe_router_topk_scaling_factor": 2.5,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_layer_freq": [0] * 3 + [1] * 58,
        "rotary_scaling_factor": 40.0,
        "original_max_position_embeddings": 4096,
    }
    assert {name: made[name] for name in expected} == expected


def test_experts_with_sinks_and_windows_in_numbers(recipe: Recipe) -> None:
    text, _ = recipe("megatron_bridge", "gpt_oss_20b")
    made = values_of(text, "GPTModelProvider")
    assert made["window_size"] == (127, 0)  # the last 128 keys, the query's own included
    assert made["window_attn_skip_freq"] == [1, 0] * 12
    assert (made["softmax_type"], made["activation_func"], made["glu_linear_offset"]) == (
        "learnable",
        "quick_gelu",
        1.0,
    )
    assert made["add_bias_linear"] is True
    assert made["yarn_rotary_scaling_factor"] == 32.0


def test_hybrid_in_numbers(recipe: Recipe) -> None:
    """The pattern of the release's config.json (`hybrid_override_pattern`)."""
    text, _ = recipe("megatron_bridge", "nemotron_3_nano_30b_a3b")
    made = values_of(text, "HybridModelProvider")
    assert made["hybrid_layer_pattern"] == "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
    assert (made["mamba_num_heads"], made["mamba_num_groups"], made["mamba_state_dim"]) == (64, 8, 128)
    assert made["position_embedding_type"] == "none"


def parameters(made: dict[str, Any]) -> int:
    """Of a model of grouped-query attention and experts, from Megatron-Core's fields alone."""
    d, heads, groups, width = (
        made[name] for name in ("hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
    )
    attention = 2 * d * heads * width + 2 * d * groups * width + (2 * width if made["qk_layernorm"] else 0)
    attention += (heads + 2 * groups) * width if made["add_qkv_bias"] else 0
    matrices = 3 if made["gated_linear_unit"] else 2
    sparse = made.get("moe_layer_freq", [0] * made["num_layers"])
    total = made["vocab_size"] * d * (1 if made["share_embeddings_and_output_weights"] else 2) + d
    for moe in sparse:
        total += attention + 2 * d
        if moe:
            total += made["num_moe_experts"] * (matrices * d * made["moe_ffn_hidden_size"] + d)
            shared = made.get("moe_shared_expert_intermediate_size", 0)
            total += matrices * d * shared + (d if made.get("moe_shared_expert_gate") else 0)
        else:
            total += matrices * d * made["ffn_hidden_size"]
    return total


@pytest.mark.parametrize(
    "model", ["qwen3_30b_a3b", "llama3_1_8b", "qwen2_5_7b", "smollm2_135m", "mixtral_8x7b", "qwen1_5_moe_a2_7b"]
)
def test_fields_describe_as_many_parameters(recipe: Recipe, model: str) -> None:
    text, _ = recipe("megatron_bridge", model)
    assert parameters(values_of(text, "GPTModelProvider")) == zoo.load(model).params().total


def megatron_routing(logits: torch.Tensor, fields: dict[str, Any]) -> torch.Tensor:
    """Weights [t, e] by the rules that `TransformerConfig` documents, without groups."""
    top_k = fields["moe_router_topk"]
    if fields["moe_router_score_function"] == "softmax" and fields["moe_router_pre_softmax"]:
        weights, chosen = logits.softmax(-1).topk(top_k)
    elif fields["moe_router_score_function"] == "softmax":
        scores, chosen = logits.topk(top_k)
        weights = scores.softmax(-1)
    else:
        function = {"sigmoid": torch.sigmoid, "sqrtsoftplus": lambda x: torch.nn.functional.softplus(x).sqrt()}
        scores, chosen = function[fields["moe_router_score_function"]](logits).topk(top_k)
        weights = scores / scores.sum(-1, keepdim=True) if top_k > 1 else scores
    weights = weights * fields.get("moe_router_topk_scaling_factor", 1.0)
    return torch.zeros_like(logits).scatter(-1, chosen, weights)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"score_chosen": True},
        {"score_chosen": True, "normalize": False},
        {"normalize": False, "route_scale": 2.0},
        {"score": "sigmoid", "route_scale": 2.5},
        {"score": "sqrt_softplus"},
    ],
)
def test_routers_weigh_alike(options: dict[str, Any]) -> None:
    moe = MoESpec(num_experts=8, top_k=3, d_expert=4, router=TopKRouterSpec(**options))
    refusals = Refusals("it")
    fields = {field.name: field.value for field in moe_fields("moe", moe, refusals)}
    assert refusals.lines == []
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    router = Router(6, 8, 3, moe.router)
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(1))
    routing = router(x)
    own = torch.zeros(20, 8).scatter(-1, routing.indices, routing.weights.float())
    torch.testing.assert_close(own, megatron_routing(x @ router.weight.T, fields))


@pytest.mark.parametrize(
    "options", [{"score": "sigmoid", "normalize": False}, {"correction_bias": True}, {"expert_scale": True}]
)
def test_routers_that_weigh_otherwise_are_refused(options: dict[str, Any]) -> None:
    moe = MoESpec(num_experts=8, top_k=3, d_expert=4, router=TopKRouterSpec(**options))
    refusals = Refusals("it")
    moe_fields("moe", moe, refusals)
    assert any(name in line for name in options for line in refusals.lines)


@pytest.mark.parametrize(
    ("target", "model", "override", "reason"),
    [
        ("megatron_bridge", "qwen3_8b", "model.attention.softcap=30", "model.attention.softcap: found 30"),
        ("megatron_bridge", "qwen3_8b", "model.residual_scale=0.5", "model.residual_scale: found 0.5"),
        ("megatron_bridge", "qwen3_8b", "model.attention.qk_norm=full", "model.attention.qk_norm: found 'full'"),
        ("megatron_bridge", "qwen3_8b", "model.norm_placement=post", "model.norm_placement: found 'post'"),
        ("megatron_bridge", "qwen3_8b", "model.attention.out_bias=true", "has one switch"),
        ("megatron_bridge", "qwen3_30b_a3b", "model.moe.router.expert_scale=true", "router.expert_scale: found True"),
        ("megatron_bridge", "deepseek_v3", "model.attention.gate=head", "model.attention.gate: found 'head'"),
        ("torchtitan", "qwen3_8b", "model.attention.qkv_bias=true", "model.attention.qkv_bias: found True"),
        ("torchtitan", "qwen3_8b", "model.mlp.activation=gelu", "model.mlp.activation: found 'gelu'"),
        ("torchtitan", "qwen3_30b_a3b", "model.moe.d_latent=64", "model.moe.d_latent: found 64"),
        ("torchtitan", "qwen3_30b_a3b", "model.moe.balance.z_loss=0.1", "balance.z_loss=0 to train without it"),
        ("torchtitan", "nemotron_h_8b", "model.d_model=4096", "torchtitan is written for attention"),
    ],
)
def test_what_a_target_lacks_is_refused(recipe: Recipe, target: str, model: str, override: str, reason: str) -> None:
    with pytest.raises(ConfigError) as error:
        recipe(target, model, override)
    assert reason in str(error.value)


def test_a_setting_that_nobody_thought_of_is_refused() -> None:
    class New(Spec):
        known: int = 1
        novel: bool = False

    refusals = Refusals("it")
    refusals.rest(New(novel=True), "model.new", ("known",))
    with pytest.raises(ConfigError, match=r"model.new.novel: found True; it has no such setting"):
        refusals.raise_all()


@pytest.mark.parametrize(
    ("target", "options", "reason"),
    [
        ("megatron_bridge", {"shard": 16, "tp": 4}, "set shard so"),
        ("megatron_bridge", {"pp": 2, "shard": 128, "ep": 1}, "pipelines"),
        ("torchtitan", {"shard": 1}, "set shard to a divisor of 256 above 1"),
        ("torchtitan", {"tp": 2, "ep": 8, "etp": 2, "shard": 128}, "not both"),
    ],
)
def test_layouts_that_a_target_lacks(recipe: Recipe, target: str, options: dict[str, int], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        recipe(target, "qwen3_30b_a3b", "model.moe.balance.aux_loss=0", **options)


def test_layout_and_batch_go_over(recipe: Recipe) -> None:
    text, _ = recipe(
        "megatron_bridge", "llama3_1_70b", tp=4, pp=4, vp=5, cp=2, shard=1, global_batch=64, recompute="full"
    )
    made = values_of(text, "GPTModelProvider")
    names = ("tensor", "pipeline", "virtual_pipeline")
    assert [made[f"{name}_model_parallel_size"] for name in names] == [4, 4, 5]
    assert (made["context_parallel_size"], made["sequence_parallel"]) == (2, True)
    assert (made["recompute_granularity"], made["recompute_num_layers"]) == ("full", 1)
    train = values_of(text, "TrainingConfig")
    assert (train["global_batch_size"], train["micro_batch_size"]) == (64, 1)
    assert "tensor_model_parallel_size=4,  # user" in text
    assert "hidden_size=8192,  # model.d_model" in text


def test_pipelines_in_torchtitan(recipe: Recipe) -> None:
    text, hand = recipe("torchtitan", "llama3_1_70b", tp=8, pp=4, shard=8, global_batch=64)
    made, train = values_of(text, "ParallelismConfig"), values_of(text, "TrainingConfig")
    assert (made["pipeline_parallel_degree"], made["pipeline_parallel_microbatch_size"]) == (4, 1)
    assert train["local_batch_size"] * hand.layout.dp == train["global_batch_size"] == 64
    assert train["disable_cuda_graphs"] is True


def test_settings_of_training_go_over(recipe: Recipe) -> None:
    words = ("train.steps=500", "optimizer.lr=1e-4", "schedule=wsd", "train.clip_norm=0.5")
    text, _ = recipe("megatron_bridge", "qwen3_8b", train=words)
    assert values_of(text, "TrainingConfig")["train_iters"] == 500
    optimizer, scheduler = values_of(text, "OptimizerConfig"), values_of(text, "SchedulerConfig")
    assert (optimizer["lr"], optimizer["clip_grad"]) == (1e-4, 0.5)
    assert (scheduler["lr_decay_style"], scheduler["lr_wsd_decay_iters"], scheduler["lr_warmup_iters"]) == (
        "WSD",
        100,
        25,
    )
    assert "lr=0.0001,  # user" in text
    text, _ = recipe("torchtitan", "qwen3_8b", train=words)
    assert values_of(text, "LRSchedulersContainer.Config")["decay_ratio"] == 0.2
    assert values_of(text, "default_adamw")["lr"] == 1e-4


@pytest.mark.parametrize(("layers", "stages"), [(61, 8), (61, 16), (10, 4), (3, 4)])
def test_uneven_stages_hold_all_layers(layers: int, stages: int) -> None:
    made = eval(stage_list(layers, stages, mtp=1))
    flat = [name for stage in made for name in stage]
    assert len(made) == stages
    assert flat == ["embedding", *["decoder"] * layers, "mtp", "loss"]
    sizes = [len(stage) - ("mtp" in stage) for stage in made]
    assert max(sizes) - min(sizes) <= 1


def test_source_is_what_it_says() -> None:
    call = Call("f", (Field("a", [1, 2], "here"), Field("b", Call("g", (Field("c", Code("x"), "there"),)), "both")))
    assert source(call) == "f(\n    a=[1, 2],  # here\n    b=g(  # both\n        c=x,  # there\n    ),\n)"
    assert call["b.c"] == "x"
    assert eval(runs([0] * 3 + [1] * 5)) == [0] * 3 + [1] * 5
    assert eval(runs([0, 1] * 4)) == [0, 1] * 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("target=nemo out=x", "target: found 'nemo'; allowed: megatron_bridge, torchtitan"),
        ("target=torchtitan", "out: missing"),
        ("target=torchtitan out=x data=files", "data=files: zoo export does not carry it over"),
        ("target=torchtitan out=x train.seq_len=5", "give seq_len=... instead"),
        ("target=torchtitan out=x optimizer=muon", "optimizer: found 'muon'; zoo export writes adamw alone"),
        ("target=torchtitan out=x precision=nvfp4", "precision: found 'nvfp4'; torchtitan has fp32, bf16"),
        ("target=megatron_bridge out=x recompute=selective_op", "recompute: found 'selective_op'; Megatron-Bridge"),
    ],
)
def test_mistakes(refused: Callable[..., str], words: str, message: str) -> None:
    assert message in refused("export", "qwen3_0_6b", "h100_8x", "tp=1", "pp=1", "cp=1", *words.split())


def test_the_verb_writes_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["qwen3_0_6b", "h100_8x", "tp=1", "pp=1", "cp=1", "target=megatron_bridge", f"out={tmp_path / 'a' / 'b'}"]
    assert main(["export", *words]) == 0
    assert f"written: {tmp_path / 'a' / 'b' / 'recipe.py'}" in capsys.readouterr().out
    compile((tmp_path / "a" / "b" / "recipe.py").read_text(), "recipe", "exec")


def test_every_degree_of_a_layout_is_looked_at() -> None:
    """Both targets were written for these; a further one must be thought of."""
    assert {f.name for f in dataclasses.fields(Layout)} == {"tp", "pp", "vp", "cp", "ep", "etp", "dp", "shard"}

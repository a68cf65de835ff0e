"""Whole models: slots, kinds and layers hold together, or say why not."""

from __future__ import annotations

from typing import Any

import pytest

from zoo.spec import ConfigError, ModelSpec, decode

ATTENTION = {"type": "gqa", "num_heads": 4, "num_kv_heads": 2}
MODEL: dict[str, Any] = {
    "d_model": 64,
    "vocab_size": 256,
    "attention": ATTENTION,
    "mlp": {"type": "mlp", "d_ffn": 128},
    "moe": {"type": "moe", "num_experts": 8, "top_k": 2, "d_expert": 32},
    "kinds": {"dense": {"mixer": "attention", "ffn": "mlp"}, "sparse": {"mixer": "attention", "ffn": "moe"}},
    "layers": "dense 3*sparse",
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """MODEL with one value set, by dotted path."""
    key, _, rest = path.partition(".")
    nodes: list[dict[str, Any]] = [{**MODEL}]
    while rest:
        nodes[-1][key] = {**nodes[-1].get(key, {})}
        nodes.append(nodes[-1][key])
        key, _, rest = rest.partition(".")
    nodes[-1][key] = value
    return nodes[0]


def test_blocks_stand_directly_under_the_model() -> None:
    spec = decode(ModelSpec, MODEL)
    assert list(spec.slots) == ["attention", "mlp", "moe"]
    assert spec.layer_kinds == ("dense", "sparse", "sparse", "sparse")
    assert spec.num_layers == 4
    data = spec.to_dict()
    assert "slots" not in data
    assert data["attention"]["num_heads"] == 4
    assert decode(ModelSpec, data) == spec


def test_widths_that_follow_are_filled_in() -> None:
    assert decode(ModelSpec, MODEL).slots["attention"].head_dim == 16


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("d_model", 0, "model.d_model: found 0; input should be greater than 0"),
        (
            "d_modell",
            64,
            "model.d_modell: found 64; unknown key of the model (blocks have a type); did you mean d_model?",
        ),
        ("d_model", 66, "model.attention.num_heads: found 4; must divide d_model (66); or give head_dim"),
        ("attention.num_heads", 7, "model.attention.num_kv_heads: found 2; must divide num_heads (7)"),
        (
            "attention.window",
            5,
            "model.attention.window: found 5; give it exactly when mask is sliding or chunked; mask is",
        ),
        (
            "attention.num_head",
            5,
            "model.attention.num_head: found 5; unknown key of AttentionSpec; did you mean num_heads",
        ),
        (
            "attention.rope.theeta",
            1,
            "model.attention.rope.theeta: found 1; unknown key of RopeSpec; did you mean theta?",
        ),
        ("attention.head_dim", 15, "model.attention.head_dim: found 15; head_dim * rope.fraction must be even"),
        ("attention.type", "gka", "model.attention.type: found 'gka'; allowed: "),
        ("moe.top_k", 9, "model.moe.top_k: found 9; must be at most num_experts (8)"),
        ("moe.latent_norm", True, "model.moe.latent_norm: found True; needs d_latent"),
        ("moe.shared_gate", True, "model.moe.shared_gate: found True; needs num_shared_experts of at least 1"),
        (
            "moe.balance.bias_update_rate",
            0.1,
            "model.moe.balance.bias_update_rate: found 0.1; needs router.correction_bias",
        ),
        (
            "moe.router",
            {"type": "top_k", "num_groups": 3},
            "model.moe.router.num_groups: found 3; must divide num_experts (8)",
        ),
        (
            "moe.router",
            {"type": "top_kk"},
            "model.moe.router.type: found 'top_kk'; allowed: sparse_mixer, top_k; did you",
        ),
        ("mlp.activation", "gated", "model.mlp.activation: found 'gated'; input should be 'silu', 'gelu'"),
        ("mlp.activation", "situ", None),
        (
            "mlp",
            {"type": "mlp", "d_ffn": 8, "activation": "situ", "gated": False},
            "model.mlp.gated: found False; must be true",
        ),
        ("mlp.activation_limit", 1.0, "model.mlp.activation_limit: found 1.0; give it exactly for clamped_swish"),
        ("layers", "4*spars", "model.layers: found 'spars'; allowed kinds: dense, sparse; did you mean sparse?"),
        ("layers", "4*(sparse", "model.layers: found '4*(sparse'; a '(' without its ')'"),
        ("kinds.dense.mixer", "attn", "model.kinds.dense.mixer: found 'attn'; allowed: attention"),
        ("kinds.dense.ffn", "attention", "model.kinds.dense.ffn: found 'attention'; allowed: mlp, moe"),
        ("kinds.dense", {}, "model.kinds.dense.mixer: found None; a kind needs a mixer, an ffn or both"),
        ("local", ATTENTION, "model.local: found 'local'; no kind uses this block; name it in a kind, or remove it"),
        ("head.scal", 2.0, "model.head.scal: found 2.0; unknown key of HeadSpec; did you mean scale?"),
        ("embedding.scale", "sqrt", "model.embedding.scale"),
    ],
)
def test_what_does_not_hold_together_says_so(path: str, value: Any, message: str | None) -> None:
    if message is None:
        decode(ModelSpec, changed(path, value), "model")
        return
    with pytest.raises(ConfigError) as error:
        decode(ModelSpec, changed(path, value), "model")
    assert str(error.value).startswith(message)


def test_kinds_may_lack_either_half() -> None:
    kinds = {"a": {"mixer": "attention"}, "f": {"ffn": "mlp"}, "e": {"ffn": "moe"}}
    spec = decode(ModelSpec, {**MODEL, "kinds": kinds, "layers": "2*(a f) a e"})
    assert spec.layer_kinds == ("a", "f", "a", "f", "a", "e")


def test_placement_of_a_kind_wins_over_the_model_s() -> None:
    spec = decode(ModelSpec, {**changed("kinds.dense.placement", "post"), "norm_placement": "sandwich"})
    assert spec.placement_of(spec.kinds["dense"]) == "post"
    assert spec.placement_of(spec.kinds["sparse"]) == "sandwich"


def test_a_changed_copy_is_checked_again() -> None:
    spec = decode(ModelSpec, MODEL)
    assert spec.replace(layers="2*dense", slots=spec.slots).num_layers == 2
    with pytest.raises(ValueError, match="allowed kinds"):
        spec.replace(layers="2*none")

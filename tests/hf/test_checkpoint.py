"""Checkpoints of transformers opened by zoo, and those of zoo opened by transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.hf.checks import (
    EXPERTS,
    LLAMA3,
    SIZES,
    YARN,
    Twin,
    check_layout_in_memory,
    check_logits,
    check_round_trip,
    logits,
    reopened,
    same_tensors,
    scaled,
    stored,
)
from zoo.hf import from_pretrained, save_pretrained
from zoo.hf.tensors import INDEX, SINGLE
from zoo.spec import ConfigError

LONGROPE = scaled(
    "longrope",
    factor=8.0,
    short_factor=[1.0, 1.1, 1.2, 1.3],
    long_factor=[1.0, 2.0, 3.0, 4.0],
    original_max_position_embeddings=8,
)
TWINS = [
    Twin("llama", "llama", {}),
    Twin("llama_tied_biased", "llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    Twin("llama_one_kv_head", "llama", {"num_key_value_heads": 1, "head_dim": 6, "hidden_act": "gelu_pytorch_tanh"}),
    Twin("llama_llama3", "llama", LLAMA3),
    Twin("llama_linear", "llama", scaled("linear", factor=3.0)),
    Twin("llama_dynamic", "llama", {**scaled("dynamic", factor=3.0), "max_position_embeddings": 8}),
    Twin("llama_yarn", "llama", YARN),
    Twin("llama_longrope", "llama", LONGROPE),
    Twin("mixtral", "mixtral", {"num_local_experts": 5}),
    Twin("mixtral_window", "mixtral", {"num_local_experts": 4, "sliding_window": 5, "head_dim": 10, **YARN}),
    Twin("qwen3", "qwen3", {"head_dim": 10, "attention_bias": True, "tie_word_embeddings": True}),
    Twin(
        "qwen3_windows",
        "qwen3",
        {"head_dim": 16, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    Twin("qwen3_moe", "qwen3_moe", {**EXPERTS, "moe_intermediate_size": 20, "norm_topk_prob": True, **LLAMA3}),
    Twin(
        "qwen3_moe_mixed",
        "qwen3_moe",
        {
            **EXPERTS,
            "moe_intermediate_size": 20,
            "mlp_only_layers": [1],
            "head_dim": 14,
            "num_key_value_heads": 1,
            "use_sliding_window": True,
            "sliding_window": 5,
        },
    ),
    Twin("olmoe", "olmoe", EXPERTS),
    Twin(
        "olmoe_normed", "olmoe", {**EXPERTS, "norm_topk_prob": True, "num_key_value_heads": 1, "attention_bias": True}
    ),
]
twins = pytest.mark.parametrize("twin", TWINS, ids=lambda twin: twin.name)


@twins
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)], ids=["fp32", "fp64"])
def test_logits_equal_those_of_transformers(twin: Twin, dtype: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    for seed in range(2):
        check_logits(twin.build(seed, dtype), 37, tolerance, tmp_path / str(seed))


@twins
def test_zoo_to_hugging_face_and_back_is_bit_identical(twin: Twin, tmp_path: Path) -> None:
    check_round_trip(twin.build(), tmp_path)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe_mixed", "olmoe"])
def test_experts_stacked_as_in_the_memory_of_transformers(name: str, tmp_path: Path) -> None:
    check_layout_in_memory(next(twin for twin in TWINS if twin.name == name).build(), tmp_path)
    assert any(name.endswith("experts.gate_up_proj") for name in stored(tmp_path))


def test_shards_are_read_and_written(tmp_path: Path) -> None:
    reference = TWINS[0].build()
    reference.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert (tmp_path / "hf" / INDEX).exists()
    model = from_pretrained(tmp_path / "hf")
    save_pretrained(model, tmp_path / "zoo", max_shard_bytes=20_000)
    files = sorted((tmp_path / "zoo").glob("model-*.safetensors"))
    assert len(files) > 2
    assert all(path.stat().st_size < 25_000 for path in files)
    assert same_tensors(tmp_path / "hf", tmp_path / "zoo")
    tokens = torch.randint(0, SIZES["vocab_size"], (1, 9))
    torch.testing.assert_close(logits(reopened(tmp_path / "zoo"), tokens), logits(reference, tokens))

    save_pretrained(model, tmp_path / "zoo")
    assert [path.name for path in (tmp_path / "zoo").iterdir() if path.suffix != ".json"] == [SINGLE]
    assert not (tmp_path / "zoo" / INDEX).exists()


def test_a_checkpoint_may_be_saved_over_itself(tmp_path: Path) -> None:
    TWINS[8].build().save_pretrained(tmp_path)
    before = stored(tmp_path)
    save_pretrained(from_pretrained(tmp_path), tmp_path)
    after = stored(tmp_path)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_weights_keep_the_dtype_they_are_stored_in(tmp_path: Path) -> None:
    TWINS[8].build(dtype=torch.bfloat16).save_pretrained(tmp_path)
    tensors = stored(tmp_path)
    router = "model.layers.1.block_sparse_moe.gate.weight"
    tensors[router] = tensors[router].float() + 1e-4
    save_file(tensors, tmp_path / SINGLE)
    model = from_pretrained(tmp_path)
    assert model.layers[1].ffn.router.weight.dtype == torch.float32
    assert model.layers[0].ffn.router.weight.dtype == torch.bfloat16
    assert torch.equal(model.layers[1].ffn.router.weight, tensors[router])
    assert logits(model, torch.zeros(1, 3, dtype=torch.int64)).dtype == torch.bfloat16
    assert {parameter.dtype for parameter in from_pretrained(tmp_path, torch.float64).parameters()} == {torch.float64}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint with one file and a tied head."""
    TWINS[1].build().save_pretrained(tmp_path)
    return tmp_path


def change_tensors(directory: Path, **changes: Tensor | None) -> None:
    tensors = {**stored(directory), **{name.replace("__", "."): value for name, value in changes.items()}}
    save_file({name: value for name, value in tensors.items() if value is not None}, directory / SINGLE)


def test_a_tied_head_that_is_stored_too_must_be_the_embedding(saved: Path) -> None:
    embedding = stored(saved)["model.embed_tokens.weight"]
    change_tensors(saved, lm_head__weight=embedding.clone())
    from_pretrained(saved)
    change_tensors(saved, lm_head__weight=embedding + 1)
    with pytest.raises(ConfigError, match=r"lm_head.weight: differs from the embedding"):
        from_pretrained(saved)


def test_missing_left_over_and_misshaped_tensors_are_named(saved: Path) -> None:
    change_tensors(saved, model__norm__weight=None, model__layers__0__mlp__up_proj__weight=torch.zeros(3, 5))
    with pytest.raises(ConfigError) as error:
        from_pretrained(saved)
    assert "model.norm.weight: missing (norm.weight)" in str(error.value)
    assert "model.layers.0.mlp.up_proj.weight: found shape [3, 5], the config asks for [48, 32]" in str(error.value)


def test_a_tensor_without_a_place_is_named_and_old_frequencies_are_no_weights(saved: Path) -> None:
    change_tensors(saved, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))
    from_pretrained(saved)
    change_tensors(saved, model__layers__0__self_attn__sinks=torch.ones(4))
    with pytest.raises(ConfigError, match=r"self_attn.sinks: the model has no place for it"):
        from_pretrained(saved)


def test_integers_are_not_read_as_weights(saved: Path) -> None:
    change_tensors(saved, model__norm__weight=torch.zeros(32, dtype=torch.int8))
    with pytest.raises(ConfigError, match=r"model.norm.weight: found dtype I8; .*dequantize"):
        from_pretrained(saved)


def test_pickled_weights_are_refused_with_advice(saved: Path) -> None:
    (saved / SINGLE).rename(saved / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pytorch_model.bin; pickled weights can run code.*save_pretrained"):
        from_pretrained(saved)


@pytest.mark.parametrize("holder", ["../model.safetensors", "/etc/passwd", "model.bin"])
def test_an_index_may_not_point_elsewhere(saved: Path, holder: str) -> None:
    (saved / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": holder}}))
    with pytest.raises(ConfigError, match=r"must be a .safetensors file beside the index"):
        from_pretrained(saved)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "config.json: not sound JSON"),
        (b"[1]", "config.json: found list"),
        (b'{"model_type": "llama", "rope_theta": NaN}', "NaN is no number"),
        (b"[" * 10**5, "config.json: not sound JSON"),
    ],
)
def test_an_unsound_config_is_refused(saved: Path, content: bytes, message: str) -> None:
    (saved / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        from_pretrained(saved)


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 8, (2**62).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]"]
)
def test_an_unsound_tensor_file_is_refused(saved: Path, content: bytes) -> None:
    (saved / SINGLE).write_bytes(content)
    with pytest.raises(ConfigError, match="not a sound safetensors file"):
        from_pretrained(saved)


@pytest.mark.parametrize(
    "absurd", [{"num_hidden_layers": 2000}, {"hidden_size": 10**9}, {"vocab_size": 10**18}, {"head_dim": 10**30}]
)
def test_an_absurd_config_is_refused_before_memory_is_taken(saved: Path, absurd: dict[str, int]) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | absurd))
    with pytest.raises(ConfigError, match=r"describes .* parameters, the files hold"):
        from_pretrained(saved)


def test_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such directory; download"):
        from_pretrained("meta-llama/Llama-3.2-1B")
    with pytest.raises(ConfigError, match=r"config.json: no such file"):
        from_pretrained(tmp_path)

"""GGUF files opened by zoo give what transformers computes with the weights that were written into them."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.hf.checks import EXPERTS, SIZES, Twin, logits
from tests.hf.gguf_files import llama3_divisors, write_gguf
from zoo.hf import from_pretrained
from zoo.hf.gguf_file import read_head
from zoo.spec import ConfigError

THETA = {"rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"}}
GEMMA = {"head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 5, "tie_word_embeddings": True}
BY_TYPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 9000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 700.0},
}
MOE = {**EXPERTS, "moe_intermediate_size": 20}
FILES: dict[str, tuple[Twin, dict[str, Any]]] = {
    "llama": (Twin("", "llama", THETA), {"rope.freq_base": 5000.0, "rope.dimension_count": 8, "vocab_size": 61}),
    "llama_biased": (
        Twin("", "llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1, "head_dim": 6}),
        {"attention.key_length": 6, "attention.value_length": 6},
    ),
    "llama_linear": (
        Twin("", "llama", {"rope_parameters": {"rope_theta": 10_000.0, "rope_type": "linear", "factor": 3.0}}),
        {"rope.scaling.type": "linear", "rope.scaling.factor": 3.0},
    ),
    "mixtral": (
        Twin("", "mixtral", {"num_local_experts": 5, **THETA}),
        {"expert_count": 5, "expert_used_count": 2, "rope.freq_base": 5000.0},
    ),
    "qwen2": (Twin("", "qwen2", {"tie_word_embeddings": True}), {}),
    "qwen2_moe": (
        Twin("", "qwen2_moe", {**MOE, "shared_expert_intermediate_size": 24}),
        {
            "expert_count": 5,
            "expert_used_count": 2,
            "expert_feed_forward_length": 20,
            "expert_shared_feed_forward_length": 24,
        },
    ),
    "qwen3": (Twin("", "qwen3", {"head_dim": 10}), {"attention.key_length": 10}),
    "qwen3_moe": (
        Twin("", "qwen3_moe", {**MOE, "norm_topk_prob": True, "head_dim": 14}),
        {
            "expert_count": 5,
            "expert_used_count": 2,
            "expert_feed_forward_length": 20,
            "attention.key_length": 14,
        },
    ),
    "gemma": (Twin("", "gemma", {"head_dim": 12, "tie_word_embeddings": True}), {"attention.key_length": 12}),
    "gemma2": (
        Twin("", "gemma2", {**GEMMA, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0}),
        {
            "attention.key_length": 12,
            "attention.sliding_window": 5,
            "attn_logit_softcapping": 20.0,
            "final_logit_softcapping": 10.0,
        },
    ),
    "gemma3": (
        Twin("", "gemma3_text", {**GEMMA, "num_hidden_layers": 7, "rope_parameters": BY_TYPE}),
        {
            "attention.key_length": 12,
            "attention.sliding_window": 5,
            "rope.freq_base": 9000.0,
            "rope.freq_base_swa": 700.0,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
    ),
}


def built(twin: Twin) -> nn.Module:
    model: nn.Module = twin.build()
    if twin.model_type.startswith("gemma"):  # norms add 1, and their weights are far from it
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                nn.init.uniform_(parameter, -0.5, 0.5)
    return model


@pytest.mark.parametrize("name", FILES)
def test_logits_equal_those_of_the_model_that_was_written(name: str, tmp_path: Path) -> None:
    twin, metadata = FILES[name]
    reference = built(twin)
    model = from_pretrained(write_gguf(tmp_path / "model.gguf", reference, metadata))
    tokens = torch.randint(0, SIZES["vocab_size"], (2, 23))
    expected = logits(reference, tokens)
    assert (logits(model, tokens) - expected).abs().max() < 1e-4 * expected.std()
    reference.save_pretrained(tmp_path / "hf")
    whole = from_pretrained(tmp_path / "hf")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for ours, theirs in zip(model.state_dict().values(), whole.state_dict().values(), strict=True):
        # What was stored plus 1 has lost the last bits.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7 if name.startswith("gemma") else 0)


def test_llama3_scaling_is_found_in_its_divisors(tmp_path: Path) -> None:
    scaling = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    rope = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0, **scaling}
    reference = Twin("", "llama", {"head_dim": 32, "rope_parameters": rope}).build()
    metadata = {"rope.freq_base": 500_000.0, "attention.key_length": 32}
    divisors = llama3_divisors(500_000.0, 32, 32.0)
    path = write_gguf(tmp_path / "model.gguf", reference, metadata, rope_freqs__weight=divisors)
    model = from_pretrained(path)
    assert model.spec.slots["attention"].rope.scaling.factor == 32.0
    tokens = torch.randint(0, SIZES["vocab_size"], (2, 50))
    expected = logits(reference, tokens)
    assert (logits(model, tokens) - expected).abs().max() < 1e-4 * expected.std()
    divisors[9] *= 1.01
    with pytest.raises(ConfigError, match=r"rope_freqs.weight: not the llama3 scaling"):
        from_pretrained(write_gguf(tmp_path / "other.gguf", reference, metadata, rope_freqs__weight=divisors))


def test_quantized_tensors_are_dequantized(tmp_path: Path) -> None:
    reference = Twin("", "llama", {"hidden_size": 64, "intermediate_size": 96}).build()
    model = from_pretrained(write_gguf(tmp_path / "model.gguf", reference, {}, quantize=True))
    written = reference.state_dict()["model.layers.1.mlp.down_proj.weight"].numpy()
    kind = gguf.GGMLQuantizationType.Q8_0
    expected = torch.from_numpy(gguf.dequantize(gguf.quantize(written, kind), kind))
    assert torch.equal(model.layers[1].ffn.down.weight, expected)
    assert {p.dtype for p in from_pretrained(tmp_path, torch.bfloat16).parameters()} == {torch.bfloat16}


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, nn.Module]:
    return tmp_path / "model.gguf", Twin("", "llama", {"num_hidden_layers": 1, "vocab_size": 8}).build()


def test_the_head_is_what_the_package_reads(small: tuple[Path, nn.Module]) -> None:
    words = ["a", "bé", ""]
    path = write_gguf(*small, {".tokenizer.ggml.tokens": words, ".tokenizer.ggml.scores": [0.5, -1.0], ".x.y": True})
    metadata, tensors = read_head(path)
    reader = gguf.GGUFReader(path)
    theirs = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert metadata == theirs
    assert metadata["tokenizer.ggml.tokens"] == words
    for tensor in reader.tensors:
        ours = tensors[tensor.name]
        assert (ours.start, ours.type) == (tensor.data_offset, tensor.tensor_type)
        assert ours.shape == tuple(reversed(tensor.shape.tolist()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention.clamp_kqv": 8.0}, r"llama.attention.clamp_kqv: found 8.0; this setting is not understood"),
        ({"rope.scaling.type": "longrope"}, r"rope.scaling.type: found 'longrope'; understood: none, linear, yarn"),
        ({"rope.dimension_count": 4}, r"llama.rope.dimension_count: found 4; understood: 8 \(head_dim\)"),
        ({"attention.head_count": [4, 4]}, r"attention.head_count: found \[4, 4\]; must be one positive number"),
        ({"block_count": 2}, r"do not fit:\n  blk.1.attn_norm.weight: missing \(layers.1.mixer_norm.weight\)"),
        (
            {"feed_forward_length": 40},
            r"blk.0.ffn_gate.weight: found shape \[48, 32\], its metadata asks for \[40, 32\]",
        ),
        ({".split.count": 3}, r"is one of 3 parts; join them"),
    ],
)
def test_what_is_not_understood_is_refused(
    changes: dict[str, Any], message: str, small: tuple[Path, nn.Module]
) -> None:
    path = write_gguf(*small, changes)
    with pytest.raises(ConfigError, match=message):
        from_pretrained(path)


def test_a_file_that_ends_too_early_is_refused(small: tuple[Path, nn.Module]) -> None:
    path = write_gguf(*small, {})
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ConfigError, match=r"output.weight: not a sound GGUF file: it ends too early"):
        from_pretrained(path)


def test_another_architecture_is_refused(small: tuple[Path, nn.Module]) -> None:
    path = write_gguf(*small, {})
    path.write_bytes(path.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x06\0\0\0\0\0\0\0falcon", 1))
    with pytest.raises(ConfigError, match=r"general.architecture: found 'falcon'; understood: llama, qwen2"):
        from_pretrained(path)


def test_a_tensor_without_a_place_is_named(small: tuple[Path, nn.Module]) -> None:
    with pytest.raises(ConfigError, match=r"blk.0.attn_sinks.weight: the model has no place for it"):
        from_pretrained(write_gguf(*small, {}, blk__0__attn_sinks__weight=torch.ones(4)))


def test_the_package_that_is_missing_is_named(small: tuple[Path, nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(*small, {})
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"needs the package gguf; pip install 'moe-zoo\[gguf\]'"):
        from_pretrained(path)


def test_several_files_in_a_directory_are_not_guessed_at(tmp_path: Path, small: tuple[Path, nn.Module]) -> None:
    path = write_gguf(*small, {})
    from_pretrained(tmp_path)
    (tmp_path / "second.gguf").write_bytes(path.read_bytes())
    with pytest.raises(ConfigError, match=r"holds 2 GGUF files; name one of them"):
        from_pretrained(tmp_path)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    twin = Twin("", "llama", {"num_hidden_layers": 1, "vocab_size": 8, "hidden_size": 8, "intermediate_size": 4})
    return write_gguf(tmp_path_factory.mktemp("sound") / "model.gguf", twin.build(), {})


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_an_unsound_file_is_refused_and_nothing_worse(sound: Path, data: st.DataObject) -> None:
    content = bytearray(sound.read_bytes())
    head = 1400
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    for _ in range(data.draw(st.integers(0, 3))):
        if content:
            content[data.draw(st.integers(0, min(head, len(content)) - 1))] = data.draw(st.integers(0, 255))
    forged = sound.with_name("forged.gguf")
    forged.write_bytes(content)
    with suppress(ConfigError):
        from_pretrained(forged)

"""Memory and speed of running a model, against the caches that blocks really keep."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import zoo
from zoo.blocks.cache import GrowingCache
from zoo.plan.inference import cache_bytes, inference, read_bytes, smallest_machines, weight_bytes
from zoo.spec.model import ModelSpec

GIB = 2**30
TWINS = [
    ("qwen3_30b_a3b", "keys and values"),
    ("gemma3_1b", "windows"),
    ("deepseek_v2_lite", "latents"),
    ("nemotron_3_nano_30b_a3b", "states of Mamba-2"),
    ("qwen3_next_80b_a3b", "states of the delta rule"),
    ("jamba_v0_1", "states of Mamba-1"),
    ("lfm2_8b_a1b", "short convolutions"),
]


def tensors(state: Any) -> Iterator[torch.Tensor]:
    """What a state holds of tokens that may still be read; a window's buffers have room to spare beside."""
    if isinstance(state, GrowingCache):
        used = state.length if state._kept is None else min(state.length, state._kept)
        yield from (buffer[:, :used] for buffer in state.buffers)
    elif isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, (list, tuple)):
        for item in state:
            yield from tensors(item)
    elif hasattr(state, "__dict__"):
        for item in vars(state).values():
            yield from tensors(item)


@pytest.mark.parametrize(("model", "what"), TWINS, ids=[what for _, what in TWINS])
def test_cache_is_what_blocks_keep(model: str, what: str, load_model: Callable[[str], ModelSpec]) -> None:
    if model not in zoo.list_models():
        pytest.skip(f"there is no {model}")
    spec = zoo.shrink(load_model(model))
    batch, length = 2, 40
    built = zoo.build(spec, dtype=torch.bfloat16).eval()
    states = built.new_states(batch, length)
    with torch.no_grad():
        from zoo.blocks.base import Context

        tokens = torch.randint(spec.vocab_size, (batch, length))
        built.hidden(tokens, Context.of(tokens), states)
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors(states))
    assert sum(cache_bytes(spec, length).values()) * batch == held


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_are_all_parameters(precision: str) -> None:
    spec = zoo.load("tiny_moe")
    assert weight_bytes(spec, precision) == spec.params().total * {"fp32": 4, "bf16": 2}[precision]


def test_narrow_weights_leave_the_rest_wide() -> None:
    spec = zoo.load("qwen3_8b")
    products = weight_bytes(spec, "bf16") / 2 - spec.params().embedding
    assert weight_bytes(spec, "fp8") == pytest.approx(products + 2 * spec.params().embedding, rel=1e-3)
    assert weight_bytes(spec, "nvfp4") < weight_bytes(spec, "mxfp8")


def test_one_token_reads_the_active_parameters() -> None:
    spec = zoo.load("qwen3_30b_a3b")
    active = spec.params().active_without_lookup
    assert read_bytes(spec, "bf16", 1) == pytest.approx(2 * active, rel=1e-3)
    many = read_bytes(spec, "bf16", 10_000)
    assert many == pytest.approx(weight_bytes(spec, "bf16"), rel=0.1)
    assert read_bytes(spec, "bf16", 1) < read_bytes(spec, "bf16", 8) < many


def test_limits_by_hand() -> None:
    found = inference("qwen3_8b", "rtx4090", context=32768, batch=2)
    cache = 2 * 36 * 32768 * 2 * 8 * 128 * 2  # batch, layers, tokens, keys and values, heads, channels, bytes
    assert sum(found.cache_gib.values()) == pytest.approx(cache / GIB)
    weights = 2 * zoo.load("qwen3_8b").params().active_without_lookup
    assert found.decode_s == pytest.approx((weights + cache) / 1008e9, rel=1e-3)
    assert found.bound == "memory"
    assert found.decode_tokens_per_s == pytest.approx(2 / found.decode_s)
    spec = zoo.load("qwen3_8b")
    prompt = 32768 * (spec.flops(32768).total - 2 * spec.vocab_size * spec.d_model) + 2 * spec.vocab_size * spec.d_model
    peak = zoo.plan.estimate.load_hardware("rtx4090").chip.tflops.bf16 * 1e12
    assert found.prefill_s == pytest.approx(2 * prompt / peak)


def test_large_batches_are_limited_by_arithmetic() -> None:
    small, large = (inference("qwen3_8b", "h100_8x", context=64, batch=batch) for batch in (1, 4096))
    assert (small.bound, large.bound) == ("memory", "arithmetic")
    assert large.decode_tokens_per_s > 100 * small.decode_tokens_per_s


def test_sparse_attention_reads_less_than_it_keeps() -> None:
    models = [name for name in ("deepseek_v3_2", "glm_5") if name in zoo.list_models()]
    if not models:
        pytest.skip("no model with an indexer")
    spec = zoo.load(models[0])
    kept, read = (sum(cache_bytes(spec, 100_000, only_read=only).values()) for only in (False, True))
    assert read < 0.5 * kept
    assert sum(cache_bytes(spec, 1000, only_read=True).values()) == sum(cache_bytes(spec, 1000).values())


def test_smallest_machines_are_just_large_enough() -> None:
    found = inference("qwen3_8b", "rtx4090", context=32768, batch=1)
    assert found.fits
    assert all("1 x" in name and "24 GiB" in name for name in found.smallest)
    assert smallest_machines(23.0)[0].endswith("24 GiB)")
    assert smallest_machines(1e8) == ()
    assert not inference("llama3_1_405b", "rtx4090").fits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0}, "context: found 0"),
        ({"batch": -1}, "batch: found -1"),
        ({"precision": "fp9"}, "precision: found 'fp9'"),
        ({"cache_precision": "x"}, "cache_precision: found 'x'"),
    ],
)
def test_wrong_questions(options: dict[str, Any], message: str) -> None:
    with pytest.raises(zoo.ConfigError, match=message):
        inference("tiny_moe", "h100_8x", **options)

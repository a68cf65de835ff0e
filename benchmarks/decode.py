"""Writing text greedily on this CPU is several times faster than by peers, and near the speed of memory.

A small mixture of experts, the same weights for all; whole calls with the prompt, in turns. litgpt takes part where it
can be imported (`pip install --no-deps --target peers litgpt lightning ...`, then PYTHONPATH=peers).
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import zoo
from benchmarks.harness import Row, interleaved
from zoo.decoder import Decoder
from zoo.native.memory import use_huge_pages

OVERRIDES = """
model.d_model=512 model.vocab_size=32000 model.attention.num_heads=8 model.attention.num_kv_heads=2
model.attention.head_dim=64 model.moe.num_experts=16 model.moe.top_k=2 model.moe.d_expert=512 model.layers=8*sparse
""".split()
PROMPT, NEW, ROUNDS = 16, 48, 3
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
LIMIT_NUMBERS = 2**26
"""What is read to measure the memory: 256 MiB, several times the last cache."""
Write = Callable[[int], Tensor]
"""Continues the prompt by so many tokens."""


def rows() -> list[Row]:
    return [row for dtype in NAMES for batch_size in (1, 8) for row in measure(dtype, batch_size)]


def measure(dtype: torch.dtype, batch_size: int) -> list[Row]:
    """The rows of one dtype and batch size."""
    torch.manual_seed(0)
    prompt = torch.randint(0, 32000, (batch_size, PROMPT))
    with tempfile.TemporaryDirectory() as folder:
        zoo.save_pretrained(zoo.build(zoo.load("qwen3_30b_a3b", *OVERRIDES)), folder)
        model = zoo.from_pretrained(folder, dtype=dtype)
        other = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        use_huge_pages(other.parameters())  # what ours asks for its weights
        model.decoding = "compiled"
        calls: dict[str, Write] = {"zoo": partial(model.generate, prompt)}
        calls |= _fastest(_settings(other, prompt)) | _litgpt(model, prompt)
        texts = {name: call(NEW) for name, call in calls.items()}
        same = {name: float((text == texts["zoo"]).float().mean()) for name, text in texts.items()}
        if dtype == torch.float32 and min(same.values()) < 1:
            raise AssertionError(f"texts differ: {same}")
        return _rows(model, calls, same, texts["zoo"])


def _rows(model: Decoder, calls: dict[str, Write], same: dict[str, float], text: Tensor) -> list[Row]:
    numbers = torch.randn(LIMIT_NUMBERS)
    use_huge_pages([numbers])
    turns = {(name, num_new): partial(call, num_new) for name, call in calls.items() for num_new in (1, NEW)}
    seconds = interleaved({**turns, "memory": numbers.sum}, ROUNDS, warmup=1)
    gb_s = numbers.nbytes / seconds["memory"] / 1e9
    whole = {name: seconds[name, NEW] for name in calls}
    step = {name: (seconds[name, NEW] - seconds[name, 1]) / (NEW - 1) for name in calls}
    what, found = f"{NAMES[model.embed.weight.dtype]}, batch {len(text)}", []
    for name in calls:
        if name != "zoo":
            note = f"{same[name]:.0%} of the tokens are the same"
            found += [
                Row(f"{what}: a token", _ms(step["zoo"]), f"{name} {_ms(step[name])}", step[name] / step["zoo"], note),
                Row(
                    f"{what}: prompt of {PROMPT} and {NEW} tokens",
                    _rate(whole["zoo"], len(text)),
                    f"{name} {_rate(whole[name], len(text))}",
                    whole[name] / whole["zoo"],
                ),
            ]
    size = _bytes_a_step(model, text)
    limit = size / gb_s / 1e9
    ours = f"{_ms(step['zoo'])}, {size / step['zoo'] / 1e9:.3g} GB/s"
    memory = f"memory {_ms(limit)}, {gb_s:.3g} GB/s"
    return [*found, Row(f"{what}: a token, {size / 1e6:.0f} MB of weights", ours, memory, limit / step["zoo"])]


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"


def _rate(seconds: float, batch_size: int) -> str:
    return f"{batch_size * NEW / seconds:.3g} tokens/s"


def _settings(other: Any, prompt: Tensor) -> dict[str, Write]:
    """transformers' caches, with each of its implementations of experts that is not hopeless for one token."""

    given = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0}

    def call(experts: str, cache: dict[str, str], num_new: int) -> Tensor:
        other.set_experts_implementation(experts)
        return other.generate(prompt, max_new_tokens=num_new, **given, **cache)

    caches = {"dynamic": {}, "static": {"cache_implementation": "static"}}
    return {
        f"transformers {experts}, {name} cache": partial(call, experts, cache)
        for experts in ("grouped_mm", "eager")
        for name, cache in caches.items()
    }


def _fastest(calls: dict[str, Write]) -> dict[str, Write]:
    seconds = interleaved({name: partial(call, NEW) for name, call in calls.items()}, rounds=1, warmup=1)
    name = min(seconds, key=seconds.__getitem__)
    return {name: calls[name]}


def _bytes_a_step(model: Decoder, text: Tensor) -> float:
    """Weights that a step reads, on average over the text: each chosen expert once, however many rows chose it."""
    size = model.embed.weight.itemsize
    moes = model.moe_layers().values()
    chosen: list[Tensor] = []
    hooks = [moe.router.register_forward_hook(lambda *seen: chosen.append(seen[2].indices)) for moe in moes]
    with torch.no_grad():
        model(text)
    for hook in hooks:
        hook.remove()
    experts = 0.0
    for moe, indices in zip(moes, chosen, strict=True):
        by_step = indices.view(*text.shape, -1)[:, PROMPT:].transpose(0, 1).flatten(1)
        distinct = statistics.mean(len(set(step)) for step in by_step.tolist())
        experts += distinct * sum(part[0].numel() for part in moe.experts.parameters())
    routed = sum(part.numel() for moe in moes for part in moe.experts.parameters())
    always = sum(part.numel() for part in model.parameters()) - model.embed.weight.numel() - routed
    return size * (always + experts)


def _litgpt(model: Decoder, prompt: Tensor) -> dict[str, Write]:
    """litgpt's model with the same weights in a plain loop over its own cache, where it is installed."""
    try:
        from litgpt.model import GPT, Config
    except ImportError:
        return {}
    spec = model.spec
    config = Config(
        n_layer=spec.num_layers, n_embd=spec.d_model, n_head=8, n_query_groups=2, head_size=64, bias=False,
        padded_vocab_size=spec.vocab_size, block_size=PROMPT + NEW, norm_class_name="RMSNorm", norm_eps=spec.norm.eps,
        norm_qk=True, rotary_percentage=1.0, rope_base=1_000_000, parallel_residual=False, mlp_class_name="LLaMAMoE",
        n_expert=16, n_expert_per_token=2, intermediate_size=512, moe_intermediate_size=512,
    )  # fmt: skip
    with _default_dtype(model.embed.weight.dtype):
        peer = GPT(config).eval()
    _copy(model, peer)
    use_huge_pages(peer.parameters())
    peer.set_kv_cache(len(prompt), dtype=model.embed.weight.dtype)

    @torch.inference_mode()
    def call(num_new: int) -> Tensor:
        text, place = prompt, torch.arange(PROMPT)
        newest = prompt
        for _ in range(num_new):
            newest = peer(newest, place)[:, -1:].argmax(-1)
            text, place = torch.cat((text, newest), 1), place[-1:] + 1
        return text

    return {"litgpt": call}


@torch.no_grad()
def _copy(model: Decoder, peer: nn.Module) -> None:
    peer.transformer.wte.weight.copy_(model.embed.weight)
    peer.transformer.ln_f.weight.copy_(model.norm.weight)
    peer.lm_head.weight.copy_(model.head.weight)
    for ours, theirs in zip(model.layers, peer.transformer.h, strict=True):
        theirs.norm_1.weight.copy_(ours.mixer_norm.weight)
        theirs.norm_2.weight.copy_(ours.ffn_norm.weight)
        theirs.attn.qkv.weight.copy_(torch.cat([ours.mixer.q.weight, ours.mixer.k.weight, ours.mixer.v.weight]))
        theirs.attn.proj.weight.copy_(ours.mixer.out.weight)
        theirs.attn.norm_q.weight.copy_(ours.mixer.q_norm.weight)
        theirs.attn.norm_k.weight.copy_(ours.mixer.k_norm.weight)
        theirs.mlp.gate.weight.copy_(ours.ffn.router.weight)
        for index, expert in enumerate(theirs.mlp.experts):
            gate, up = ours.ffn.experts.gate_up[index].chunk(2)
            expert.fc_1.weight.copy_(gate)
            expert.fc_2.weight.copy_(up)
            expert.proj.weight.copy_(ours.ffn.experts.down[index])


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)

"""A mixture-of-experts layer on this CPU is faster than transformers', forward and backward, in less memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeSparseMoeBlock

from benchmarks.harness import Row, interleaved, peak_extra_mib
from zoo.blocks.moe import MoE

D_MODEL, D_EXPERT, NUM_EXPERTS, TOP_K = 512, 256, 64, 8


def rows() -> list[Row]:
    models: dict[str, nn.Module] = {
        "auto": ours("auto"),
        "loop": ours("loop"),
        "transformers grouped_mm": theirs("grouped_mm"),
        "transformers eager": theirs("eager"),
    }
    found = []
    for train, num_tokens, rounds in ((True, 4096, 7), (False, 4096, 7), (False, 64, 15), (False, 1, 50)):
        calls = {name: call(model, num_tokens, train) for name, model in models.items()}
        if train:  # every expert makes a gradient of the size of all of them: several times slower than all others
            del calls["transformers eager"]
        seconds = interleaved(calls, rounds, warmup=1)
        what = f"{'forward and backward' if train else 'forward'}, {num_tokens} tokens"
        mine = seconds.pop("auto")
        found += [
            Row(what, f"auto {_ms(mine)}", f"{name} {_ms(other)}", other / mine) for name, other in seconds.items()
        ]
    peaks = [peak_extra_mib(call(models[name], 4096, True)) for name in ("auto", "transformers grouped_mm")]
    sizes = [f"{name} {peak:.0f} MiB" for name, peak in zip(("auto", "transformers grouped_mm"), peaks, strict=True)]
    return [*found, Row("peak memory, forward and backward, 4096 tokens", *sizes, peaks[1] / peaks[0])]


def ours(backend: str) -> MoE:
    """The layer, d 512, 8 of 64 experts of width 256, fp32."""
    layer = MoE(D_MODEL, num_experts=NUM_EXPERTS, top_k=TOP_K, d_expert=D_EXPERT)
    layer.experts.backend = backend
    return layer


def theirs(implementation: str) -> nn.Module:
    """The same layer of transformers."""
    config = Qwen3MoeConfig(
        hidden_size=D_MODEL, moe_intermediate_size=D_EXPERT, num_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K
    )
    config.norm_topk_prob = True
    config._experts_implementation = implementation
    layer = Qwen3MoeSparseMoeBlock(config)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)
    return layer


def call(layer: nn.Module, num_tokens: int, train: bool) -> Callable[[], None]:
    """One call on fresh tokens, so that the experts' loads change from call to call as they do in training."""

    def output(x: Tensor) -> Tensor:
        result = layer(x)
        return result[0] if isinstance(result, tuple) else result

    def run() -> None:
        x = torch.randn(1, num_tokens, D_MODEL, requires_grad=train)
        if train:
            layer.zero_grad()
            output(x).backward(torch.ones_like(x))
        else:
            with torch.no_grad():
                output(x)

    return run


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"

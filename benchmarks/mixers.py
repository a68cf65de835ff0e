"""Mamba-2 and gated delta layers train twice as fast as those of transformers on this CPU, or as near as can be.

Whole layers, forward and backward at 2048 tokens in fp32, at sizes of released models: the same weights, in turns, in
one process with the same settings (`zoo.tuning`), outputs and gradients compared first. Where the projections, the same
for both, take most of the time, what is beside them is compared too.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from benchmarks.harness import Row, interleaved, peak_extra_mib
from zoo.blocks.base import Mixer, build_block, initialize
from zoo.blocks.delta import GatedDelta
from zoo.blocks.mamba2 import Mamba2
from zoo.native.library import library
from zoo.plan.base import cost_of
from zoo.spec.block import BlockSpec
from zoo.spec.delta import DeltaSpec
from zoo.spec.mamba2 import Mamba2Spec
from zoo.spec.norm import NormSpec
from zoo.tuning import tune

TOKENS = 2048
LARGEST_DIFFERENCE = 1e-3
"""Of outputs and gradients, as a share of their standard deviation: both sum many numbers in fp32."""


@dataclass(frozen=True)
class Case:
    """A layer of a released model."""

    what: str
    d_model: int
    spec: BlockSpec
    peer_chunk: int = 64
    """Tokens of a chunk in the peer's own configuration."""


_WIDE = DeltaSpec(num_heads=32, num_qk_heads=16, head_dim=128, v_head_dim=128)
CASES = {
    "mamba2": Case("Mamba-2 370M", 1024, Mamba2Spec(num_heads=32), 256),
    "mamba2_nano": Case("Nemotron 3 Nano's Mamba-2", 2688, Mamba2Spec(num_heads=64, num_groups=8), 128),
    "delta": Case("gated delta, d 1024", 1024, _WIDE.replace(num_heads=16)),
    "delta_next": Case("Qwen3-Next's gated delta", 2048, _WIDE),
}


def rows() -> list[Row]:
    found = [row for case in CASES.values() for row in memory_rows(case)]
    tune()
    return [*(row for case in CASES.values() for row in time_rows(case)), *found]


def time_rows(case: Case, rounds: int = 5) -> list[Row]:
    """Against the peer, and against one dense product of as many FLOPs."""
    ours, theirs = build(case)
    _compare(ours, theirs, case)
    weights = sum(weight.numel() for weight in ours.parameters() if weight.ndim == 2)
    flops = 2 * weights + sum(cost_of(case.spec, case.d_model, NormSpec()).mixing(TOKENS, True).values())
    dense = nn.Linear(case.d_model, round(flops / 2 / case.d_model), bias=False)
    layers = {"zoo": ours, "transformers": theirs, "dense": dense}
    calls = {name: call(layer, case.d_model) for name, layer in layers.items()}
    seconds = interleaved({**calls, "projections": _projections(ours, case.d_model)}, rounds, warmup=1)
    mine, peer, alone = (seconds[name] for name in ("zoo", "transformers", "projections"))
    what = f"{case.what}: training, {TOKENS} tokens"
    beside = Row(
        f"{what}, beside the projections",
        _ms(max(mine - alone, 0.0)),
        f"transformers {_ms(peer - alone)}",
        (peer - alone) / max(mine - alone, 1e-9),
        f"projections {_ms(alone)}: {peer / alone:.2f} would be the ratio of a layer of nothing else",
    )
    return [
        Row(what, _ms(mine), f"transformers {_ms(peer)}", peer / mine, "bar 2"),
        beside,
        Row(what, _ms(mine), f"a dense product of the same FLOPs {_ms(seconds['dense'])}", seconds["dense"] / mine),
    ]


def memory_rows(case: Case) -> list[Row]:
    mine, peer = (_apart(case, index) for index in (0, 1))
    what = f"{case.what}: extra memory of training, {TOKENS} tokens"
    return [Row(what, f"{mine:.0f} MiB", f"transformers {peer:.0f} MiB", peer / mine)]


def _apart(case: Case, index: int) -> float:
    """The peak of a first call, gradients included, in a process of its own whose allocator gives all back."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_training_peak_mib, case, index).result()


def _training_peak_mib(case: Case, index: int) -> float:
    library()
    layer = build(case)[index]
    call(layer, case.d_model, 100)()
    layer.zero_grad()
    return peak_extra_mib(call(layer, case.d_model))


def _projections(layer: nn.Module, d_model: int) -> Callable[[], None]:
    """The matrix products of a layer with its weights, forward and backward, and nothing else."""
    *first, last = (part for part in layer.children() if isinstance(part, nn.Linear))
    x, inner = torch.randn(1, TOKENS, d_model), torch.randn(1, TOKENS, last.in_features)
    grads = [torch.full((1, TOKENS, part.out_features), 0.1) for part in (*first, last)]

    def run() -> None:
        layer.zero_grad()
        given, between = x.clone().requires_grad_(), inner.clone().requires_grad_()
        torch.autograd.backward([*(part(given) for part in first), last(between)], grads)

    return run


def build(case: Case) -> tuple[Mixer, nn.Module]:
    """The layer and the peer's with the same weights."""
    torch.manual_seed(0)
    ours = build_block(case.spec, case.d_model, NormSpec())
    assert isinstance(ours, Mixer)
    initialize(ours, case.d_model**-0.5, case.d_model**-0.5)
    maker = partial(_mamba2, ours) if isinstance(ours, Mamba2) else partial(_delta, ours)
    theirs = maker(case)
    named = {"conv.weight": "conv1d.weight", "conv.bias": "conv1d.bias", "a_log": "A_log", "skip": "D"}
    named |= {"dt_bias": "dt_bias", "norm.weight": "norm.weight", "out.weight": "out_proj.weight"}
    held = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, weight in ours.named_parameters():
            if name in named:
                held[named[name]].copy_(weight)
    return ours, theirs


def _mamba2(ours: Mamba2, case: Case) -> nn.Module:
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Config, Mamba2Mixer

    spec = ours.spec
    config = Mamba2Config(
        hidden_size=case.d_model,
        num_heads=spec.num_heads,
        head_dim=spec.head_dim,
        n_groups=spec.num_groups,
        state_size=spec.d_state,
        expand=spec.d_inner / case.d_model if spec.d_inner % case.d_model else spec.d_inner // case.d_model,
        chunk_size=case.peer_chunk,
        layer_norm_epsilon=ours.norm.eps,
    )
    theirs: nn.Module = Mamba2Mixer(config, 0)
    with torch.no_grad():
        theirs.in_proj.weight.copy_(torch.cat([getattr(ours, name).weight for name in ("z", "x", "b", "c", "dt")]))
    return theirs


def _delta(ours: GatedDelta, case: Case) -> nn.Module:
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextConfig, Qwen3NextGatedDeltaNet

    spec = ours.spec
    config = Qwen3NextConfig(
        hidden_size=case.d_model,
        num_hidden_layers=1,
        linear_num_value_heads=spec.num_heads,
        linear_num_key_heads=spec.qk_heads,
        linear_key_head_dim=spec.head_dim,
        linear_value_head_dim=spec.v_width,
        linear_conv_kernel_dim=spec.conv_width,
        rms_norm_eps=ours.norm.eps,
    )
    theirs: nn.Module = Qwen3NextGatedDeltaNet(config, 0)
    by_group = [
        torch.cat([getattr(ours, name).weight.unflatten(0, (spec.qk_heads, -1)) for name in names], 1).flatten(0, 1)
        for names in (("q", "k", "v", "gate"), ("beta", "decay"))
    ]
    with torch.no_grad():
        theirs.in_proj_qkvz.weight.copy_(by_group[0])
        theirs.in_proj_ba.weight.copy_(by_group[1])
    return theirs


def _compare(ours: nn.Module, theirs: nn.Module, case: Case) -> None:
    """Outputs, and gradients of the input and of the common weights, are the same."""
    x = torch.randn(1, TOKENS, case.d_model)
    found = []
    for layer in (ours, theirs):
        given = x.clone().requires_grad_()
        output = layer(given)
        conv, last = layer.get_parameter("norm.weight"), next(p for n, p in layer.named_parameters() if "conv" in n)
        grads = torch.autograd.grad(output.square().mean(), (given, conv, last))
        found.append([output.detach(), *grads])
    for name, mine, other in zip(("output", "x", "norm", "conv"), *found, strict=True):
        difference = float((mine - other).abs().max() / other.std())
        if difference > LARGEST_DIFFERENCE:
            raise AssertionError(f"{case.what}: {name} differs by {difference:.1e}")


def call(layer: nn.Module, d_model: int, num_tokens: int = TOKENS) -> Callable[[], None]:
    x = torch.randn(1, num_tokens, d_model)

    def run() -> None:
        layer.zero_grad()
        given = x.clone().requires_grad_()
        output = layer(given)
        output.backward(torch.full_like(output, 0.1))

    return run


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"

"""What the processes of the pool run: some steps of training, held against those of a single process."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

import zoo
from tests.models import ATTENTION, MLP
from zoo.blocks.base import Context
from zoo.blocks.linear_loss import IGNORED
from zoo.blocks.mamba2 import GatedNorm
from zoo.blocks.norm import Norm
from zoo.data.packing import packed
from zoo.decoder import Decoder, build
from zoo.parallel import World, parallelize, share_counts
from zoo.parallel import step as parallel_step
from zoo.plan.layout import Layout
from zoo.spec.base import decode
from zoo.spec.model import ModelSpec
from zoo.spec.train import AdamWSpec
from zoo.train import trainer
from zoo.train.optim import build_optimizers

STEPS, ROWS, SEQ_LEN, MICRO_BATCHES, CLIP = 5, 16, 32, 2, 0.5
BALANCE = {"aux_loss": 0.02, "z_loss": 0.001}
TWINS = {
    "dense": ("llama3_8b", {}),
    "moe": ("qwen3_30b_a3b", {**BALANCE}),
    "mla_moe": ("moonlight_16b_a3b", {**BALANCE, "level": "sequence", "bias_update_rate": 0.01}),
    "hybrid": ("nemotron_3_nano_30b_a3b", {**BALANCE, "bias_update_rate": 0.01}),
}
OPTIONS: dict[str, dict[str, Any]] = {
    # What the dense twin has not: biases everywhere, sinks, gates, two ends of every kind, an uneven vocabulary.
    "options": {
        "vocab_size": 67,
        "attention": {
            **ATTENTION, "qkv_bias": True, "out_bias": True, "sink": True, "gate": "head", "qk_norm": "head",
        },
        "chunks": {**ATTENTION, "mask": "chunked", "window": 6},
        "mlp": {**MLP, "bias": True},
        "kinds": {"dense": {"mixer": "attention", "ffn": "mlp"}, "chunked": {"mixer": "chunks", "ffn": "mlp"}},
        "layers": "dense chunked",
        "embedding": {"scale": "sqrt_d_model", "positions": 32},
        "head": {"tied": True, "bias": True, "scale": 0.5, "softcap": 4.0},
        "mtp": {"layers": "dense", "depth": 2, "enabled": True},
    },
    # What the mixtures of the twins have not.
    "moe_options": {
        "attention": {**ATTENTION, "softcap": 5.0},
        "moe": {
            "type": "moe", "num_experts": 8, "top_k": 2, "d_expert": 16, "bias": True, "num_shared_experts": 1,
            "shared_gate": True, "d_latent": 16, "latent_norm": True, "balance": BALANCE,
            "router": {"type": "top_k", "arithmetic": "model", "weigh": "input", "logit_bias": True},
        },
        "kinds": {"sparse": {"mixer": "attention", "ffn": "moe"}},
        "layers": "sparse sparse",
    },
    # Every other mixer, over rows of several documents.
    "mixers": {
        "vocab_size": 16,
        "init": {"std": 0.3, "depth_scaled": False},
        "window": {**ATTENTION, "mask": "sliding", "window": 6},
        "latent": {
            "type": "mla", "num_heads": 2, "d_kv_latent": 16, "nope_head_dim": 8, "rope_head_dim": 4, "v_head_dim": 12,
        },
        "mamba": {"type": "mamba2", "num_heads": 4, "head_dim": 8, "num_groups": 2, "d_state": 6, "chunk_size": 4},
        "delta": {"type": "delta", "num_heads": 4, "num_qk_heads": 2, "head_dim": 8, "v_head_dim": 6, "chunk_size": 4},
        "kimi": {"type": "delta", "num_heads": 2, "head_dim": 8, "decay": {"per": "channel", "rank": 4}},
        "conv": {"type": "short_conv"},
        "kinds": {name: {"mixer": name} for name in ("window", "latent", "mamba", "delta", "kimi", "conv")},
        "layers": "window latent mamba delta kimi conv",
        "mtp": {"layers": "delta", "enabled": True},
    },
}  # fmt: skip
BOUNDARY = 3
"""The token with which a document of `mixers` begins."""


@dataclass
class Step:
    """What one step of training gave."""

    losses: dict[str, float]
    norm: float
    grads: dict[str, Tensor]
    """After clipping."""
    counts: dict[int, Tensor]
    """By layer."""
    biases: dict[int, Tensor]


@cache
def spec_of(name: str) -> ModelSpec:
    """The tiny twin of a released model, its router exact in fp64; or a model with many options."""
    init = {"std": 0.1, "depth_scaled": False}
    if name in OPTIONS:
        return decode(ModelSpec, {"d_model": 32, "vocab_size": 64, "init": init, **OPTIONS[name]})
    released, balance = TWINS[name]
    settings = zoo.shrink(zoo.load(released)).to_dict() | {"init": init}
    if "moe" in settings:
        settings["moe"]["balance"] = balance
        settings["moe"]["router"]["arithmetic"] = "model"
    return decode(ModelSpec, settings)


def model_of(spec: ModelSpec, dtype: torch.dtype) -> Decoder:
    """The same weights on every process. Half of the experts are chosen by no token."""
    torch.manual_seed(0)
    model = build(spec, dtype=dtype)
    for moe in model.moe_layers().values():
        weight = moe.router.weight.data
        # Of two opposite experts one is always above 0.
        weight[:4] = torch.stack((weight[0], -weight[0], weight[1], -weight[1])) * 4
        weight[4:] *= 1e-5  # not alike: whom a token prefers must not hang on the order of sums
    if dtype == torch.float64:
        widen_norms(model)
    return model.train()


def widen_norms(model: Decoder) -> None:
    """Take norms in fp64. Blocks take them in fp32 as released models do, and what is rounded there differs with the
    order of sums before it."""
    for module in model.modules():
        if isinstance(module, Norm):
            module.forward = partial(wide_norm, module)
        elif isinstance(module, GatedNorm):
            module.forward = partial(wide_gated_norm, module)


def wide_norm(norm: Norm, x: Tensor) -> Tensor:
    return F.rms_norm(x, (norm.width,), norm.weight, norm.spec.eps)


def wide_gated_norm(norm: GatedNorm, x: Tensor, gate: Tensor) -> Tensor:
    y = (x * F.silu(gate)).unflatten(-1, (norm.num_spans, -1))
    return F.rms_norm(y, y.shape[-1:], None, norm.eps).flatten(-2) * norm.weight


def batch_of(spec: ModelSpec, step: int) -> trainer.Batch:
    """Rows [ROWS, SEQ_LEN], with targets that do not count, more in some rows than in others."""
    random = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, spec.vocab_size, (ROWS, SEQ_LEN + 1), generator=random)
    targets = tokens[:, 1:].clone()
    targets[torch.rand(targets.shape, generator=random) < torch.linspace(0, 0.8, ROWS)[:, None]] = IGNORED
    return tokens[:, :-1], targets


def own_rows(batch: trainer.Batch, part: int, parts: int, micro_batches: int = MICRO_BATCHES) -> trainer.Batch:
    """Of each micro-batch, the rows of one of several processes."""
    inputs, targets = (torch.cat([micro.chunk(parts)[part] for micro in whole.chunk(micro_batches)]) for whole in batch)
    return inputs, targets


def train(model: Decoder, steps: int, world: World | None, micro_batches: int = MICRO_BATCHES) -> list[Step]:
    """Some steps on `world`, or on this process alone."""
    several = model.spec.vocab_size == OPTIONS["mixers"]["vocab_size"]
    context = partial(packed, boundary=BOUNDARY) if several else Context.of
    # Keys that are divided by their length make much of little differences: smaller steps keep them small.
    optimizers = build_optimizers(model, AdamWSpec(lr=0.01, eps=0.1 if several else 1e-3))
    layers, result = model.moe_layers(), []
    for step in range(steps):
        batch, rows = batch_of(model.spec, step), ROWS // micro_batches
        if world is None:
            losses = trainer.accumulate(model, batch, rows, nullcontext, context)
            norm = trainer.clip_gradients(model.parameters(), CLIP)
        else:
            dp = world.layout.dp
            own = own_rows(batch, world.rows_index, dp, micro_batches)
            losses = parallel_step.accumulate(model, own, rows // dp, nullcontext, world, context)
            norm = parallel_step.clip_gradients(model.parameters(), CLIP, world)
            share_counts(model, world)
        found = {name: parameter.grad for name, parameter in model.named_parameters()}
        grads = {name: grad.detach().clone() for name, grad in found.items() if grad is not None}
        counts = {index: moe.tokens_per_expert.clone() for index, moe in layers.items()}
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for moe in layers.values():
            moe.update_bias()
            moe.tokens_per_expert.zero_()
        found_biases = {index: moe.router.correction_bias for index, moe in layers.items()}
        biases = {index: bias.clone() for index, bias in found_biases.items() if bias is not None}
        result.append(Step(losses, norm, grads, counts, biases))
    return result


def reference(name: str, dtype: torch.dtype, path: Path, micro_batches: int = MICRO_BATCHES) -> None:
    """Train on one process and write down what it gave."""
    torch.save(train(model_of(spec_of(name), dtype), STEPS, None, micro_batches), path)


def compare(
    name: str,
    dtype: torch.dtype,
    layout: Layout,
    path: Path,
    recompute: Literal["none", "layer"] = "none",
    micro_batches: int = MICRO_BATCHES,
) -> dict[str, Any]:
    """Train on all processes; the largest relative differences from what `path` holds."""
    expected: list[Step] = torch.load(path, weights_only=False)
    model = model_of(spec_of(name), dtype)
    model.recompute = recompute
    world = World.of(layout)
    found = train(parallelize(model, world), STEPS, world, micro_batches)
    worst: dict[str, Any] = {"losses": 0.0, "norm": 0.0, "grads": 0.0, "where": "", "counts": True}
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours.losses.keys() == theirs.losses.keys()
        # A stage has its own layers.
        assert ours.grads.keys() == {name for name, _ in model.named_parameters()} & theirs.grads.keys()
        for term, value in theirs.losses.items():
            worst["losses"] = max(worst["losses"], abs(ours.losses[term] - value) / abs(value))
        worst["norm"] = max(worst["norm"], abs(ours.norm - theirs.norm) / theirs.norm)
        for parameter, grad in ours.grads.items():
            error = difference(grad, theirs.grads[parameter], put_together=step == STEPS - 1)
            if not error <= worst["grads"]:
                worst["grads"], worst["where"] = error, f"{parameter} in step {step}"
        same = [torch.equal(count, theirs.counts[index]) for index, count in ours.counts.items()]
        near = [torch.allclose(bias, theirs.biases[index]) for index, bias in ours.biases.items()]
        worst["counts"] &= all(same) and all(near)
    return worst


def difference(ours: Tensor, whole: Tensor, put_together: bool) -> float:
    """Over the norm of the whole: of this process's part, or of what all parts together are."""
    assert ours.shape == whole.shape
    scale = whole.norm().clamp_min(1e-12)
    if not isinstance(ours, DTensor):
        return float((ours - whole).norm() / scale)
    if put_together:
        return float((ours.full_tensor() - whole).norm() / scale)
    expected = distribute_tensor(whole, ours.device_mesh, ours.placements, src_data_rank=None)
    return float((ours.to_local() - expected.to_local()).norm() / scale)
